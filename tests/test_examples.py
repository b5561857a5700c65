"""The examples of a split are read from memory-mapped files."""

from pathlib import Path
from typing import Any

import pytest

from stages.data import tables
from stages.data.examples import SPLIT_SCHEMA, Example, read_split
from stages.data.tables import parquet_writer


def write_split(rows: list[dict[str, Any]]) -> Path:
    with parquet_writer(Path("data/train.parquet"), SPLIT_SCHEMA) as writer:
        writer.write(rows)
    return Path("data/train.parquet")


def values(example: Example) -> tuple[str, list[int], list[int]]:
    return example.example_id, example.input_ids.tolist(), example.labels.tolist()


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("rows_per_group", [1, 2, 100])
def test_a_split_is_a_sequence_of_examples_and_leaves_no_file(
    rows_per_group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", rows_per_group)
    expected = [(f"id{n}", [7] * n + [2], [-100] * n + [2]) for n in range(1, 6)]
    split = read_split(
        write_split([{"example_id": name, "input_ids": ids, "labels": labels} for name, ids, labels in expected])
    )
    assert len(split) == 5
    assert list(map(values, split)) == expected
    assert [values(split[index]) for index in (0, 4, -1)] == [expected[0], expected[4], expected[4]]
    assert list(map(values, split[1:3])) == expected[1:3]
    with pytest.raises(IndexError):
        split[5]
    assert list(Path(".scratch").iterdir()) == []
