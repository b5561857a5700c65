"""Scores of training rows: the losses of the plain model, with and without the prompt."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from stages import score_rows
from stages.data.examples import Example
from stages.data.tokenizer import load_tokenizer
from stages.engine.models import load_model
from stages.score_rows import summarize, without_prompts
from stages.templates.alpaca import AlpacaTemplate
from stages.templates.conversations import Conversation
from tests.clone import edit, run_pipeline
from tests.conftest import example
from tests.textbook import textbook_losses


@pytest.fixture
def formatted(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which `split` has run with scores switched on."""
    project = Path(shutil.copytree(prepared, tmp_path / "project"))
    monkeypatch.chdir(project)
    edit(project, score_rows="true", precision="fp32")
    return project


def scores() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table("data/train_scores.parquet").to_pylist()
    return rows


def encode(question: str, answer: str) -> Example:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    encoded = AlpacaTemplate(load_tokenizer()).format([Conversation(messages)], 512).encoded
    return Example("x", encoded.input_ids, encoded.labels)


def test_scores_are_those_of_the_plain_model_with_the_question_and_with_an_empty_one(formatted: Path) -> None:
    score_rows.main()
    model = load_model(Path("models/base")).eval()
    row = scores()[0]
    (found,) = pq.read_table("data/train.parquet").slice(0, 1).to_pylist()
    assert found["example_id"] == row["example_id"]
    ids, labels = (np.array(found[name], np.int32) for name in ("input_ids", "labels"))
    answer = labels[labels != -100]
    empty = encode("", found["response"])  # with an empty question, rendered by the template
    assert empty.labels[empty.labels != -100].tolist() == answer.tolist()
    with torch.no_grad():
        with_prompt, without = (
            textbook_losses(model, [each])["x"].double() for each in (Example("x", ids, labels), empty)
        )
    assert row["tokens"] == len(answer) - 1  # without the EOS token
    assert row["loss"] == pytest.approx(float(with_prompt[:-1].mean()), rel=1e-5)
    assert row["loss_without_prompt"] == pytest.approx(float(without[:-1].mean()), rel=1e-5)
    assert row["pmi"] == pytest.approx(float((without[:-1] - with_prompt[:-1]).sum()), abs=1e-3)
    assert row["pmi_per_token"] == pytest.approx(row["pmi"] / row["tokens"])
    assert row["eos_loss"] == pytest.approx(float(with_prompt[-1]), rel=1e-5)


def test_only_training_rows_are_scored(formatted: Path) -> None:
    score_rows.main()
    train = pq.read_table("data/train.parquet", columns=["example_id"])["example_id"].to_pylist()
    assert [row["example_id"] for row in scores()] == train
    assert len(train) < pq.read_metadata("data/formatted.parquet").num_rows


def test_without_scores_the_table_is_empty_and_no_model_is_needed(formatted: Path) -> None:
    edit(formatted, score_rows="false")
    shutil.rmtree("models")
    score_rows.main()
    assert scores() == []


def test_the_training_split_is_the_same_with_scores(formatted: Path) -> None:
    before = Path("data/train.parquet").read_bytes()
    run_pipeline(formatted, "score_rows", "split")
    assert len(scores()) > 0
    assert Path("data/train.parquet").read_bytes() == before


def test_without_its_prompts_an_example_has_its_answers_after_an_empty_prompt() -> None:
    conversation = Example(
        "a", np.array([5, 6, 7, 2, 8, 9, 2], np.int32), np.array([-100, -100, 7, 2, -100, 9, 2], np.int32)
    )
    assert without_prompts(conversation, [1, 3]).input_ids.tolist() == [1, 3, 7, 2, 9, 2]
    assert without_prompts(conversation, [1, 3]).labels.tolist() == [-100, -100, 7, 2, 9, 2]


def test_an_empty_prompt_is_never_longer_than_the_prompt_that_it_replaces() -> None:
    assert without_prompts(example([5, 6], [2]), [1, 3, 4]).input_ids.tolist() == [3, 4, 2]


LOSSES, ALONE = np.array([1.0, 2.0, 6.0]), np.array([4.0, 3.0, 7.0])


def test_the_eos_token_is_scored_by_itself() -> None:
    assert summarize({"truncated": False}, LOSSES, ALONE) == {
        "tokens": 2,
        "loss": 1.5,
        "loss_without_prompt": 3.5,
        "pmi": 4.0,
        "pmi_per_token": 2.0,
        "eos_loss": 6.0,
    }


def test_a_truncated_row_has_no_eos_token() -> None:
    found = summarize({"truncated": True}, LOSSES, ALONE)
    assert (found["tokens"], found["loss"], found["pmi"], found["eos_loss"]) == (3, 3.0, 5.0, None)


def test_an_answer_without_tokens_has_a_pmi_of_zero() -> None:
    found = summarize({"truncated": False}, LOSSES[:1], ALONE[:1])
    assert found == {
        "tokens": 0,
        "loss": 0.0,
        "loss_without_prompt": 0.0,
        "pmi": 0.0,
        "pmi_per_token": 0.0,
        "eos_loss": 1.0,
    }


def test_plain_text_has_a_loss_but_no_pmi(project: Path, tiny_model: Path) -> None:
    rows = [{"text": "A line.\n"}, *({"instruction": f"Name {n}.", "output": "x"} for n in range(9))]
    Path("data/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit(project, dataset_file="data/a.jsonl", model_name=str(tiny_model), score_rows="true")
    edit(project, test_fraction="0", validation_fraction="0")
    run_pipeline(project, "download_dataset", "download_model", "format", "score_rows")
    text, *others = scores()
    assert text["loss"] > 1
    assert text["eos_loss"] > 1
    assert (text["pmi"], text["pmi_per_token"], text["loss_without_prompt"]) == (None, None, None)
    assert all(row["pmi"] is not None for row in others)
