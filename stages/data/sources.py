"""The sources of rows: files, folders and Hub datasets."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.data.readers import COMPRESSED, READERS, file_format, without_nulls
from stages.data.rows import ALLOWED, Row, RowParser
from stages.runtime.errors import UserError, user_errors
from stages.runtime.param_types import DatasetParams
from stages.runtime.params import DownloadDatasetParams
from stages.runtime.text import printable

OTHER_DATASET = "use another dataset, one with JSON, CSV or Parquet files"
GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Source:
    """One dataset.

    name: the file, the folder or the Hub id.
    rows: returns a new iterator over all rows at each call.
    metadata: the content of `data/source.json`.
    parser: parses its rows.
    use: the split that its rows belong to, or None.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    metadata: dict[str, Any]
    parser: RowParser
    use: str | None = None


def open_sources(params: DownloadDatasetParams) -> list[Source]:
    """The datasets: those of the parameter `datasets`, or else the one of the other parameters."""
    if params.datasets is not None:
        return [open_dataset(entry, params) for entry in params.datasets]
    parser = RowParser(params.dataset_columns)
    if params.dataset_name is None:
        return [open_files(Path(params.dataset_file), params.slice_column, parser)]
    streaming = params.max_examples is not None  # so the dataset may be larger than the disk
    revision, split, subset = params.dataset_revision, params.dataset_split, params.dataset_subset
    return [open_hub(params.dataset_name, revision, split, parser, subset, streaming=streaming)]


def open_retention(params: DownloadDatasetParams) -> Source | None:
    """The retention set; None if its file is empty."""
    path = Path(params.retention_file)
    if path.is_file() and not path.stat().st_size:
        return None
    return open_files(path, params.slice_column, RowParser(), "retention", "retention_file")


def open_dataset(entry: DatasetParams, params: DownloadDatasetParams) -> Source:
    """Open one dataset of a mixture. The files are in a folder, which DVC hashes as a whole."""
    folder, parser = Path(params.dataset_file), RowParser(entry.columns)
    if entry.file is None:
        name, subset, data_files = str(entry.name), entry.subset, entry.data_files
        return open_hub(name, entry.revision, entry.split, parser, subset, data_files, entry.use)
    if not folder.is_dir():
        raise UserError(
            f"dataset_file: found {str(folder)!r}; must be the folder of the files in `datasets`, so that DVC notices "
            "when one of them changes"
        )
    return open_files(folder / entry.file, params.slice_column, parser, entry.use)


def open_files(
    path: Path, slice_column: str, parser: RowParser, use: str | None = None, parameter: str = "dataset_file"
) -> Source:
    """Open a file, or the files of a folder or a glob as one dataset.

    Args:
        slice_column: a column to read in addition to those of the schemas.
        parameter: the one that names the file.

    Raises:
        UserError: there is no such file, it has another format or encoding, or it lacks a column.
    """
    files = find_files(path, parameter)
    read = READERS[file_format(files[0])]

    def rows() -> Iterator[Row]:
        offset = number = 0
        for file in files:
            for number, row in read(file, slice_column, parser):
                yield offset + number, row
            offset += number

    return Source(str(path), rows, {"source": str(path), "revision": None, "licence": None}, parser, use)


def find_files(path: Path, parameter: str) -> list[Path]:
    """The files of a dataset, which all have the same format.

    Raises:
        UserError: there is none, or they have several formats.
    """
    if path.is_dir():
        files = [file for file in path.rglob("*") if file_format(file) in READERS]
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    elif path.is_file():
        files = [path]
    elif GLOB.search(path.name):
        files = [file for file in path.parent.glob(path.name) if not file.name.startswith(".")]
    else:
        hub = "a Hub dataset in dataset_name" if parameter == "dataset_file" else "a dataset with `use: retention`"
        raise UserError(f"{parameter}: {str(path)!r} is not a file or folder; name one, or {hub}")
    files = sorted(file for file in files if file.is_file())
    formats = sorted({file_format(file) for file in files})
    if not files or not set(formats) <= READERS.keys():
        raise UserError(
            f"{parameter}: found {str(path)!r}; must end in {', '.join(READERS)} (or these with "
            f"{', '.join(COMPRESSED)}), or be a folder of such files"
        )
    if len(formats) > 1:
        raise UserError(f"{path}: has {' and '.join(formats)} files; keep one format, or list the files in `datasets`")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file}: is empty; {ALLOWED}")
    return files


def open_hub(
    name: str,
    revision: str | None,
    split: str,
    parser: RowParser,
    subset: str | None = None,
    data_files: str | None = None,
    use: str | None = None,
    streaming: bool = False,
) -> Source:
    """Open a Hub dataset. Its metadata has the license, and the commit that the revision resolves to.

    Args:
        subset: its configuration, if it has several.
        data_files: a glob of files in its repository, instead of those that its card names.
        streaming: read the rows from the Hub as they are needed, and store nothing.

    Raises:
        UserError: the dataset can't be downloaded or read, or lacks a column.
    """
    from stages.data.hub_datasets import load
    from stages.runtime.hub import hub_errors

    where = f"dataset_name: {name!r}"
    if Path(name).exists():  # load_dataset would prefer the local path to the Hub
        raise UserError(f"{where} is also a local path; rename that path, or set dataset_file to a file")
    with user_errors(where, OTHER_DATASET), hub_errors("dataset_name", name, revision):
        dataset, commit, license_id = load(name, revision, subset, split, data_files, streaming)
    if dataset.column_names is not None:  # a stream may not know them
        parser.require_columns(name, dataset.column_names)
    license_id = ", ".join(map(str, license_id)) if isinstance(license_id, list) else license_id
    license_id = license_id and printable(str(license_id))
    metadata = {"source": name, "subset": subset, "split": split, "revision": commit, "licence": license_id}
    details = [detail for detail in (subset, data_files, split if split != "train" else None) if detail]
    label = f"{name} ({', '.join(details)})" if details else name
    return Source(label, lambda: _hub_rows(name, revision, dataset), metadata, parser, use)


def _hub_rows(name: str, revision: str | None, dataset: Iterable[dict[str, Any]]) -> Iterator[Row]:
    from stages.runtime.hub import hub_errors

    with user_errors(f"dataset_name: {name!r}", OTHER_DATASET), hub_errors("dataset_name", name, revision):
        yield from enumerate(map(without_nulls, dataset), 1)
