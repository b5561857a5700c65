"""Readers of JSON and JSON Lines files. Rows are streamed, except those under a key and those in columns."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from stages.data.examples import BadRowError
from stages.rows.row_parser import ALLOWED, MEANINGS, Row, RowParser
from stages.rows.strict_json import JSON, checked
from stages.rows.text_files import decoded_lines, open_binary, open_text
from stages.runtime.errors import UserError, user_errors

WHITESPACE = re.compile(r"[ \t\r\n]*")
CHARACTERS_PER_READ = 2**16


def read_json(path: Path, slice_column: str, parser: RowParser) -> Iterator[Row]:
    """Read an array, one object per line, or other objects; the content decides, not the name of the file."""
    with open_binary(path) as file:
        # Without a byte order mark and the zeros of UTF-16. An array can be a single long line.
        is_array = file.read(4096).lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"[")
    if is_array:
        return read_json_array(path)
    with open_binary(path) as file:
        lines = (line.strip() for line in decoded_lines(path, file) if line.strip())
        first, second = next(lines, ""), next(lines, "")
    if not second or first.endswith(("{", "[", ",", ":")) or second.startswith((",", "}", "]", ":")):  # it continues
        return read_json_objects(path, parser)
    return read_json_lines(path)


def read_json_objects(path: Path, parser: RowParser) -> Iterator[Row]:
    """Read objects that span several lines, or the rows under a key of the only object. The file is read as a whole.

    Raises:
        UserError: it is not valid JSON, or has rows under several keys.
    """
    with open_binary(path) as file:
        text = "".join(decoded_lines(path, file))
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
    if len(values) == 1 and isinstance(values[0], dict) and values[0]:
        values = _rows_of(path, values[0], parser)
    yield from enumerate(map(checked, values), 1)


def _rows_of(path: Path, table: dict[str, Any], parser: RowParser) -> list[Any]:
    """The rows of the only object of a file: rows under a key or an index, columns, or the object itself."""
    if parser.is_complete(table):
        return _rows_of_columns(path, table, parser)
    if table.keys() == {"columns", "index", "data"}:  # pandas, orient="split"
        with user_errors(path, "write one object for each row"):
            parser.require_columns(path, table["columns"])
            return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    objects = [row for row in table.values() if isinstance(row, dict | BadRowError)]
    if len(objects) == len(table) and any(parser.is_complete(row) for row in objects if isinstance(row, dict)):
        return objects  # pandas, orient="index"
    if all(rows == [] for rows in table.values()):
        return []
    lists = {key: rows for key, rows in table.items() if isinstance(rows, list) and rows}
    if len(lists) > 1:
        raise UserError(f"{path}: has rows under the keys {', '.join(lists)}; keep one of these lists")
    return next(iter(lists.values()), [table])


def _rows_of_columns(path: Path, table: dict[str, Any], parser: RowParser) -> list[Any]:
    """The rows of columns, which are lists, or objects with the row numbers as keys, as pandas writes them."""
    names, columns = parser.find_columns(table)
    schema = {name: table[columns[name]] for name in names}
    first_name = columns[names[0]]
    first = table[first_name]
    if not (
        all(isinstance(column, dict) for column in schema.values())
        or all(isinstance(column, list) and not _is_conversation(name, column) for name, column in schema.items())
    ):
        return [table]
    for name, column in table.items():
        same_rows = type(column) is type(first) and len(column) == len(first)
        if not same_rows or (isinstance(first, dict) and column.keys() != first.keys()):
            raise UserError(
                f"{path}: columns {first_name!r} and {name!r} have different rows; each must have a value for each row"
            )
    keys = first if isinstance(first, dict) else range(len(first))
    return [{name: column[key] for name, column in table.items()} for key in keys]


def _is_conversation(name: str, column: list[Any]) -> bool:
    """Whether a list in a column of a schema is the messages of one row, and not the values of several rows."""
    if MEANINGS[name] != "messages":
        return any(isinstance(part, dict) for part in column)
    return not column or not all(
        isinstance(part, list) and all(isinstance(message, dict) for message in part) for part in column
    )


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
                yield number, checked(element)
    except RecursionError:
        raise UserError(f"{path}: row {number + 1} is nested too deeply; {ALLOWED}") from None
    except (ValueError, IndexError):
        # Parse the whole file to find the line; it takes memory only in this error case.
        with open_binary(path) as again:
            text = "".join(decoded_lines(path, again))
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
        for number, line in enumerate(decoded_lines(path, file), 1):
            if line.strip():
                try:
                    yield number, checked(JSON.decode(line.rstrip("\r\n")))
                except (json.JSONDecodeError, RecursionError) as error:
                    yield number, BadRowError("bad_json", f"{path}:{number}: not valid JSON: {error}")
