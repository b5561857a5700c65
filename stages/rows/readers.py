"""Readers of Parquet and Arrow files, and the reader of each format. Rows are streamed."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.data.tables import ROWS_PER_GROUP, read_batches
from stages.rows.csv_rows import read_csv
from stages.rows.json_rows import read_json
from stages.rows.row_parser import Row, RowParser
from stages.runtime.errors import UserError, user_errors

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(path: Path, slice_column: str, parser: RowParser) -> Iterator[Row]:
    """Read a Parquet file."""
    with user_errors(path):
        columns, others = _split_columns(path, pq.read_schema(path), slice_column, parser)
        yield from _rows(read_batches(path, columns), others)


def read_arrow(path: Path, slice_column: str, parser: RowParser) -> Iterator[Row]:
    """Read an Arrow stream, as `save_to_disk` of datasets writes it, or an Arrow file (Feather).

    Raises:
        UserError: the stream is cut off; pyarrow reads one that ends after a batch without an error.
    """
    with user_errors(path), path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        columns, others = _split_columns(path, reader.schema, slice_column, parser)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        tables = (pa.Table.from_batches([batch.select(columns)]) for batch in batches)
        yield from _rows(tables, others)
        if not is_file and (file.seek(-len(END_OF_STREAM), 2), file.read())[1] != END_OF_STREAM:
            raise UserError(f"{path}: is truncated; copy or write it again")


def _split_columns(path: Path, schema: pa.Schema, slice_column: str, parser: RowParser) -> tuple[list[str], list[str]]:
    """The columns to read, and binary ones that nothing needs, such as images."""
    parser.require_columns(path, schema.names)
    is_binary = {column.name: "binary" in str(column.type) for column in schema}
    columns = [name for name in schema.names if name == slice_column or parser.reads(name) or not is_binary[name]]
    return columns, [name for name in schema.names if name not in columns]


def _rows(tables: Iterable[pa.Table], others: list[str]) -> Iterator[Row]:
    """Number the rows. The other columns have an empty text in each."""
    number = 0
    for table in tables:
        for start in range(0, len(table), ROWS_PER_GROUP):
            for row in table.slice(start, ROWS_PER_GROUP).to_pylist():
                number += 1
                yield number, without_nulls(row) | dict.fromkeys(others, "")


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
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
