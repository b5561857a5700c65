"""The review as Markdown and as a page: foreign words stay words, changed ones are marked, all is in the page."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from review import plots, report
from review.gates import Gate, read_gates
from stages.shared.errors import UserError


def rendered(cell: str) -> str:
    """The HTML of a cell in a table."""
    html = str(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(report.table(["a"], [[cell]])))
    cells = re.findall("<td>(.*?)</td>", html, re.DOTALL)
    assert len(cells) == 1
    return str(cells[0])


def test_changed_words_are_marked_and_equal_ones_are_not() -> None:
    before, after = report.marked("The capital is Sydney, of course.", "The capital is now Canberra, of course.")
    assert before == "The capital is ~~Sydney,~~ of course."
    assert after == "The capital is **now Canberra,** of course."
    assert rendered(before) == "The capital is <s>Sydney,</s> of course."
    assert rendered(after) == "The capital is <strong>now Canberra,</strong> of course."


def test_an_answer_that_only_one_revision_has_is_said() -> None:
    assert report.marked(None, "Red.") == ("(no such prompt)", "Red.")
    assert report.marked("", "Red.") == ("", "**Red.**")


def test_line_ends_stay_visible_in_a_cell() -> None:
    assert report.text("one\n\n two\n") == "one ⏎ two"


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ("@octocat", "@\u2060octocat"),  # GitHub would send a mail
        ("fixes #12", "fixes #\u206012"),  # GitHub would link, and close, an issue
        ("https://example.com", "https:\u2060//example.com"),
        ("www.example.com", "www\u2060.example.com"),
        ("| a | b |", "| a | b |"),
        ("**bold** `code` [a](b)", "**bold** `code` [a](b)"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("<!-- sft-pipeline review -->", "&lt;!-- sft-pipeline review --&gt;"),
        ("\x1b[31m", "\\x1b[31m"),
    ],
)
def test_foreign_words_are_no_markup_no_mention_and_no_link(words: str, seen: str) -> None:
    assert rendered(report.text(words)) == seen


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_text_breaks_out_of_its_cell(before: str, after: str) -> None:
    for cell in report.marked(before, after):
        inside = rendered(cell)
        assert re.findall("<(?!/?(?:s|strong)>)", inside) == []


def test_the_page_has_no_script_and_nothing_from_elsewhere() -> None:
    image = plots.as_images([("Loss", b"\x89PNG")])
    page = report.page(f"# Review\n\n<script>alert(1)</script>\n\n{image}\n", "a </title><script>")
    assert "<script" not in page
    assert "<title>a &lt;/title&gt;&lt;script&gt;</title>" in page
    assert re.findall('(?:src|href)="(.{10})', page) == ["data:image"]
    assert "default-src 'none'; img-src data:" in page


def test_a_curve_is_resampled_to_the_same_share_of_the_run() -> None:
    assert plots.resample([(10, 4.0), (20, 2.0), (30, 1.0)], 5) == [4.0, 3.0, 2.0, 1.5, 1.0]


def test_the_page_of_dvc_plots_brings_vega_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plots.write_page()
    page = plots.PAGE.read_text()
    assert page.count("{plot_divs}") == page.count("{refresh_tag}") == 1
    assert "{scripts}" not in page  # where DVC would put what comes from the network
    assert "window.vegaEmbed" in page
    assert re.findall(r"<script[^>]+src|<link", page) == []


@pytest.mark.parametrize("template", sorted(Path(".dvc/plots").glob("*.json")), ids=lambda path: path.stem)
def test_a_template_of_plots_is_drawn(template: Path) -> None:
    anchors = {
        "DATA": [{"rev": "a", "x": 1, "y": 2.5}, {"rev": "a", "x": 2, "y": ""}, {"rev": "b", "x": 3, "y": 1.5}],
        "TITLE": "Loss",
        "X": "x",
        "Y": "y",
        "X_LABEL": "optimizer step",
        "Y_LABEL": "nats a token",
        "PLOT_WIDTH": 300,
        "PLOT_HEIGHT": 300,
        "COLOR": {"field": "rev"},
        "STROKE_DASH": {},
        "ZOOM_AND_PAN": {"name": "grid", "select": "interval", "bind": "scales"},
    }
    text = template.read_text()
    for name, value in anchors.items():
        text = text.replace(f'"<DVC_METRIC_{name}>"', json.dumps(value))
    assert "DVC_METRIC" not in text
    svg = plots.vl_convert.vegalite_to_svg(text)
    assert "optimizer step" in svg
    assert "nats a token" in svg


def test_gates_are_read() -> None:
    assert read_gates() == {
        "loss": Gate(not_worse=True),
        "token_accuracy": Gate(not_worse=True),
        "stop_rate": Gate(min=0.95),
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("loss: {min: low}", "loss.min: Input should be a valid number"),
        ("loss: {least: 1}", "loss.least: Extra inputs are not permitted"),
        ("loss: 3", "loss: Input should be a valid dictionary or instance of Gate"),
        ("loss: {min: .nan}", "loss.min: Input should be a finite number"),
        ("- loss", "Input should be a valid dictionary"),
        ("loss: {min: 1", "not valid YAML"),
        ("mean_response_tokens: {not_worse: true}", "mean_response_tokens: not_worse; must be one of loss, token_acc"),
    ],
)
def test_a_file_that_is_no_gates_is_said(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "gates.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(expected)):
        read_gates(path)


def test_no_file_is_no_gates(tmp_path: Path) -> None:
    assert read_gates(tmp_path / "gates.yaml") == {}
