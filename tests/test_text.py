"""Untrusted text stays text on a terminal, in Markdown and in HTML."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from stages.runtime.secrets import without_secrets
from stages.text import block, code, heading, printable

COMMONMARK = MarkdownIt("commonmark", {"html": True}).enable("table")


def test_control_characters_become_escapes() -> None:
    assert printable("a\x1b[2J\x00\r\nb\tc\u202e\ud800") == "a\\x1b[2J\\x00\nb\tc\\u202e\\ud800"
    assert printable("é 🏳️\u200d🌈 سلام → \u00a0") == "é 🏳️\u200d🌈 سلام → \u00a0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HF_ENDPOINT=http://me:p@ss:w0rd@mirror:80/a failed", "HF_ENDPOINT=http://***@mirror:80/a failed"),
        ("'https://ghp_abc@github.com/a/b.git'", "'https://***@github.com/a/b.git'"),
        ("https://github.com/a/b@v1 of ann@example.com", "https://github.com/a/b@v1 of ann@example.com"),
        ("Incorrect key sk-12345678, sk-12345678-more", "Incorrect key ***, ***"),
        ("a secret: hunter22hunter22!", "a secret: ***!"),
        ("short and example stay", "short and example stay"),
    ],
)
def test_messages_have_no_secrets(monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    values = {"OPENAI_API_KEY": "sk-12345678", "LONGER_KEY": "sk-12345678-more", "db_password": "hunter22hunter22\n"}
    for name, value in (values | {"SHORT_TOKEN": "short", "KEYBOARD": "example stay", "EMPTY_SECRET": ""}).items():
        monkeypatch.setenv(name, value)
    assert without_secrets(text) == expected


def test_code_stays_on_one_line_and_in_one_cell() -> None:
    assert code("data/a.jsonl") == "`data/a.jsonl`"
    assert code("a`b\n\n| <script> | ") == "`` a`b \\| <script> \\| ``"
    assert code("`") == "`` ` ``"
    assert code("") == "` `"
    assert code("a\\\\|b") == "`a\\|b`"


def test_block_indents_every_line() -> None:
    assert block("# Title\n<script>alert(1)</script>\n```\n\nend") == (
        "    # Title\n    <script>alert(1)</script>\n    ```\n    \n    end"
    )
    assert block("") == "    (empty)"


def test_heading_has_no_markup() -> None:
    assert heading("What is 2 + 2?") == "What is 2 + 2?"
    assert heading("a\n# b <img src=x> [c](javascript:d) `e`") == (r"a \# b \<img src=x\> \[c\](javascript:d) \`e\`")


hostile = st.lists(
    st.sampled_from(
        ["<script>", "</code>", "`", "```", "|", "\\", "\n", "\r", "---", "# ", "[a](javascript:b)", "*", "&lt;"]
    )
    | st.text(max_size=4)
).map("".join)


@given(text=hostile)
def test_any_text_renders_as_text_alone(text: str) -> None:
    table = COMMONMARK.parse(f"| a | b |\n|---|---|\n| c | {code(text)} |\n\nend\n")
    cells = [token.children or [] for token in table if token.type == "inline"]
    assert [[token.type for token in cell] for cell in cells[:3]] == [["text"]] * 3
    assert [token.type for token in cells[3]] in (["code_inline"], ["text"])
    assert [token.content for token in cells[4]] == ["end"]
    blocks = COMMONMARK.parse(f"## {heading(text)}\n\n{block(text)}\n\nend\n")
    kinds = [token.type for token in blocks if token.type != "inline"]
    assert kinds in (
        ["heading_open", "heading_close", "code_block", "paragraph_open", "paragraph_close"],
        ["heading_open", "heading_close", "paragraph_open", "paragraph_close"],  # a block of whitespace is not rendered
    )
    inner = [child.type for token in blocks for child in token.children or []]
    assert set(inner) <= {"text", "text_special"}
