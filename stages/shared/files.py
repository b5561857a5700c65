"""Files that appear whole or not at all, and with the same bytes for the same content."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 4096  # a row group is what readers and writers hold in memory


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path to write a file or folder at, which takes the name `path` when the block succeeds, else is deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if path.is_dir():
            shutil.rmtree(path)
        partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class ParquetWriter:
    """Writes rows in row groups of fixed size, so that the bytes depend on the rows alone, not on how they came."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._schema = schema
        self._pending = schema.empty_table()
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", compression_level=3)
        self.num_rows = 0

    def write(self, rows: pa.Table | list[dict[str, Any]]) -> None:
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, self._schema)
        self.num_rows += len(table)
        self._pending = pa.concat_tables([self._pending, table])
        whole = len(self._pending) // ROWS_PER_GROUP * ROWS_PER_GROUP
        self._flush(whole)

    def _flush(self, num_rows: int) -> None:
        for start in range(0, num_rows, ROWS_PER_GROUP):
            self._writer.write_table(self._pending.slice(start, min(ROWS_PER_GROUP, num_rows - start)).combine_chunks())
        self._pending = self._pending.slice(num_rows)

    def close(self) -> None:
        self._flush(len(self._pending))
        self._writer.close()

    def abandon(self) -> None:
        """Let go of the file, which may be what failed."""
        with suppress(OSError, ValueError):
            self._writer.close()


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[ParquetWriter]:
    """A `ParquetWriter` whose file appears at `path` when the block succeeds.

    Example:
        >>> with parquet_writer(Path("data/raw.parquet"), schema) as writer:
        ...     writer.write([{"instruction": "Name a colour.", "input": "", "output": "Red.", "source_row": 1}])
    """
    with atomic_path(path) as partial:
        writer = ParquetWriter(partial, schema)
        try:
            yield writer
            writer.close()
        except BaseException:
            writer.abandon()
            raise


def read_batches(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A Parquet file, `ROWS_PER_GROUP` rows at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_PER_GROUP, columns=columns):
            yield pa.Table.from_batches([batch])
