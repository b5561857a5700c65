"""Replicates: training with another seed gives the answers that train and predict would give."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stages import replicate
from stages.predict import ANSWERS_SCHEMA
from tests.clone import edit, run_pipeline
from tests.test_train import interruption

ANSWERS = Path("data/answers/replicates/7.parquet")


def test_a_replicate_writes_only_its_answers_which_are_those_of_train_and_predict_with_its_seed(
    training_inputs: Path,
) -> None:
    edit(training_inputs, max_new_tokens="4")
    run_pipeline(training_inputs, "replicate@7")
    assert pq.read_schema(ANSWERS) == ANSWERS_SCHEMA
    assert pq.read_table(ANSWERS)["example_id"].to_pylist() == ["27", "28", "29"]
    assert list(training_inputs.rglob("*.partial")) == []
    assert sorted(path.name for path in (training_inputs / "models").iterdir()) == ["base", "tokenizer"]
    assert not Path("metrics").exists()
    for seed, is_equal in (("7", True), ("8", False)):
        edit(training_inputs, seed=seed)
        run_pipeline(training_inputs, "train", "predict@tuned")
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
