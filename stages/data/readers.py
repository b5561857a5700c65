"""Readers of JSON, JSONL, CSV and Parquet files, which may be compressed. Rows are streamed, one at a time."""

import codecs
import csv
import io
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from stages.data.examples import BadRowError
from stages.data.rows import ALLOWED, Row, RowParser
from stages.data.tables import read_batches
from stages.runtime.errors import UserError, user_errors

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}  # the names that pyarrow knows, except xz
DELIMITERS = (",", ";", "\t")
WHITESPACE = re.compile(r"[ \t\r\n]*")
CHARACTERS_PER_READ = 2**16
# Python refuses to parse integers of more than 4,300 digits. They become floats, so that they don't prevent the other
# fields from being read.
JSON = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) <= 4300 else float(digits))


def file_format(path: Path) -> str:
    """The suffix of a file's name without that of its compression, such as `.jsonl`."""
    name = Path(path.name.lower())
    return Path(name.stem if name.suffix in COMPRESSED else name).suffix


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """Open a file that may be compressed.

    Raises:
        UserError: the compressed data is damaged or incomplete.
    """
    compression = COMPRESSED.get(path.suffix.lower())
    if compression is None:
        with path.open("rb") as file:
            yield file
        return
    try:
        # pyarrow, because zstandard ends without an error where a file is cut off. pyarrow does not read xz.
        if compression == "xz":
            with lzma.open(path) as xz, io.BufferedReader(xz) as file:
                yield file
        else:
            with pa.input_stream(str(path), compression=compression) as stream, io.BufferedReader(stream) as file:
                yield file
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path}: can't be decompressed: {error}; copy or download it again") from None


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 file, or a UTF-16 file with its byte order mark. Line ends are not changed."""
    with open_binary(path) as file:
        head = file.peek(2)[:2]  # type: ignore[attr-defined]
        encoding = "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        yield io.TextIOWrapper(file, encoding, newline="\n")


def read_json(path: Path, slice_column: str, parser: RowParser) -> Iterator[Row]:
    """Read an array, one object per line, or other objects; the content decides, not the name of the file."""
    with open_binary(path) as file:
        # Without a byte order mark and the zeros of UTF-16. An array can be a single long line.
        is_array = file.read(4096).lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"[")
    if is_array:
        return read_json_array(path)
    with open_binary(path) as file:
        lines = (line.strip() for line in _decoded_lines(path, file) if line.strip())
        first, second = next(lines, ""), next(lines, "")
    if not second or first.endswith(("{", "[", ",", ":")):  # the first object continues
        return read_json_objects(path, parser)
    return read_json_lines(path)


def read_json_objects(path: Path, parser: RowParser) -> Iterator[Row]:
    """Read objects that span several lines, or the rows under a key of the only object. The file is read as a whole.

    Raises:
        UserError: it is not valid JSON, or has rows under several keys.
    """
    with open_binary(path) as file:
        text = "".join(_decoded_lines(path, file))
    values: list[Any] = []
    position = len(text) - len(text.lstrip())
    while position < len(text):
        try:
            value, end = JSON.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _json_error(path, error) from None
        except RecursionError:
            raise UserError(f"{path}: row {len(values) + 1} is nested too deeply; {ALLOWED}") from None
        values.append(value)
        position = WHITESPACE.match(text, end).end()  # type: ignore[union-attr]  # it matches the empty string
    if len(values) == 1 and isinstance(values[0], dict) and not parser.is_complete(values[0]):
        lists = {key: rows for key, rows in values[0].items() if isinstance(rows, list) and rows}
        if len(lists) > 1:
            raise UserError(f"{path}: has rows under the keys {', '.join(lists)}; keep one of these lists")
        values = next(iter(lists.values()), values)
    yield from enumerate(values, 1)


def _json_error(path: Path, error: json.JSONDecodeError) -> UserError:
    return UserError(f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}; fix that line")


def read_json_array(path: Path) -> Iterator[Row]:
    """Read the elements of an array one by one; memory grows with the longest element, not with the file.

    ijson can't be used because it replaces lone surrogates with question marks and fails on integers of 20 digits.
    """
    number = 0
    try:
        with open_text(path) as file:
            for number, element in enumerate(_array_elements(file), 1):
                yield number, element
    except RecursionError:
        raise UserError(f"{path}: row {number + 1} is nested too deeply; {ALLOWED}") from None
    except (ValueError, IndexError):
        # Parse the whole file to find the line; it takes memory only in this error case.
        with open_binary(path) as again:
            text = "".join(_decoded_lines(path, again))
        try:
            JSON.decode(text)
        except json.JSONDecodeError as error:
            raise _json_error(path, error) from None
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
    with open_binary(path) as file:
        for number, line in enumerate(_decoded_lines(path, file), 1):
            if line.strip():
                try:
                    yield number, JSON.decode(line.rstrip("\r\n"))
                except (json.JSONDecodeError, RecursionError) as error:
                    yield number, BadRowError("bad_json", f"{path}:{number}: not valid JSON: {error}")


def read_csv(path: Path, slice_column: str, parser: RowParser) -> Iterator[Row]:
    """Read a file with a header, separated by commas, semicolons or tabs: those of which the header has the most.

    A row with more fields than the header gives a `BadRowError`.
    """
    csv.field_size_limit(sys.maxsize)
    with open_binary(path) as file:
        lines = _decoded_lines(path, file)
        header = next(lines, "")
        reader = csv.DictReader(chain([header], lines), delimiter=max(DELIMITERS, key=header.count), strict=True)
        try:
            parser.require_columns(path, reader.fieldnames or ())
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


def _decoded_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    """Decode the lines of a UTF-8 file, or of a UTF-16 file with a byte order mark; without these marks."""
    if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # type: ignore[attr-defined]
        with user_errors(path, "save the file as UTF-8 and run again"):
            yield from io.TextIOWrapper(file, "utf-16", newline="\n")
        return
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            message = f"{path}:{number}: not UTF-8: found byte 0x{byte:02x}; save the file as UTF-8 and run again"
            raise UserError(message) from None


def read_parquet(path: Path, slice_column: str, parser: RowParser) -> Iterator[Row]:
    """Read all columns, except binary ones that nothing needs, such as images; they have an empty text in each row."""
    with user_errors(path):
        schema = pq.read_schema(path)
        names = schema.names
        parser.require_columns(path, names)
        is_binary = {column.name: "binary" in str(column.type) for column in schema}
        columns = [name for name in names if name == slice_column or parser.reads(name) or not is_binary[name]]
        unread = dict.fromkeys((name for name in names if name not in columns), "")
        rows = (row for batch in read_batches(path, columns) for row in batch.to_pylist())
        yield from enumerate((without_nulls(row) | unread for row in rows), 1)


def without_nulls(value: Any) -> Any:
    """A row without nulls inside its lists and objects. In Arrow, all objects of a list have the same keys."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value


# By the suffix of the file's name. The rows are numbered from 1 in each file.
READERS: dict[str, Callable[[Path, str, RowParser], Iterator[Row]]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
