"""`make chat`, with a tiny model and questions from a pipe."""

import io
import re
import shutil
from pathlib import Path

import pytest

from stages import chat
from stages.shared.templates import ChatTemplate
from tests.test_params import edit


@pytest.fixture
def folder(project: Path, tiny_model: Path) -> Path:
    for name in ("base", "tuned", "tokenizer"):
        shutil.copytree(tiny_model, project / "models" / name)
    edit(project, temperature="0", max_new_tokens="3")
    return project


def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *lines: str) -> list[tuple[str, str]]:
    """The model that each prompt names and what is printed until the next one."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    chat.main()
    _, *parts = re.split(r"(tuned|base)> ", capsys.readouterr().out)
    return list(zip(parts[::2], parts[1::2], strict=True))


def test_a_question_is_asked_again_where_the_model_is_switched(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = talk(monkeypatch, capsys, "Name a colour.", "/base", "/tuned", "/quit", "Name another.")
    answer = said[0][1]
    assert len(answer) > 3
    # One folder's model under both names, without sampling: three times the same answer, the first after its prompt.
    assert said == [("tuned", answer), ("tuned", answer), ("base", answer), ("tuned", "")]


def test_what_is_no_command_is_answered_with_the_commands(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, capsys, "/help", "", "/base") == [
        ("tuned", f"{chat.HELP}\n"),
        ("tuned", ""),
        ("tuned", ""),
        ("base", ""),
    ]


def test_with_a_chat_template_a_question_follows_what_was_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "templates").mkdir()
    shutil.copy(Path(__file__).parent.parent / "templates/plain.jinja", folder / "templates")
    edit(folder, template="templates/plain.jinja")
    asked: list[list[str]] = []
    render = ChatTemplate._render

    def record(self: ChatTemplate, messages: list[dict[str, str]], ask: bool = False) -> str:
        if ask:
            asked.append([message["content"] for message in messages])
        return render(self, messages, ask)

    monkeypatch.setattr(ChatTemplate, "_render", record)
    said = talk(monkeypatch, capsys, "One.", "/base", "Two.", "/new", "Three.", "/quit")
    first = said[0][1].strip()
    assert first
    assert asked == [["One."], ["One."], ["One.", first, "Two."], ["Three."]]
    assert [name for name, _ in said] == ["tuned", "tuned", "base", "base", "base", "base"]


def test_in_alpacas_form_each_question_stands_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = talk(monkeypatch, capsys, "Name a colour.", "And a tree.", "Name a colour.", "/quit")
    assert said[0] == said[2]


def test_a_question_too_long_for_the_model_ends_no_talk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = talk(monkeypatch, capsys, "colour " * 600, "/quit")
    assert "the question: found" in said[0][1]
    assert "this model has 512 positions" in said[0][1]
    assert said[1] == ("tuned", "")


def test_an_answer_cannot_steer_the_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import PreTrainedTokenizerBase

    monkeypatch.setattr(PreTrainedTokenizerBase, "decode", lambda *_, **__: "\x1b[2J wiped \n")
    assert r"\x1b[2J wiped" in talk(monkeypatch, capsys, "Name a colour.", "/quit")[0][1]
