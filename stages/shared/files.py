"""Files that appear whole or not at all, and with the same bytes for the same content."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
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
    """Collects rows and writes them in row groups of fixed size, so that the bytes depend on the rows alone."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", compression_level=3)
        self.num_rows = 0

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self._rows.append(row)
            self.num_rows += 1
            if len(self._rows) == ROWS_PER_GROUP:
                self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows.clear()

    def close(self) -> None:
        if self._rows:
            self._flush()
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


def read_batches(path: Path, columns: list[str] | None = None) -> Iterator[list[dict[str, Any]]]:
    """The rows of a Parquet file, `ROWS_PER_GROUP` at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_PER_GROUP, columns=columns):
            yield batch.to_pylist()
