"""Files that appear whole or not at all, and with the same bytes for the same content."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.shared.errors import reading
from stages.shared.terminal import bar

ROWS_PER_GROUP = 4096  # a row group is what readers and writers hold in memory
ROWS_PER_SHARD = 16 * ROWS_PER_GROUP  # a shard is what one process works on
PARQUET: dict[str, Any] = {"compression": "zstd", "compression_level": 3}


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
        if path.is_dir() or partial.is_dir():
            remove(path)  # a folder can't take the place of another, nor of a file
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


def table_sha256(path: Path) -> str:
    """Of the shards of a table one after another, as `cat data/train.parquet/* | sha256sum` says."""
    digest = hashlib.sha256()
    for shard in shards(path):
        with shard.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


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
    """Writes the shards of a table, `00000.parquet` and so on, from the one with the given number.

    Shards and their row groups are of fixed size: the bytes depend on the rows alone, not on how they came.
    """

    def __init__(self, folder: Path, schema: pa.Schema, number: int = 0):
        self._schema = schema
        self._pending = schema.empty_table()
        self._paths = (shard_path(folder, at) for at in count(number))
        self._open()
        self.num_rows = 0

    def _open(self) -> None:
        self._writer = pq.ParquetWriter(next(self._paths), self._schema, **PARQUET)
        self._room = ROWS_PER_SHARD

    def write(self, rows: pa.Table | list[dict[str, Any]]) -> None:
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, self._schema)
        self.num_rows += len(table)
        self._pending = pa.concat_tables([self._pending, table])
        whole = len(self._pending) // ROWS_PER_GROUP * ROWS_PER_GROUP
        self._flush(whole)

    def _flush(self, num_rows: int) -> None:
        for start in range(0, num_rows, ROWS_PER_GROUP):
            if not self._room:
                self._writer.close()
                self._open()
            self._writer.write_table(self._pending.slice(start, min(ROWS_PER_GROUP, num_rows - start)).combine_chunks())
            self._room -= ROWS_PER_GROUP
        self._pending = self._pending.slice(num_rows)

    def close(self) -> None:
        self._flush(len(self._pending))
        self._writer.close()

    def abandon(self) -> None:
        """Let go of the file, which may be what failed."""
        with suppress(OSError, ValueError):
            self._writer.close()


@contextmanager
def shard_writer(folder: Path, schema: pa.Schema, number: int = 0) -> Iterator[ParquetWriter]:
    """A `ParquetWriter` in a folder that `sharded` gave: the shards before `number` are for others to write."""
    writer = ParquetWriter(folder, schema, number)
    try:
        yield writer
        writer.close()
    except BaseException:
        writer.abandon()
        raise


@contextmanager
def sharded(path: Path) -> Iterator[Path]:
    """A folder to write the shards of a table to, which appears at `path` when the block succeeds.

    Where there is but one shard, `path` becomes that file: a table of up to `ROWS_PER_SHARD` rows is one file.
    """
    with atomic_path(path) as partial:
        partial.mkdir()
        yield partial
        first, *more = partial.iterdir()
        if not more:
            alone = first.rename(path.with_name(f".{path.name}.alone.partial"))
            partial.rmdir()
            alone.rename(partial)


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[ParquetWriter]:
    """A `ParquetWriter` whose table appears at `path` when the block succeeds.

    Example:
        >>> with parquet_writer(Path("data/raw.parquet"), schema) as writer:
        ...     writer.write([{"instruction": "Name a colour.", "input": "", "output": "Red.", "source_row": 1}])
    """
    with sharded(path) as folder, shard_writer(folder, schema) as writer:
        yield writer


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Write one file, however many the rows."""
    with atomic_path(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema), partial, row_group_size=ROWS_PER_GROUP, **PARQUET)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.parquet"


def shards(path: Path) -> list[Path]:
    """The files of a table, in the order of its rows."""
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def read_table(path: Path, columns: list[str]) -> pa.Table:
    """Columns of a whole table, in memory."""
    with reading(path):
        return pa.concat_tables([pq.read_table(shard, columns=columns) for shard in shards(path)])


def read_batches(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A table, at most `ROWS_PER_GROUP` rows at a time."""
    for shard in shards(path):
        with reading(shard), pq.ParquetFile(shard) as file:
            batches = file.iter_batches(ROWS_PER_GROUP, columns=columns)
            for batch in bar(batches, f"read {shard}", "batch", math.ceil(file.metadata.num_rows / ROWS_PER_GROUP)):
                yield pa.Table.from_batches([batch])
