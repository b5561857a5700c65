"""Losses and answers of a tiny model, greedy and sampled."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages.data.examples import SPLIT_SCHEMA
from stages.data.tables import write_parquet
from tests.clone import edit, run_pipeline


def run_predict() -> list[dict[str, Any]]:
    run_pipeline(Path.cwd(), "predict@base")
    rows: list[dict[str, Any]] = pq.read_table("data/answers/base.parquet").to_pylist()
    return rows


def test_answers_are_in_the_order_of_the_test_split(training_inputs: Path) -> None:
    edit(training_inputs, max_new_tokens="7")
    rows = run_predict()
    assert [row["example_id"] for row in rows] == ["27", "28", "29"]
    assert [row["tokens"] for row in rows] == [17, 5, 7]  # with the EOS token
    assert [row["reference_fits"] for row in rows] == [False, True, True]
    assert [len(row["answers"]) for row in rows] == [1, 1, 1]


def test_the_retention_set_does_not_change_the_rows_of_the_test_split(training_inputs: Path) -> None:
    edit(training_inputs, max_new_tokens="7", precision="bf16")
    before = run_predict()
    write_parquet(Path("data/retention.parquet"), pq.read_table("data/train.parquet").to_pylist()[:4], SPLIT_SCHEMA)
    after = run_predict()
    assert after[:3] == before
    assert [(row["split"], row["example_id"]) for row in after[3:]] == [("retention", str(n)) for n in range(4)]


def test_several_answers_are_sampled_and_the_same_in_each_run(training_inputs: Path) -> None:
    edit(training_inputs, max_new_tokens="7", answers_per_prompt="5")
    rows = run_predict()
    assert all(len(row["answers"]) == len(row["answer_tokens"]) == len(row["stopped"]) == 5 for row in rows)
    assert all(len(set(row["answers"])) > 1 for row in rows)
    edit(training_inputs, seed="7")
    assert run_predict() == rows
