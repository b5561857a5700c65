"""`make chat` with a tiny model and questions from a pipe."""

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from stages.data.tokenizer import load_tokenizer
from stages.templates.rendering import Renderer
from stages.templates.selection import load_template, select_template
from tests.clone import USER_FILES, edit
from tools import chat


@pytest.fixture
def folder(project: Path, tiny_model: Path) -> Path:
    """A project with one tiny model as base and tuned model, which answers greedily."""
    for name in ("base", "tuned", "tokenizer"):
        shutil.copytree(tiny_model, project / "models" / name)
    edit(project, temperature="0", max_new_tokens="3")
    return project


Talk = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def talk(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """A function that enters lines; it returns the model that each prompt names, and the text printed after it."""

    def talk(*lines: str) -> list[tuple[str, str]]:
        typed = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        capsys.readouterr()
        chat.main()
        _, *parts = re.split(r"(tuned|base)> ", capsys.readouterr().out)
        return list(zip(parts[::2], parts[1::2], strict=True))

    return talk


def test_switching_the_model_repeats_the_last_question(talk: Talk) -> None:
    printed = talk("Name a color.", "/base", "/tuned", "/quit", "Name another.")
    answer = printed[0][1]
    assert len(answer) > 3
    # Both names are the same model and decoding is greedy, so all three answers are equal.
    assert printed == [("tuned", answer), ("tuned", answer), ("base", answer), ("tuned", "")]


def test_an_unknown_command_prints_the_commands(talk: Talk) -> None:
    assert talk("/help", "", "/base") == [("tuned", f"{chat.HELP}\n"), ("tuned", ""), ("tuned", ""), ("base", "")]


def test_with_a_chat_template_a_question_follows_the_history(
    folder: Path, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "templates").mkdir()
    shutil.copy(USER_FILES / "templates/plain.jinja", folder / "templates")
    select_template("templates/plain.jinja")
    edit(folder, template="templates/plain.jinja")
    prompts: list[list[str]] = []
    render = Renderer.render

    def record(self: Renderer, messages: list[dict[str, str]], *row: Any, **options: Any) -> str:
        if options.get("add_generation_prompt") and messages[0]["content"] != "A":  # the test of the template itself
            prompts.append([message["content"] for message in messages])
        return render(self, messages, *row, **options)

    monkeypatch.setattr(Renderer, "render", record)
    printed = talk("One.", "/base", "Two.", "/new", "Three.", "/quit")
    first = printed[0][1].strip()
    assert first
    assert prompts == [["One."], ["One."], ["One.", first, "Two."], ["Three."]]
    assert [name for name, _ in printed] == ["tuned", "tuned", "base", "base", "base", "base"]


def test_with_the_alpaca_template_questions_have_no_history(talk: Talk) -> None:
    printed = talk("Name a color.", "And a tree.", "Name a color.", "/quit")
    assert printed[0] == printed[2]


def test_a_question_longer_than_the_context_does_not_end_the_chat(talk: Talk) -> None:
    printed = talk("color " * 600, "/quit")
    assert "the conversation (/new clears it): found" in printed[0][1]
    assert "this model has 512 positions" in printed[0][1]
    assert printed[1] == ("tuned", "")


def test_an_answer_ends_when_the_context_is_full_and_the_chat_goes_on(folder: Path, talk: Talk) -> None:
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "models/tuned")
    edit(folder, max_new_tokens="64")
    question = "\N{GREEK CAPITAL LETTER OMEGA}" * 104
    (prompt,) = load_template("alpaca", load_tokenizer()).encode_prompts([question])
    assert len(prompt) == 238
    printed = talk(question, "Still there?", "/quit")
    assert 0 < len(printed[0][1].removesuffix("\n")) <= 19  # bytes; positions 238 to 255, and a last token
    assert [name for name, _ in printed] == ["tuned", "tuned", "tuned"]


def test_a_line_that_is_not_utf8_is_reported_and_the_chat_goes_on(talk: Talk) -> None:
    printed = talk("Name a color.", "caf\udcc3", "/tuned", "/quit")
    assert printed[1] == ("tuned", "this line is not valid UTF-8 and was ignored; enter it again\n")
    assert printed[2] == printed[0]  # the last question, repeated


def test_an_answer_cannot_control_the_terminal(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerBase

    monkeypatch.setattr(PreTrainedTokenizerBase, "decode", lambda *_, **__: "\x1b[2J wiped \n")
    assert r"\x1b[2J wiped" in talk("Name a color.", "/quit")[0][1]
