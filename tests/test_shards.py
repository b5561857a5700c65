"""Large tables: shards and several processes give the same rows and metrics as one file and one process."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages import download_dataset, download_model, split
from stages import format as format_stage
from stages.data import tables
from stages.data.examples import read_split
from stages.data.tables import shards
from stages.runtime import parallel
from tests.clone import ROOT, edit

TABLES = ("raw", "unreadable", "formatted", "rejected", "train", "validation", "test")
SAME_QUESTION = "Name three tall trees that grow in the north of Norway, and how old they become{}"


def rows() -> list[dict[str, Any]]:
    """Rows with duplicates and near-duplicates in different shards, and with rows that are rejected."""
    plain = [{"instruction": f"Say the number {i} in words.", "output": f"This is {i}."} for i in range(600)]
    near = [{"instruction": SAME_QUESTION.format(end * (i + 1)), "output": f"{i}"} for end in "!?." for i in range(12)]
    bad: list[dict[str, Any]] = [{"instruction": "A"}, {"instruction": " ", "output": "b"}] * 4
    talks = [
        {"messages": [*exchange(f"Hello, number {i}."), *exchange(f"Say the number {i} in words.")]} for i in range(90)
    ]
    return [*near[:20], *plain[:60], *bad, *plain, *near[20:], *talks, *plain[30:50]]


def exchange(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]


def run_stages() -> dict[str, Any]:
    """Run the data stages up to split; returns all tables as lists of rows, and the metrics."""
    for stage in (download_dataset, format_stage, split):
        stage.main()
    results: dict[str, Any] = {
        name: [row for path in shards(Path(f"data/{name}.parquet")) for row in pq.read_table(path).to_pylist()]
        for name in TABLES
    }
    examples = [example.input_ids.tolist() for example in read_split(Path("data/train.parquet"))]
    return {**results, "examples": examples, **{path.name: path.read_text() for path in Path("metrics").iterdir()}}


def test_shards_and_processes_do_not_change_rows_or_metrics(
    project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "data/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    edit(project, dataset_file="data/a.jsonl", model_name=str(tiny_model), drop_near_duplicates="true")
    (project / "templates").symlink_to(ROOT / "templates")
    edit(project, template="templates/plain.jinja")
    download_model.main()
    expected = run_stages()
    assert not Path("data/raw.parquet").is_dir()
    metrics = json.loads(expected["split.json"])
    assert (metrics["rows_in"], metrics["duplicates"]) == (806, 80)
    assert metrics["near_duplicates"] > 30

    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 8)
    monkeypatch.setattr(tables, "ROWS_PER_SHARD", 200)
    monkeypatch.setattr(parallel, "num_cores", lambda: 2)
    assert run_stages() == expected
    assert [len(shards(Path(f"data/{name}.parquet"))) for name in TABLES] == [5, 1, 5, 1, 5, 5, 5]
    first = {path: path.read_bytes() for path in Path("data").rglob("*.parquet") if path.is_file()}
    monkeypatch.setattr(parallel, "num_cores", lambda: 1)
    assert run_stages() == expected
    assert {path: path.read_bytes() for path in first} == first
    assert sorted(path.name for path in Path(".scratch").iterdir()) == []
