"""Sample answers as Markdown, with the text unchanged."""

from pathlib import Path

import pytest

from stages.engine import decoding
from stages.engine.decoding import Answer
from stages.runtime.params import GenerateParams, load_params
from stages.templates.answer_parts import AnswerParts
from tests.clone import edit, run_pipeline


def test_each_prompt_is_a_heading_with_its_answer_below_and_the_seed_determines_the_answers(
    project: Path, tiny_model: Path
) -> None:
    edit(project, model_name=str(tiny_model), max_new_tokens="5")
    run_pipeline(project, "download_model", "generate@base")
    first = Path("metrics/samples/base.md").read_text()
    assert first.startswith("# Answers of the base model\n\nAt most 5 tokens, temperature 0.7, top_p 0.9, seed 42.\n")
    assert first.count("\n## ") == 6
    assert "\n## Write a haiku about programming.\n\n    " in first
    run_pipeline(project, "generate@base")
    assert Path("metrics/samples/base.md").read_text() == first
    edit(project, seed="43")
    run_pipeline(project, "generate@base")
    assert Path("metrics/samples/base.md").read_text() != first


def test_samples_are_final_texts_and_say_if_there_is_reasoning(
    project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(project, model_name=str(tiny_model))
    run_pipeline(project, "download_model")
    prompts = load_params(GenerateParams).sample_prompts
    answers = [
        Answer(AnswerParts("yes"), 2, stopped=True),
        Answer(AnswerParts("yes", "not no"), 9, stopped=True),
        *[Answer(AnswerParts("", "not", is_open=True), 5, stopped=False)] * (len(prompts) - 2),
    ]
    monkeypatch.setattr(decoding, "generate_answers", lambda *_: answers)
    run_pipeline(project, "generate@base")
    parts = Path("metrics/samples/base.md").read_text().split("\n## ")
    assert [part.partition("\n\n")[2] for part in parts[1:4]] == [
        "    yes\n",
        "*(the reasoning, 6 characters, is not shown)*\n\n    yes\n",
        "*(the reasoning, 3 characters, never ends, so there is no answer)*\n\n    (empty)\n\n*(cut at 5 tokens)*\n",
    ]


def test_a_model_other_than_base_and_tuned_is_rejected(project: Path) -> None:
    with pytest.raises(SystemExit) as error:
        run_pipeline(project, "generate@other")
    assert error.value.code == 2
