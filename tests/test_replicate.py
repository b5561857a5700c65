"""Replicates: training with another seed gives the answers that train and predict would give."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stages import replicate
from stages.predict import ANSWERS_SCHEMA
from tests.clone import edit, run_pipeline
from tests.test_train import interruption

ANSWERS = Path("data/answers/replicates/7.parquet")


@pytest.fixture
def replicated(training_inputs: Path) -> Path:
    """A project in which `stages.replicate 7` has run."""
    edit(training_inputs, max_new_tokens="4")
    run_pipeline(training_inputs, "replicate@7")
    return training_inputs


def test_a_replicate_writes_its_answers_and_nothing_else(replicated: Path) -> None:
    assert pq.read_schema(ANSWERS) == ANSWERS_SCHEMA
    assert pq.read_table(ANSWERS)["example_id"].to_pylist() == ["27", "28", "29"]
    assert list(replicated.rglob("*.partial")) == []
    assert sorted(path.name for path in (replicated / "models").iterdir()) == ["base", "tokenizer"]
    assert not Path("metrics").exists()


def test_a_replicate_has_the_answers_of_train_and_predict_with_its_seed(replicated: Path) -> None:
    for seed, is_equal in (("7", True), ("8", False)):
        edit(replicated, seed=seed)
        run_pipeline(replicated, "train", "predict@tuned")
        assert pq.read_table("data/answers/tuned.parquet").equals(pq.read_table(ANSWERS)) == is_equal


def test_an_interrupted_replicate_resumes(training_inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with interruption(14):
        run_pipeline(training_inputs, "replicate@7")
    run_pipeline(training_inputs, "replicate@7")
    assert "Resuming from the checkpoint at step 10\n" in capsys.readouterr().out
    assert ANSWERS.exists()


def test_the_weights_of_a_replicate_are_deleted_also_if_they_cannot_be_scored(
    training_inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(replicate, "predict", fail)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(training_inputs, "replicate@7")
    assert list(training_inputs.rglob("*.partial")) == []
    assert not ANSWERS.exists()
