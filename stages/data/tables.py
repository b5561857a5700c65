"""Parquet tables with reproducible bytes. A table is one file, or a folder of shards if it has many rows."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.data.files import atomic_path
from stages.runtime.errors import user_errors
from stages.runtime.terminal import progress

ROWS_PER_GROUP = 4096  # readers and writers keep one row group in memory
ROWS_PER_SHARD = 16 * ROWS_PER_GROUP  # one process works on one shard at a time
PARQUET_OPTIONS: dict[str, Any] = {"compression": "zstd", "compression_level": 3}


class ParquetWriter:
    """Write the shards of a table, `00000.parquet` and so on, starting at the given number.

    Shards and row groups have fixed sizes, so the bytes depend on the rows alone and not on how they are batched.
    """

    def __init__(self, folder: Path, schema: pa.Schema, first_shard: int = 0):
        self._schema = schema
        self._pending = schema.empty_table()
        self._paths = (folder / f"{number:05}.parquet" for number in count(first_shard))
        self._open_shard()
        self.num_rows = 0

    def _open_shard(self) -> None:
        self._writer = pq.ParquetWriter(next(self._paths), self._schema, **PARQUET_OPTIONS)
        self._rows_left = ROWS_PER_SHARD  # in the open shard

    def write(self, rows: pa.Table | list[dict[str, Any]]) -> None:
        """Append rows. Complete row groups are written; the remaining rows stay in memory until the next call."""
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, self._schema)
        self.num_rows += len(table)
        self._pending = pa.concat_tables([self._pending, table])
        self._flush(len(self._pending) // ROWS_PER_GROUP * ROWS_PER_GROUP)

    def _flush(self, num_rows: int) -> None:
        for start in range(0, num_rows, ROWS_PER_GROUP):
            if not self._rows_left:
                self._writer.close()
                self._open_shard()
            self._writer.write_table(self._pending.slice(start, min(ROWS_PER_GROUP, num_rows - start)).combine_chunks())
            self._rows_left -= ROWS_PER_GROUP
        self._pending = self._pending.slice(num_rows)

    def close(self) -> None:
        self._flush(len(self._pending))
        self._writer.close()

    def abandon(self) -> None:
        """Close the file after an error. It raises nothing, because writing the file may be what failed."""
        with suppress(OSError, ValueError):
            self._writer.close()


@contextmanager
def shard_writer(folder: Path, schema: pa.Schema, first_shard: int = 0) -> Iterator[ParquetWriter]:
    """Yield a `ParquetWriter` in a folder from `sharded`; other processes may write the other shards.

    A process that keeps or drops the rows of one shard writes at most one shard, so the numbers never collide.
    """
    writer = ParquetWriter(folder, schema, first_shard)
    try:
        yield writer
        writer.close()
    except BaseException:
        writer.abandon()
        raise


@contextmanager
def sharded(path: Path) -> Iterator[Path]:
    """Yield a folder for the shards of a table, renamed to `path` if the block succeeds.

    A single shard becomes the file `path` itself, so a table of up to `ROWS_PER_SHARD` rows is one file.
    """
    with atomic_path(path) as partial:
        partial.mkdir()
        yield partial
        first, *others = partial.iterdir()
        if not others:
            single = first.rename(path.with_name(f".{path.name}.single.partial"))
            partial.rmdir()
            single.rename(partial)


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[ParquetWriter]:
    """Yield a `ParquetWriter` whose table appears at `path` if the block succeeds.

    Example:
        >>> with parquet_writer(Path("data/raw.parquet"), schema) as writer:
        ...     writer.write([{"instruction": "Name a color.", "input": "", "output": "Red.", "source_row": 1}])
    """
    with sharded(path) as folder, shard_writer(folder, schema) as writer:
        yield writer


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Write a table as a single file, for any number of rows."""
    with atomic_path(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema), partial, row_group_size=ROWS_PER_GROUP, **PARQUET_OPTIONS)


def shards(path: Path) -> list[Path]:
    """The files of a table, in row order."""
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def read_table(path: Path, columns: list[str]) -> pa.Table:
    """Read columns of a whole table into memory."""
    with user_errors(path):
        return pa.concat_tables([pq.read_table(shard, columns=columns) for shard in shards(path)])


def read_batches(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Read a table in batches of at most `ROWS_PER_GROUP` rows."""
    for shard in shards(path):
        with user_errors(shard), pq.ParquetFile(shard) as file:
            num_batches = math.ceil(file.metadata.num_rows / ROWS_PER_GROUP)
            batches = file.iter_batches(ROWS_PER_GROUP, columns=columns)
            for batch in progress(batches, f"read {shard}", "batch", num_batches):
                yield pa.Table.from_batches([batch])
