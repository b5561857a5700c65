"""Replicates: training with another seed gives the answers that train and predict would give."""

import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stages import predict, replicate, train
from stages.predict import ANSWERS_SCHEMA
from tests.clone import edit
from tests.test_train import interruption

ANSWERS = Path("data/answers/replicates/7.parquet")


@pytest.fixture
def replicated(training_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which `stages.replicate 7` has run."""
    edit(training_inputs, max_new_tokens="4")
    monkeypatch.setattr(sys, "argv", ["replicate", "7"])
    replicate.main()
    return training_inputs


def test_a_replicate_writes_its_answers_and_nothing_else(replicated: Path) -> None:
    assert pq.read_schema(ANSWERS) == ANSWERS_SCHEMA
    assert pq.read_table(ANSWERS)["example_id"].to_pylist() == ["27", "28", "29"]
    assert list(replicated.rglob("*.partial")) == []
    assert sorted(path.name for path in (replicated / "models").iterdir()) == ["base", "tokenizer"]
    assert not Path("metrics").exists()


def test_a_replicate_has_the_answers_of_train_and_predict_with_its_seed(
    replicated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["predict", "tuned"])
    for seed, is_equal in (("7", True), ("8", False)):
        edit(replicated, seed=seed)
        train.main()
        predict.main()
        assert pq.read_table("data/answers/tuned.parquet").equals(pq.read_table(ANSWERS)) == is_equal


def test_an_interrupted_replicate_resumes(
    training_inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["replicate", "7"])
    with interruption(14):
        replicate.main()
    replicate.main()
    assert "Resuming from the checkpoint at step 10\n" in capsys.readouterr().out
    assert ANSWERS.exists()


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
    assert not ANSWERS.exists()
