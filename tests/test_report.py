"""The review as Markdown and as a page: untrusted text stays text, changed words are marked; also plots and gates."""

import math
import re
import xml.dom.minidom
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from dvc_render.vega import VegaRenderer
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from review import markup, plots, report
from review.conditions import Gate, parse
from review.statistics import Difference, Variances
from review.verdicts import MetricResult
from stages.runtime.errors import UserError
from stages.scoring.metrics import METRICS


def rendered(cell: str) -> str:
    """The HTML of a cell in a table."""
    html = str(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markup.table(["a"], [[cell]])))
    cells = re.findall("<td>(.*?)</td>", html, re.DOTALL)
    assert len(cells) == 1
    return str(cells[0])


def test_only_changed_words_are_highlighted() -> None:
    before, after = markup.highlight_diff(
        "The capital is Sydney, of course.", "The capital is now Canberra, of course."
    )
    assert before == "The capital is ~~Sydney,~~ of course."
    assert after == "The capital is **now Canberra,** of course."
    assert rendered(before) == "The capital is <s>Sydney,</s> of course."
    assert rendered(after) == "The capital is <strong>now Canberra,</strong> of course."


def test_missing_answer_is_reported() -> None:
    assert markup.highlight_diff(None, "Red.") == ("(no such prompt)", "Red.")
    assert markup.highlight_diff("", "Red.") == ("", "**Red.**")


def test_line_breaks_become_symbols_in_a_cell() -> None:
    assert markup.text("one\n\n two\n") == "one ⏎ two"


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("@octocat", "@\u2060octocat"),  # on GitHub a mention, which sends an email
        ("fixes #12", "fixes #\u206012"),  # on GitHub a reference, which closes an issue
        ("fixes GH-12", "fixes GH-\u206012"),
        ("https://example.com", "https:\u2060//example.com"),
        ("www.example.com", "www\u2060.example.com"),
        ("| a | b |", "| a | b |"),
        ("**bold** `code` [a](b)", "**bold** `code` [a](b)"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("<!-- sft-pipeline review -->", "&lt;!-- sft-pipeline review --&gt;"),
        ("\x1b[31m", "\\x1b[31m"),
    ],
)
def test_untrusted_text_is_not_markup_mention_or_link(content: str, shown: str) -> None:
    assert rendered(markup.text(content)) == shown


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_text_escapes_from_its_cell(before: str, after: str) -> None:
    for cell in markup.highlight_diff(before, after):
        assert re.findall("<(?!/?(?:s|strong)>)", rendered(cell)) == []


def test_page_has_no_scripts_and_no_external_resources() -> None:
    image = plots.as_image("Loss", b"\x89PNG")
    page = markup.page(f"# Review\n\n<script>alert(1)</script>\n\n{image}\n", "a </title><script>", {})
    assert "<script" not in page
    assert "<title>a &lt;/title&gt;&lt;script&gt;</title>" in page
    assert re.findall('(?:src|href)="(.{10})', page) == ["data:image"]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page


def test_curves_are_resampled_at_equal_fractions_of_the_run() -> None:
    assert plots.resample(pd.Series([4.0, 2.0, 1.0], [10, 20, 30]), 5) == [4.0, 3.0, 2.0, 1.5, 1.0]


def test_page_of_dvc_plots_includes_vega(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plots.write_page()
    page = plots.PAGE.read_text()
    assert page.count("{plot_divs}") == page.count("{refresh_tag}") == 1
    assert "{scripts}" not in page  # DVC would put links to external scripts here
    assert "window.vegaEmbed" in page
    assert re.findall(r"<script[^>]+src|<link", page) == []


@pytest.mark.parametrize("template", sorted(Path(".dvc/plots").glob("*.json")), ids=lambda path: path.stem)
def test_plot_template_is_drawn(template: Path) -> None:
    rows = [{"rev": "a", "x": 1, "y": 2.5}, {"rev": "a", "x": 2, "y": ""}, {"rev": "b", "x": 3, "y": 1.5}]
    axes = {"x": "x", "y": "y", "x_label": "optimizer step", "y_label": "nats/token"}
    renderer = VegaRenderer(rows, "plot", template=str(template), revs_with_datapoints=["a", "b"], **axes)
    svg = plots.vl_convert.vegalite_to_svg(renderer.get_filled_template())
    assert "optimizer step" in svg
    assert "nats/token" in svg


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("loss: {min: low}", "  loss.min: found 'low': Input should be a valid number"),
        ("loss: {least: 1}", "  loss.least: found 1: Extra inputs are not permitted"),
        ("loss: 3", "  loss: found 3: Input should be a valid dictionary or instance of Gate"),
        ("loss: {min: .nan}", "  loss.min: found nan: Input should be a finite number"),
        ("- loss", "  content: found ['loss']: Input should be a valid dictionary"),
        ("loss: {min: 1", "not valid YAML"),
        ("loss: {not_worse: true}", "  loss.not_worse: found True: Extra inputs are not permitted"),
        ("loss: {not_worse_by: -0.1}", "  loss.not_worse_by: found -0.1: Input should be greater than or equal to 0"),
        ("loss: {}", "  loss: found {}: Value error, has no condition"),
    ],
)
def test_invalid_gates_are_reported(content: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        parse(content.encode(), "gates.yaml of main", dict[str, Gate], "")


def test_an_empty_gates_file_means_no_gates() -> None:
    assert parse(b"# none", "gates.yaml of main", dict[str, Gate], "") == {}


def result(low: float, high: float, verdict: str, by_seed: dict[int, float], **changes: Any) -> MetricResult:
    variances = Variances(50, 0.1, 0.0, 0.0, 1 / 3, 2, is_paired=True)
    difference = Difference(1.0, 1.0 + (low + high) / 2, low, high, 0.01, by_seed, variances)
    return MetricResult(METRICS[0], 1.0, difference.after, difference, 0.01, verdict, **changes)


def test_forest_plot_has_a_row_for_each_result_and_a_circle_for_each_seed() -> None:
    results = [result(-0.3, -0.1, "better", {42: -0.2, 1: -0.25, 2: -0.15}), result(-0.1, 0.1, "undecided", {42: 0.0})]
    svg = plots.forest(
        [replace(one, slice=name) for one, name in zip(results, ("colors", "math"), strict=True)], "By slice"
    )
    assert svg.endswith("</svg><figcaption>By slice</figcaption></figure>\n")
    assert ">colors</text>" in svg
    assert ">math</text>" in svg
    assert svg.count('fill="#1a7f37"') == 1  # the better one is green
    assert "<script" not in svg
    assert re.findall('aria-label="seed: ([^"]*)"', svg) == ["−0.2", "−0.25", "−0.15"]
    assert plots.forest([replace(results[0], difference=None)], "") == ""
    assert plots.forest([result(-math.inf, 0.1, "undecided", {})], "") == ""


def test_a_forest_plot_has_the_first_hundred_of_many_slices() -> None:
    slices = [replace(result(-0.3, -0.1, "better", {}), slice=f"slice {number}") for number in range(4000)]
    svg = plots.forest(slices, "Loss")
    assert ">slice 99</text>" in svg
    assert ">slice 100</text>" not in svg
    assert "<figcaption>Loss; the first 100 of 4,000</figcaption>" in svg


def test_slices_with_long_names_keep_rows_of_their_own() -> None:
    better = result(-0.3, -0.1, "better", {})
    svg = plots.forest([replace(better, slice="x" * 70 + end) for end in "ab"], "")
    assert [len(name) for name in re.findall(">(x+…?)</text>", svg)] == [60, 61]


@given(st.text(max_size=40))
@example("\ufffe\uffff")  # not allowed in XML; vl_convert aborts
@example("x" * 30 + "\U0001f600" * 200)
def test_no_name_of_a_slice_adds_markup_to_the_forest_plot(name: str) -> None:
    svg = plots.forest([replace(result(-0.3, -0.1, "better", {}), slice=f"<script>&{name}")], "<b>")
    assert re.findall("<script|<image|<a |<b>|href=", svg) == []
    assert xml.dom.minidom.parseString(svg).documentElement.tagName == "figure"


def test_page_has_a_figure_after_the_table_of_its_section_and_no_script() -> None:
    table = markup.table(["name"], [["x"]])
    content = f"# Review\n\n## Gates\n\n{table}\n\n## Metrics & more\n\n{table}\n\ntext\n\n{table}\n"
    page = markup.page(content, "a → <b>", {"Metrics & more": "<svg>plot</svg>", "Slices": "<svg>none</svg>"})
    assert [*re.findall("<h2>.*?</h2>|<table>|<svg>.*?</svg>|<p>text", page)] == [
        "<h2>Gates</h2>",
        "<table>",
        "<h2>Metrics &amp; more</h2>",
        "<table>",
        "<svg>plot</svg>",
        "<p>text",
        "<table>",
    ]
    assert "<title>a → &lt;b&gt;</title>" in page
    assert "color-scheme: light dark" in page


def test_needed_examples_and_runs_are_shown_for_differences_that_are_not_significant() -> None:
    undecided = replace(result(-0.3, 0.1, "undecided", {}), p_value=0.4)
    assert report.result_cells(undecided) == [
        *("1.0000", "0.9000", "−0.1000 (−0.3000 to +0.1000)", "0.400", "0.1275", "81 prompts", "undecided")
    ]
    assert report.result_cells(result(-0.3, -0.1, "better", {}))[5:] == ["", "✓ better"]
