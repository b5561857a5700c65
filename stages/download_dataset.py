"""A local file or a Hub dataset → `data/raw.parquet`, rows that can't be read → `data/unreadable.parquet`.

Where it came from is written to `data/source.json`. Rows stream through: memory does not grow with their number.
"""

import codecs
import csv
import json
import re
import reprlib
import sys
import textwrap
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq

from stages.shared.errors import UserError, reading
from stages.shared.examples import LEFT_OUT, RAW
from stages.shared.files import ROWS_PER_GROUP, file_sha256, parquet_writer, read_batches, write_json
from stages.shared.params import DownloadDatasetParams, load_params
from stages.shared.run import run
from stages.shared.terminal import bar, summary
from stages.shared.text import printable

FIELDS = ("instruction", "input", "output")
REQUIRED = ("instruction", "output")
ALLOWED = "every row needs 'instruction' and 'output', and may have 'input', all of them text"
OTHER_DATASET = "use another dataset, one with JSON, CSV or Parquet files"
WHITE_SPACE = re.compile(r"[ \t\r\n]*")
CHARACTERS_AT_ONCE = 2**16
# Integers of thousands of digits are an error to Python, and no text anyway: what stands beside them shall be read.
JSON = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))


class BadRowError(Exception):
    """A row that can't be read. It goes to the ledger, the others go on."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


# A row's number in its source, from 1, and its fields by name or why there are none.
Row = tuple[int, dict[str, Any] | BadRowError]


def main() -> None:
    params = load_params(DownloadDatasetParams)
    if params.dataset_name is None:
        path = Path(params.dataset_file)
        rows = read_file(path)
        source: dict[str, Any] = {"source": str(path), "revision": f"sha256:{file_sha256(path)}", "licence": None}
    else:
        rows, source = read_hub(params.dataset_name, params.dataset_revision, params.dataset_split)

    with (
        parquet_writer(Path("data/raw.parquet"), RAW) as raw,
        parquet_writer(Path("data/unreadable.parquet"), LEFT_OUT) as unreadable,
    ):
        rows = iter(bar(islice(rows, params.max_examples), "read", "row", params.max_examples))
        while batch := list(islice(rows, ROWS_PER_GROUP)):
            readable, bad = [], []
            for source_row, row in batch:
                try:
                    readable.append({**read_fields(row), "source_row": source_row})
                except BadRowError as error:
                    bad.append({"source_row": source_row, "reason": error.reason, "detail": str(error)})
            raw.write(readable)
            unreadable.write(bad)
        num_rows = raw.num_rows + unreadable.num_rows
        if num_rows == 0:
            raise UserError(f"{source['source']}: found no rows; {ALLOWED}")
    write_json(Path("data/source.json"), {**source, "rows": num_rows})
    summary(
        {"source": source["source"], "rows": f"{raw.num_rows:,} read, {unreadable.num_rows:,} unreadable"},
        wrote=["data/raw.parquet", "data/unreadable.parquet", "data/source.json"],
        then="dvc repro format; then python -m stages.format --show 3",
    )


def read_fields(row: dict[str, Any] | BadRowError) -> dict[str, str]:
    """instruction, input and output of one row.

    Raises:
        BadRowError: a field is missing or is no Unicode text.
    """
    if isinstance(row, BadRowError):
        raise row
    if not isinstance(row, dict):
        raise BadRowError("not_an_object", f"found {_shown(row)}; {ALLOWED}")
    fields = {}
    for name in FIELDS:
        value = row.get(name)
        if value is None and name in REQUIRED:
            raise BadRowError("missing_field", f"{name!r} is missing; {ALLOWED}")
        if value is None:
            value = ""
        if not isinstance(value, str):
            raise BadRowError("not_text", f"{name!r} is {_shown(value)}; {ALLOWED}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRowError("not_unicode", f"{name!r} has half a surrogate pair at character {error.start}") from None
        fields[name] = value
    return fields


def _shown(value: object) -> str:
    return f"{type(value).__name__} {reprlib.repr(value).encode('ascii', 'backslashreplace').decode():.60}"


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a JSON, JSONL, CSV or Parquet file.

    Raises:
        UserError: the file as a whole can't be read: not there, another format or encoding, a column missing.
    """
    readers = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".parquet": read_parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"dataset_file: found {str(path)!r}; must end in {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"dataset_file: {str(path)!r} is not a file; name one, or a Hub dataset in dataset_name")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty; {ALLOWED}")
    return readers[path.suffix.lower()](path)


def read_json(path: Path) -> Iterator[Row]:
    """One array of objects, or an object a line: told apart by the first character, whatever the file's name."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return read_json_array(path) if head.startswith(b"[") else read_json_lines(path)


def read_json_array(path: Path) -> Iterator[Row]:
    """The elements of an array one by one, so that memory holds the longest and not all of them.

    Not with ijson: its parser turns half a surrogate pair into a question mark, and ends at an integer of 20 digits.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, element in enumerate(_array_elements(file), 1):
                yield number, element
    except RecursionError:
        raise UserError(f"{path}: row {number + 1} is nested too deep; {ALLOWED}") from None
    except (ValueError, IndexError):
        # Where it is in the file is found by reading all of it again, which costs memory only on the way out.
        with path.open("rb") as again:
            text = "".join(_decoded_lines(path, again))
        try:
            JSON.decode(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}; mend that line"
            ) from None
        raise


def _array_elements(file: TextIO) -> Iterator[Any]:
    text, at = file.read(CHARACTERS_AT_ONCE).lstrip().removeprefix("["), 0
    empty = True
    while True:
        try:
            start = WHITE_SPACE.search(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if empty and text[start] == "]":
                after = start
                break
            element, end = JSON.raw_decode(text, start)
            after = WHITE_SPACE.search(text, end).end()  # type: ignore[union-attr]
            separator = text[after]
            if separator not in ",]":  # what is here of a number may be its beginning
                raise json.JSONDecodeError("Expecting ',' delimiter", text, after)
        except (json.JSONDecodeError, IndexError):
            # More of the file makes it whole, or it is wrong.
            if not (more := file.read(max(len(text) - at, CHARACTERS_AT_ONCE))):
                raise
            text, at = text[at:] + more, 0
            continue
        yield element
        empty = False
        if separator == "]":
            break
        at = after + 1
    if text[after + 1 :].strip() or file.read().strip():
        raise json.JSONDecodeError("Extra data", text, after)


def read_json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _wrong_encoding(path, number, error) from None
            if text.strip():
                try:
                    yield number, JSON.decode(text.rstrip("\r\n"))
                except (json.JSONDecodeError, RecursionError) as error:
                    yield number, BadRowError("bad_json", f"{path}:{number}: not valid JSON: {error}")


def read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open("rb") as file:
        reader = csv.DictReader(_decoded_lines(path, file), strict=True)
        try:
            _require_columns(path, reader.fieldnames or ())
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
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _wrong_encoding(path, number, error) from None


def read_parquet(path: Path) -> Iterator[Row]:
    with reading(path):
        schema = pq.read_schema(path)
        _require_columns(path, schema.names)
        columns = [name for name in schema.names if name in FIELDS]
        rows = (row for batch in read_batches(path, columns) for row in batch.to_pylist())
        yield from enumerate(rows, 1)


def read_hub(name: str, revision: str | None, split: str) -> tuple[Iterator[Row], dict[str, Any]]:
    """The rows of a Hub dataset, and where they came from: the revision resolved to a commit, the licence."""
    import datasets
    from huggingface_hub import HfApi

    from stages.shared.hub import hub_errors

    where = f"dataset_name: {name!r}"
    if Path(name).exists():  # load_dataset would read that, whatever the Hub has
        raise UserError(f"{where} is also a path here; rename that, or name a file in dataset_file")
    with reading(where, OTHER_DATASET), hub_errors("dataset_name", name, revision):
        info = HfApi().dataset_info(name, revision=revision)
        try:
            dataset = datasets.load_dataset(name, revision=info.sha, split=split)
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ or error from None
        licence = info.card_data.get("license") if info.card_data else None
        licence = ", ".join(map(str, licence)) if isinstance(licence, list) else licence
    _require_columns(name, dataset.column_names)
    source = {"source": name, "split": split, "revision": info.sha, "licence": licence and printable(str(licence))}
    return _numbered(where, dataset), source


def _numbered(where: str, dataset: Iterable[dict[str, Any]]) -> Iterator[Row]:
    with reading(where, OTHER_DATASET):
        yield from enumerate(dataset, 1)


def _require_columns(where: object, columns: Iterable[str]) -> None:
    names = list(columns)
    for name in FIELDS:
        if name in REQUIRED and name not in names:
            found = textwrap.shorten(", ".join(names), 300, placeholder=" ...") or "none"
            raise UserError(f"{where}: column {name!r} is missing; found {found}; {ALLOWED}")
        if names.count(name) > 1:
            raise UserError(f"{where}: column {name!r} is there {names.count(name)} times; keep one of them")


def _wrong_encoding(path: Path, line: int, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(f"{path}:{line}: not UTF-8: found byte 0x{byte:02x}; save the file as UTF-8 and run again")


if __name__ == "__main__":
    run(main)
