"""Load datasets from the Hub, or from the caches of its clients."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import (
    DatasetCard,
    HfApi,
    constants,
    get_cached_repo_tree,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError, RemoteEntryNotFoundError

from stages.rows.hub_commits import resolve_commit
from stages.runtime.errors import UserError
from stages.runtime.param_types import DatasetParams

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


def load(entry: DatasetParams, streaming: bool) -> tuple[Rows, str, str | list[str] | None]:
    """The rows of a Hub dataset, its commit, and the license in its card.

    A pinned revision that is complete in the cache is loaded without a request.
    """
    name, revision = str(entry.name), entry.revision
    commit = resolve_commit("dataset", name, revision)
    # A separate folder for each choice: if a download fails, load_dataset returns whatever it finds there.
    key = hashlib.sha256(repr((name, commit, entry.subset, entry.data_files)).encode()).hexdigest()
    cache = Path(datasets.config.HF_DATASETS_CACHE, key)
    choice = {"name": entry.subset, "data_files": entry.data_files, "split": entry.split, "cache_dir": str(cache)}
    if commit == revision or is_offline_mode():
        if prepared := next(cache.glob("*/*/*/*/dataset_info.json"), None):
            return open_prepared(prepared.parent, name, entry.split), commit, cached_license(name, commit)
        if folder := complete_snapshot(name, commit):
            return load_dataset(name, folder, **choice), commit, cached_license(name, commit)
    info = HfApi().dataset_info(name, revision=commit, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    with suppress(RemoteEntryNotFoundError):  # load_dataset would not say why it can't be read
        hf_hub_download(name, "README.md", repo_type="dataset", revision=commit)
    # The client has its own retries, five for each of these.
    datasets.config.STREAMING_OPEN_MAX_RETRIES = datasets.config.STREAMING_READ_MAX_RETRIES = 2
    rows = load_dataset(name, name, revision=commit, streaming=streaming, **choice)
    return rows, commit, info.card_data.get("license") if info.card_data else None


def open_prepared(folder: Path, name: str, split: str) -> Rows:
    """The rows that `load_dataset` has prepared in its cache."""
    owner_and_name, config, version, fingerprint = folder.parts[-4:]
    owner, _, dataset_name = owner_and_name.rpartition("___")  # a snapshot has no owner
    builder = Cache(str(folder.parents[3]), dataset_name, config, version, fingerprint, repo_id=name if owner else None)
    return builder.as_dataset(split)


def complete_snapshot(name: str, commit: str) -> str | None:
    """The folder with all files of a commit, as `hf download` writes it; None if one is missing."""
    try:
        # Without the list of files, missing ones would not be noticed.
        get_cached_repo_tree(name, repo_type="dataset", revision=commit)
        return snapshot_download(name, repo_type="dataset", revision=commit, local_files_only=True)
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        return None


def cached_license(name: str, commit: str) -> str | list[str] | None:
    path = try_to_load_from_cache(name, "README.md", repo_type="dataset", revision=commit)
    return DatasetCard.load(path).data.get("license") if isinstance(path, str) else None


def load_dataset(repo_id: str, path: str, name: str | None, **options: Any) -> Rows:
    """Call `datasets.load_dataset`, with the reason in its errors.

    Raises:
        UserError: the dataset does not have this subset, or has several and none is set.
    """
    try:
        return datasets.load_dataset(path, name, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None  # the cause has the reason
    except ValueError as error:
        if name is None and "Config name is missing" not in str(error):
            raise
        subsets = datasets.get_dataset_config_names(path, revision=options.get("revision"))
        if name in subsets:
            raise
        found = f"has no subset {name!r}" if name else "has several subsets"
        raise UserError(
            f"dataset_name: {repo_id!r} {found}; set its subset (dataset_subset) to one of {', '.join(subsets)}"
        ) from None
