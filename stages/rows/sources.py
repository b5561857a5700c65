"""The sources of rows: files, folders and Hub datasets."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.data.files import read_json
from stages.rows.readers import READERS, without_nulls
from stages.rows.row_parser import ALLOWED, Row, RowParser
from stages.rows.text_files import COMPRESSED, TEXT_FORMATS, file_format
from stages.runtime.errors import UserError, user_errors
from stages.runtime.param_types import DatasetParams
from stages.runtime.params import DownloadDatasetParams
from stages.text import printable

OTHER_DATASET = "use another dataset, one with JSON, CSV or Parquet files"
GLOB = re.compile(r"[*?\[]")
FORMATS = (
    f"must end in {', '.join(TEXT_FORMATS)} (or these with {', '.join(COMPRESSED)}, .zip), "
    f"{', '.join(name for name in READERS if name not in TEXT_FORMATS)}, or be a folder of such files"
)
# What to do with files that hold data in other formats. They are never skipped in a folder.
WAYS_OUT = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack the archive"),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "save the sheet as CSV"),
    **dict.fromkeys(
        (".pkl", ".pickle"), "load it where it was written, and save it as Parquet; pickles are never loaded"
    ),
}
OTHER_WAYS_OUT = WAYS_OUT | {
    ".txt": 'name it after its format, or write plain text as JSON Lines: {"text": "..."}',
    **dict.fromkeys((".yaml", ".yml", ".toml", ".xml"), "convert it to JSON"),
}


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
    if params.dataset_name is None:
        return [open_files(Path(params.dataset_file), params.slice_column, RowParser(params.dataset_columns))]
    entry = DatasetParams(
        name=params.dataset_name,
        revision=params.dataset_revision,
        subset=params.dataset_subset,
        split=params.dataset_split,
        columns=params.dataset_columns,
    )
    return [open_hub(entry, streaming=params.max_examples is not None)]  # it may be larger than the disk


def open_retention(params: DownloadDatasetParams) -> Source | None:
    """The retention set; None if its file is empty."""
    path = Path(params.retention_file)
    if path.is_file() and not path.stat().st_size:
        return None
    return open_files(path, params.slice_column, RowParser(), "retention", "retention_file")


def open_dataset(entry: DatasetParams, params: DownloadDatasetParams) -> Source:
    """Open one dataset of a mixture. The files are in a folder, which DVC hashes as a whole."""
    if entry.file is None:
        return open_hub(entry)
    folder = Path(params.dataset_file)
    if not folder.is_dir():
        raise UserError(
            f"dataset_file: found {str(folder)!r}; must be the folder of the files in `datasets`, so that DVC notices "
            "when one of them changes"
        )
    return open_files(folder / entry.file, params.slice_column, RowParser(entry.columns), entry.use)


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
        offset = 0
        for file in files:
            number = 0
            for number, row in read(file, slice_column, parser):
                yield offset + number, row
            offset += number

    return Source(str(path), rows, {"source": str(path), "revision": None, "license": None}, parser, use)


def find_files(path: Path, parameter: str) -> list[Path]:
    """The files of a dataset, which all have the same format.

    Raises:
        UserError: there is none, or they have several formats.
    """
    if path.is_dir():
        if shards := _saved_shards(path):
            return shards
        files = [file for file in path.rglob("*") if file.is_file()]
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        for file in sorted(files):
            if way_out := WAYS_OUT.get(file_format(file)):
                raise UserError(f"{file}: is in a folder of data; {way_out}, or move it out of the folder")
        files = [file for file in files if file_format(file) in READERS] or files
    elif path.is_file():
        files = [path]
    elif GLOB.search(path.name):
        files = [file for file in path.parent.glob(path.name) if not file.name.startswith(".") and file.is_file()]
    else:
        hub = "a Hub dataset in dataset_name" if parameter == "dataset_file" else "a dataset with `use: retention`"
        raise UserError(f"{parameter}: {str(path)!r} is not a file or folder; name one, or {hub}")
    files.sort()
    formats = sorted({file_format(file) for file in files})
    if not files or not set(formats) <= READERS.keys():
        ways_out = [OTHER_WAYS_OUT[name] for name in formats if name in OTHER_WAYS_OUT]
        raise UserError("; ".join([f"{parameter}: found {str(path)!r}", FORMATS, *ways_out[:1]]))
    if len(formats) > 1:
        raise UserError(f"{path}: has {' and '.join(formats)} files; keep one format, or list the files in `datasets`")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file}: is empty; {ALLOWED}")
        if formats[0] not in TEXT_FORMATS and file.suffix.lower() in COMPRESSED:
            raise UserError(f"{file}: {formats[0]} files are compressed inside; decompress it")
    return files


def _saved_shards(folder: Path) -> list[Path]:
    """The files of a dataset that `save_to_disk` of datasets wrote, in their order; none for another folder."""
    saved = sorted({file.parent for file in folder.rglob("*.arrow") if file.with_name("state.json").is_file()})
    if saved == [folder]:
        with user_errors(folder / "state.json"):
            shards = [folder / shard["filename"] for shard in read_json(folder / "state.json")["_data_files"]]
        for shard in shards:
            if not shard.is_file():
                raise UserError(f"{shard}: is missing; copy the folder again, with the files that state.json names")
        return shards
    if saved:
        names = ", ".join(map(str, saved))
        raise UserError(f"{folder}: has datasets of save_to_disk; name one of {names}, or list them in `datasets`")
    return []


def open_hub(entry: DatasetParams, streaming: bool = False) -> Source:
    """Open a Hub dataset. Its metadata has the license, and the commit that the revision resolves to.

    Args:
        streaming: read the rows from the Hub as they are needed, and store nothing.

    Raises:
        UserError: the dataset can't be downloaded or read, or lacks a column.
    """
    from stages.rows.hub_datasets import load
    from stages.runtime.hub import hub_errors

    name, parser = str(entry.name), RowParser(entry.columns)
    where = f"dataset_name: {name!r}"
    if Path(name).exists():  # load_dataset would prefer the local path to the Hub
        raise UserError(f"{where} is also a local path; rename that path, or set dataset_file to a file")
    with user_errors(where, OTHER_DATASET), hub_errors("dataset_name", name, entry.revision):
        dataset, commit, license_id = load(entry, streaming)
    if dataset.column_names is not None:  # a stream may not know them
        parser.require_columns(name, dataset.column_names)
    license_id = ", ".join(map(str, license_id)) if isinstance(license_id, list) else license_id
    license_id = license_id and printable(str(license_id))
    metadata = {"source": name, "subset": entry.subset, "split": entry.split, "revision": commit, "license": license_id}
    choices = (entry.subset, entry.data_files, entry.split if entry.split != "train" else None)
    details = ", ".join(choice for choice in choices if choice)
    label = f"{name} ({details})" if details else name
    return Source(label, lambda: _hub_rows(name, entry.revision, dataset), metadata, parser, entry.use)


def _hub_rows(name: str, revision: str | None, dataset: Iterable[dict[str, Any]]) -> Iterator[Row]:
    from stages.runtime.hub import hub_errors

    with user_errors(f"dataset_name: {name!r}", OTHER_DATASET), hub_errors("dataset_name", name, revision):
        yield from enumerate(map(without_nulls, dataset), 1)
