"""Replicates: training with another seed gives the predictions that train and evaluate would give."""

import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stages import evaluate, replicate, train
from stages.evaluate import PREDICTIONS_SCHEMA
from tests.clone import edit
from tests.test_train import interruption

PREDICTIONS = Path("data/predictions/replicates/7.parquet")


@pytest.fixture
def replicated(training_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which `stages.replicate 7` has run."""
    edit(training_inputs, max_new_tokens="4")
    monkeypatch.setattr(sys, "argv", ["replicate", "7"])
    replicate.main()
    return training_inputs


def test_a_replicate_writes_its_predictions_and_nothing_else(replicated: Path) -> None:
    assert pq.read_schema(PREDICTIONS) == PREDICTIONS_SCHEMA
    assert pq.read_table(PREDICTIONS)["example_id"].to_pylist() == ["27", "28", "29"]
    assert list(replicated.rglob("*.partial")) == []
    assert sorted(path.name for path in (replicated / "models").iterdir()) == ["base", "tokenizer"]
    assert not Path("metrics").exists()


def test_a_replicate_has_the_predictions_of_train_and_evaluate_with_its_seed(
    replicated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "tuned"])
    for seed, is_equal in (("7", True), ("8", False)):
        edit(replicated, seed=seed)
        train.main()
        evaluate.main()
        assert pq.read_table("data/predictions/tuned.parquet").equals(pq.read_table(PREDICTIONS)) == is_equal


def test_an_interrupted_replicate_resumes(
    training_inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["replicate", "7"])
    with interruption(14):
        replicate.main()
    replicate.main()
    assert "Resuming from the checkpoint at step 10\n" in capsys.readouterr().out
    assert PREDICTIONS.exists()


def test_the_weights_of_a_replicate_are_deleted_also_if_they_cannot_be_scored(
    training_inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(replicate, "predict", fail)
    monkeypatch.setattr(sys, "argv", ["replicate", "7"])
    with pytest.raises(KeyboardInterrupt):
        replicate.main()
    assert list(training_inputs.rglob("*.partial")) == []
    assert not PREDICTIONS.exists()
