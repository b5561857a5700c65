"""Readers for JSON, JSONL, CSV and Parquet files and Hub datasets. Rows are streamed, one at a time."""

import codecs
import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq

from stages.data.examples import BadRowError
from stages.data.rows import ALLOWED, SCHEMAS, Row, require_columns
from stages.data.tables import read_batches
from stages.runtime.errors import UserError, user_errors
from stages.runtime.text import printable

OTHER_DATASET = "use another dataset, one with JSON, CSV or Parquet files"
WHITESPACE = re.compile(r"[ \t\r\n]*")
CHARACTERS_PER_READ = 2**16
# Python refuses to parse integers of more than 4,300 digits. Long integers become floats, so that they don't prevent
# the other fields from being read.
JSON = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))


@dataclass(frozen=True)
class Source:
    """One dataset.

    name: the file or the Hub id.
    rows: returns a new iterator over all rows at each call.
    metadata: the content of `data/source.json`.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    metadata: dict[str, Any]


def open_file(path: Path, slice_column: str) -> Source:
    """Open a JSON, JSONL, CSV or Parquet file.

    Args:
        slice_column: a column to read in addition to those of the schemas.

    Raises:
        UserError: the file is missing, has another format or encoding, or lacks a column.
    """
    readers = {".json": read_json, ".jsonl": read_json, ".csv": read_csv}
    readers[".parquet"] = partial(read_parquet, slice_column=slice_column)
    if path.suffix.lower() not in readers:
        raise UserError(f"dataset_file: found {str(path)!r}; must end in {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"dataset_file: {str(path)!r} is not a file; name a file, or a Hub dataset in dataset_name")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty; {ALLOWED}")
    read = readers[path.suffix.lower()]
    return Source(str(path), lambda: read(path), {"source": str(path), "revision": None, "licence": None})


def read_json(path: Path) -> Iterator[Row]:
    """Read an array of objects or one object per line; the first character decides, not the file name."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return read_json_array(path) if head.startswith(b"[") else read_json_lines(path)


def read_json_array(path: Path) -> Iterator[Row]:
    """Read the elements of an array one by one; memory grows with the longest element, not with the file.

    ijson can't be used because it replaces lone surrogates with question marks and fails on integers of 20 digits.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, element in enumerate(_array_elements(file), 1):
                yield number, element
    except RecursionError:
        raise UserError(f"{path}: row {number + 1} is nested too deeply; {ALLOWED}") from None
    except (ValueError, IndexError):
        # Parse the whole file to find the line; it takes memory only in this error case.
        with path.open("rb") as again:
            text = "".join(_decoded_lines(path, again))
        try:
            JSON.decode(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}; fix that line"
            ) from None
        raise


def _array_elements(file: TextIO) -> Iterator[Any]:
    """Parse the elements of the array in a buffer that is refilled when it ends inside an element.

    Raises:
        ValueError, IndexError: the file is not valid JSON.
    """
    text, position = file.read(CHARACTERS_PER_READ).lstrip().removeprefix("["), 0
    is_first = True
    while True:
        try:
            start = WHITESPACE.search(text, position).end()  # type: ignore[union-attr]  # it matches the empty string
            if is_first and text[start] == "]":
                after = start
                break
            element, end = JSON.raw_decode(text, start)
            after = WHITESPACE.search(text, end).end()  # type: ignore[union-attr]
            separator = text[after]
            if separator not in ",]":  # a number may continue in the next characters of the file
                raise json.JSONDecodeError("Expecting ',' delimiter", text, after)
        except (json.JSONDecodeError, IndexError):
            # Either the element continues, or the file is not valid JSON. Doubling the buffer each time keeps the time
            # for a long element, which is parsed again, linear in its length.
            if not (more := file.read(max(len(text) - position, CHARACTERS_PER_READ))):
                raise
            text, position = text[position:] + more, 0
            continue
        yield element
        is_first = False
        if separator == "]":
            break
        position = after + 1
    if text[after + 1 :].strip() or file.read().strip():
        raise json.JSONDecodeError("Extra data", text, after)


def read_json_lines(path: Path) -> Iterator[Row]:
    """Read one value per line. Blank lines are skipped; a line that is not valid JSON gives a `BadRowError`."""
    with path.open("rb") as file:
        for number, line in enumerate(_decoded_lines(path, file), 1):
            if line.strip():
                try:
                    yield number, JSON.decode(line.rstrip("\r\n"))
                except (json.JSONDecodeError, RecursionError) as error:
                    yield number, BadRowError("bad_json", f"{path}:{number}: not valid JSON: {error}")


def read_csv(path: Path) -> Iterator[Row]:
    """Read a file with a header. A row with more fields than the header gives a `BadRowError`."""
    csv.field_size_limit(sys.maxsize)
    with path.open("rb") as file:
        reader = csv.DictReader(_decoded_lines(path, file), strict=True)
        try:
            require_columns(path, reader.fieldnames or ())
            for number, row in enumerate(reader, 1):
                if None in row:
                    width = len(reader.fieldnames or ())
                    yield (
                        number,
                        BadRowError("extra_fields", f"line {reader.line_num}: more than the header's {width} fields"),
                    )
                else:
                    yield number, row
        except csv.Error as error:
            raise UserError(
                f'{path}:{reader.line_num + 1}: not valid CSV: {error}; quote fields with " and double it inside'
            ) from None


def _decoded_lines(path: Path, file: Iterable[bytes]) -> Iterator[str]:
    """Decode UTF-8 lines, without the byte order mark that the first one may have."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            message = f"{path}:{number}: not UTF-8: found byte 0x{byte:02x}; save the file as UTF-8 and run again"
            raise UserError(message) from None


def read_parquet(path: Path, slice_column: str) -> Iterator[Row]:
    """Read the columns of all schemas and the slice column, and no others."""
    with user_errors(path):
        names = pq.read_schema(path).names
        require_columns(path, names)
        columns = [name for name in names if name == slice_column or any(name in schema for schema in SCHEMAS)]
        rows = (row for batch in read_batches(path, columns) for row in batch.to_pylist())
        yield from enumerate(rows, 1)


def open_hub(name: str, revision: str | None, split: str) -> Source:
    """Open a Hub dataset. Its metadata has the license, and the commit that the revision resolves to.

    Raises:
        UserError: the dataset can't be downloaded or read, or lacks a column.
    """
    import datasets
    from huggingface_hub import HfApi

    from stages.runtime.hub import hub_errors

    where = f"dataset_name: {name!r}"
    if Path(name).exists():  # load_dataset would prefer the local path to the Hub
        raise UserError(f"{where} is also a local path; rename that path, or set dataset_file to a file")
    with user_errors(where, OTHER_DATASET), hub_errors("dataset_name", name, revision):
        info = HfApi().dataset_info(name, revision=revision)
        try:
            dataset = datasets.load_dataset(name, revision=info.sha, split=split)
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ or error from None  # the cause has the reason
        license_id = info.card_data.get("license") if info.card_data else None
        license_id = ", ".join(map(str, license_id)) if isinstance(license_id, list) else license_id
    require_columns(name, dataset.column_names)
    license_id = license_id and printable(str(license_id))
    metadata = {"source": name, "split": split, "revision": info.sha, "licence": license_id}
    return Source(name, lambda: _hub_rows(where, dataset), metadata)


def _hub_rows(where: str, dataset: Iterable[dict[str, Any]]) -> Iterator[Row]:
    with user_errors(where, OTHER_DATASET):
        yield from enumerate(dataset, 1)
