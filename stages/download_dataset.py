"""Read a local file, a Hub dataset or a mixture of them: dataset → `data/raw.parquet`, `data/unreadable.parquet`.

`data/source.json` says where the data came from. Rows are streamed, so memory does not grow with their number.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any

from stages.data.examples import RAW_SCHEMA, REJECTED_SCHEMA, BadRowError
from stages.data.files import write_json
from stages.data.tables import ROWS_PER_GROUP, parquet_writer
from stages.rows.columns import parse_slice
from stages.rows.row_parser import ALLOWED, Row
from stages.rows.sources import Source, open_retention, open_sources
from stages.runtime.errors import UserError
from stages.runtime.param_types import DatasetParams
from stages.runtime.params import DownloadDatasetParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import progress, summary
from stages.text import printable

NO_SLICE, MAX_SLICES = "(none)", 100
RAW, UNREADABLE, SOURCE = Path("data/raw.parquet"), Path("data/unreadable.parquet"), Path("data/source.json")


def main() -> None:
    params = load_params(DownloadDatasetParams)
    sources = open_sources(params)
    mixture, metadata = mix(sources, params.datasets)
    limited = progress(islice(mixture, params.max_examples), "read", "row", params.max_examples)
    retention = open_retention(params)
    rows = chain(limited, ((retention, row) for row in retention.rows()) if retention else ())
    taken, slices = Counter[str](), set[str]()  # without those of the retention set
    with parquet_writer(RAW, RAW_SCHEMA) as raw, parquet_writer(UNREADABLE, REJECTED_SCHEMA) as unreadable:
        while batch := list(islice(rows, ROWS_PER_GROUP)):
            good, bad = [], []
            for source, (source_row, row) in batch:
                location = {"source": source.name, "source_row": source_row}
                taken[source.name] += source is not retention
                try:
                    good.append(raw_row(source, row, params.slice_column) | location)
                    if source is not retention:
                        slices.add(good[-1]["slice"])
                except BadRowError as error:
                    bad.append({**location, "reason": error.reason, "detail": str(error)})
            raw.write(good)
            unreadable.write(bad)
            if len(slices) > MAX_SLICES and params.slice_column != "source":
                raise UserError(
                    f"slice_column: found more than {MAX_SLICES} values of {params.slice_column!r}; must be a column "
                    "with few values, or source"
                )
        if not taken.total():
            raise UserError(f"{metadata['source']}: has no rows; {ALLOWED}")
        if slices == {NO_SLICE}:
            raise UserError(
                f"slice_column: no row of {metadata['source']} has {params.slice_column!r}; must be a column, or source"
            )
    check_mapped_columns(sources, params)
    unread: Counter[str] = Counter()
    for source in sources:
        unread.update({printable(name): count for name, count in source.parser.unread.items()})
    unread.pop(params.slice_column, None)
    if sizes := metadata.get("rows_in_source", {}):
        metadata["rows_taken"] = {name: taken[name] for name in sizes}
    write_json(SOURCE, metadata | {"columns_not_read": sorted(unread)})
    limit = f"; max_examples = {taken.total():,}" if taken.total() == params.max_examples else ""
    summary(
        {
            "source": metadata["source"],
            "rows": f"{raw.num_rows:,} read, {unreadable.num_rows:,} unreadable{limit}",
            **({"datasets": describe_shares(taken, sizes)} if sizes else {}),
            "retention set": retention.name if retention else "none",
            "not read": ", ".join(f"{name} ({count:,})" for name, count in unread.most_common())
            or "none of the columns",
        },
        wrote=[RAW, UNREADABLE, SOURCE],
        then="dvc repro format; then python -m stages.format --show 3",
    )


def raw_row(source: Source, row: dict[str, Any] | BadRowError, slice_column: str) -> dict[str, Any]:
    """A row of `RAW_SCHEMA`, without its location.

    Raises:
        BadRowError: the row can't be read.
    """
    parsed = source.parser.parse(row)
    value = source.name if slice_column == "source" else parse_slice(row, slice_column)
    return {
        "messages": json.dumps(parsed.messages, ensure_ascii=False),
        "tools": json.dumps(parsed.tools, ensure_ascii=False) if parsed.tools else None,
        "chat_template_kwargs": json.dumps(parsed.options, ensure_ascii=False) if parsed.options else None,
        "input": parsed.input,
        "slice": value or NO_SLICE,
        "check": json.dumps(parsed.check, ensure_ascii=False) if parsed.check else None,
        "other_columns": json.dumps(parsed.other_columns, default=date_as_text),
        "use": source.use,
    }


def date_as_text(value: object) -> str | None:
    """The text of a date or a decimal number, which JSON does not have; null for other objects, such as images."""
    return str(value) if isinstance(value, date | time | timedelta | Decimal) else None


def check_mapped_columns(sources: list[Source], params: DownloadDatasetParams) -> None:
    """Check that each mapped column occurs, unless only a part of the rows was read.

    Raises:
        UserError: no row has the column.
    """
    if params.max_examples is not None or any(entry.count or entry.weight for entry in params.datasets or ()):
        return
    for source in sources:
        if source.parser.missing:
            names = ", ".join(sorted(source.parser.missing))
            raise UserError(f"dataset_columns: no row of {source.name} has {names}; must be columns of the dataset")


def mix(
    sources: list[Source], entries: list[DatasetParams] | None
) -> tuple[Iterator[tuple[Source, Row]], dict[str, Any]]:
    """The rows of all sources, each with its source, and the content of `data/source.json`."""
    if entries is None:
        (source,) = sources
        return ((source, row) for row in source.rows()), source.metadata
    shares = choose_shares(sources, entries)
    metadata: dict[str, Any] = {
        key: ", ".join(str(source.metadata[key] or "not stated") for source in sources)
        for key in ("source", "revision", "license")
    }
    metadata["rows_in_source"] = {source.name: size for source, (_, size) in zip(sources, shares, strict=True)}
    return interleave(sources, shares), metadata


def describe_shares(taken: Mapping[str, int], sizes: Mapping[str, int]) -> str:
    """For each source, a line with the rows that were taken and those left out."""
    left_out = {
        name: f", {size - taken[name]:,} left out" if taken[name] < size else "" for name, size in sizes.items()
    }
    return "\n".join(f"{name}: {taken[name]:,} of {size:,} rows{left_out[name]}" for name, size in sizes.items())


def choose_shares(sources: list[Source], entries: list[DatasetParams]) -> list[tuple[int, int]]:
    """For each source, the number of rows to take and the number of rows that it has.

    With weights, the mixture is as large as possible without repeating a row.

    Raises:
        UserError: a source has fewer rows than its count, or none.
    """
    sizes = [sum(1 for _ in source.rows()) for source in sources]
    for source, entry, size in zip(sources, entries, sizes, strict=True):
        if size < (entry.count or 1):
            raise UserError(
                f"datasets: {source.name} has {size:,} rows; must have {entry.count or 1:,}; lower its count"
            )
    # Rows per unit of weight, limited by the source that has the fewest for its weight.
    largest = min((size / entry.weight for entry, size in zip(entries, sizes, strict=True) if entry.weight), default=0)
    return [
        (min(size, max(1, round(largest * entry.weight))) if entry.weight else entry.count or size, size)
        for entry, size in zip(entries, sizes, strict=True)
    ]


def interleave(sources: list[Source], shares: list[tuple[int, int]]) -> Iterator[tuple[Source, Row]]:
    """Mix evenly spaced rows of all sources, so that any section of the mixture has about the same proportions."""

    def with_position(index: int) -> Iterator[tuple[float, int, tuple[Source, Row]]]:
        """The rows taken of one source, each with its position in the mixture, from 0 to 1, and the source's index."""
        (taken, size), source = shares[index], sources[index]
        number = 0
        for at, row in enumerate(source.rows()):
            if (at + 1) * taken // size > number:
                yield (number + 0.5) / taken, index, (source, row)
                number += 1

    for _, _, row in heapq.merge(*map(with_position, range(len(sources))), key=lambda entry: entry[:2]):
        yield row


if __name__ == "__main__":
    run(main)
