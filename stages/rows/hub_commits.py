"""Find commits and their files on the Hub, or in its client's cache."""

import re
from json import JSONDecodeError
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, get_cached_repo_tree, is_offline_mode, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError

COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_commit(repo_type: str, repo_id: str, revision: str | None) -> str:
    """The commit of a revision on the Hub; from the cache if HF_HUB_OFFLINE is set."""
    api, offline = HfApi(), is_offline_mode()
    try:
        if not (offline or COMMIT.fullmatch(revision or "")):  # `resolve_revision` would use the cache if this fails
            api.repo_info(repo_id, repo_type=repo_type, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        resolved = api.resolve_revision(repo_id, repo_type=repo_type, revision=revision, local_files_only=offline)
    except JSONDecodeError:
        raise httpx2.ProxyError("the answer is not JSON") from None
    return resolved.resolved


def list_model_files(repo_id: str, commit: str) -> list[str]:
    """The names of a model's files, from the cache if they are known there."""
    try:
        return [file.path for file in get_cached_repo_tree(repo_id, revision=commit)]
    except CachedRepoTreeNotFoundError:
        if is_offline_mode():  # another library may have filled the cache
            return [path.name for path in Path(snapshot_download(repo_id, revision=commit)).iterdir()]
    info = HfApi().model_info(repo_id, revision=commit, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return [entry.rfilename for entry in info.siblings or []]
