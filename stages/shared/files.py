"""Files that appear whole or not at all, and with the same bytes for the same content."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.shared.errors import reading
from stages.shared.terminal import bar

ROWS_PER_GROUP = 4096  # a row group is what readers and writers hold in memory


@contextmanager
def atomic_path(path: Path, durable: bool = False) -> Iterator[Path]:
    """A path to write a file or folder at, which takes the name `path` when the block succeeds, else is deleted.

    Args:
        durable: wait until all of it is on the disk, so that a power failure can't take what hours have made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)  # what a process that was killed has left
    try:
        yield partial
        if durable:
            for written in [*partial.rglob("*"), partial]:
                _flush(written)
        if path.is_dir():
            shutil.rmtree(path)
        partial.replace(path)
        if durable:
            _flush(path.parent)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_csv(path: Path, header: str, rows: Iterable[Sequence[float | None]]) -> None:
    """Numbers to six digits; None is an empty field."""
    lines = (",".join("" if value is None else f"{value:.6g}" for value in row) for row in rows)
    write_text(path, "\n".join([header, *lines]) + "\n")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


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
    with reading(path), pq.ParquetFile(path) as file:
        batches = file.iter_batches(ROWS_PER_GROUP, columns=columns)
        for batch in bar(batches, f"read {path}", "batch", math.ceil(file.metadata.num_rows / ROWS_PER_GROUP)):
            yield pa.Table.from_batches([batch])
