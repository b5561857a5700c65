"""The validation of row scores, and the experiments with selected rows."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import row_scores, selection
from benchmarks.row_scores import measure


def test_the_auc_and_the_precision_of_scores() -> None:
    good = np.arange(100.0)
    assert measure(np.array([200.0, 300.0, 400.0, 500.0, 600.0]), good) == {
        "auc": 1.0,
        "precision at 1%": 1.0,
        "precision at 5%": 1.0,
    }
    assert measure(np.full(5, -1.0), good) == {"auc": 0.0, "precision at 1%": 0.0, "precision at 5%": 0.0}
    assert measure(np.full(5, 49.5), good)["auc"] == 0.5
    assert measure(np.array([200.0, 300.0, 1.5, 1.5, 1.5]), good)["precision at 5%"] == 0.4
    assert measure(np.array([]), good) == {}


def test_each_kind_of_bad_answer() -> None:
    pairs = [("How many days has a week?", "A week has 7 days, or 168 hours."), ("Name a color.", "Red is a color.")]
    answers = {kind: replace(pairs, 0, random.Random(0)) for kind, replace in row_scores.KINDS.items()}
    assert answers == {
        "the answer of another row": "Red is a color.",
        "a refusal": "As an AI language model, I am not able to answer this question.",
        "an answer in another language": "Il faut d'abord lire le texte avec attention et noter les idées principales.",
        "an empty phrase": "Sure! I would be happy to help you with that.",
        "the first half of the answer": "A week has 7",
        "a copy of the question": "How many days has a week?",
        "wrong numbers": "A week has 4 days, or 873 hours.",
    }


def test_only_answers_of_training_rows_are_swapped(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared)
    monkeypatch.setattr(selection, "SWAPPED_FILE", tmp_path / "swapped.jsonl")
    monkeypatch.setattr(selection.subprocess, "run", lambda *_, **__: None)
    chosen = selection.write_swapped()
    before, after = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (prepared / "data/instructions.jsonl", tmp_path / "swapped.jsonl")
    )
    changed = {number for number, rows in enumerate(zip(before, after, strict=True), 1) if rows[0] != rows[1]}
    assert changed == chosen <= set(pq.read_table("data/train.parquet")["source_row"].to_pylist())
    assert len(chosen) == round(0.1 * pq.read_metadata("data/train.parquet").num_rows)
    assert sorted(row["output"] for row in before) == sorted(row["output"] for row in after)
    assert [row | {"output": ""} for row in before] == [row | {"output": ""} for row in after]
