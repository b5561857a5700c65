"""Plots of a reviewed revision: the reason if one can't be drawn, and no access to files or the network."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from review import plots
from review.revisions import Revision
from stages.runtime.errors import UserError
from tests.clone import commit, environment, run

CURVE = "step,loss,validation_loss\n1,3.0,\n2,2.0,2.5\n3,1.0,2.0\n"
PLOT = {"x": "step", "y": {"metrics/curve.csv": "loss"}, "title": "Loss"}
POINTS: dict[str, Any] = {"mark": "point", "encoding": {"x": {"field": "x", "type": "quantitative"}}}
PNG = b"\x89PNG\r\n\x1a\n"
IMAGE = re.compile(r"!\[([^\n]*?)\]\(data:image/png;base64,iVBORw0KGgo[\w+/=]*\)")


@pytest.mark.parametrize(
    ("title", "text"),
    [
        ("Loss", "Loss"),
        (["two", "lines"], "two lines"),
        ({"text": "Loss", "anchor": "middle"}, "Loss"),
        ({"text": ["two", "lines"]}, "two lines"),
        ({"anchor": "middle"}, ""),
        (None, ""),
        (7, "7"),
        ("x" * 300, "x" * 240 + " …"),
    ],
)
def test_the_title_of_a_plot_may_be_of_any_kind(title: Any, text: str) -> None:
    assert plots.title_of({"type": "vega", "content": {"title": title}}) == text


class Side(Revision):
    """A revision that has only a training curve."""

    def __init__(self, name: str, curve: bytes) -> None:
        self.name, self.curve = name, curve

    def read(self, path: str) -> bytes:
        return self.curve


@pytest.mark.parametrize(
    ("curve", "reason"),
    [
        (f"<<<<<<< HEAD\n{CURVE}", "could not convert string to float: 'step'"),
        ("step,loss,validation_loss\n1,high,2.0\n", "could not convert string to float: 'high'"),
        ("step,loss\n1,2.0\n2,1.0\n", "\"\\['validation\\_loss'\\] not in index\""),
        ("loss\n1.0\n", "Index step invalid"),
    ],
)
def test_a_damaged_curve_is_named_with_its_revision_and_the_reason(curve: str, reason: str) -> None:
    assert plots.as_mermaid(Side("main", CURVE.encode()), Side("new", curve.encode())) == (
        f"The curves can't be drawn: metrics/curve.csv of new: can't be read: {reason}; "
        "\\`dvc repro\\` in a checkout of that revision writes it again"
    )


def test_values_that_are_not_finite_are_not_in_the_curve() -> None:
    diverged = CURVE + "4,inf,nan\nnan,1.0,1.0\n"
    sides = Side("main", CURVE.encode()), Side("new", diverged.encode())
    assert plots.as_mermaid(*sides) == plots.as_mermaid(sides[0], sides[0])


def test_a_reason_has_no_secrets_and_is_one_line() -> None:
    assert plots.reason("https://me:12345678@host\n failed") == "https://***@host failed"  # kingfisher:ignore


def png(spec: object) -> bytes:
    return plots.png_of({"type": "vega", "content": spec})


@pytest.mark.subprocess
def test_a_plot_loads_nothing_from_the_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match="External data url not allowed: http://127"):
            png(POINTS | {"data": {"url": f"{address}/data.json"}})
        image = {"mark": "image", "encoding": {"url": {"field": "url"}}}
        with pytest.raises(UserError, match="image marks are not drawn"):
            png(image | {"data": {"values": [{"url": f"{address}/image.png"}]}})
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()  # nothing has connected


@pytest.mark.subprocess
def test_a_plot_reads_no_files(tmp_path: Path) -> None:
    def spec(data: dict[str, Any]) -> dict[str, Any]:
        return POINTS | {"data": data}

    (tmp_path / "data.json").write_text('[{"x": 1}, {"x": 2}, {"x": 9}]')
    assert png(spec({"url": f"file://{tmp_path}/data.json"})) == png(spec({"values": []}))
    with pytest.raises(UserError, match="External data url not allowed"):
        png(spec({"url": f"{tmp_path}/data.json"}))


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ([], "Invalid specification []. Make sure the specification includes at least one of the following"),
        (POINTS | {"mark": "unknown"}, "Cannot read properties of undefined"),
        (POINTS | {"data": {"values": []}, "width": 9000, "height": 900}, "pixels are too many; at most 4,000,000"),
    ],
    ids=["no plot", "unknown mark", "too many pixels"],
)
def test_a_plot_that_vega_lite_refuses_has_a_reason(spec: object, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        png(spec)


@pytest.mark.subprocess
def test_a_program_that_the_system_ends_has_a_reason() -> None:
    """V8 aborts if it runs out of memory."""
    with pytest.raises(UserError, match="the program ended with exit code -6; the plot may be too large"):
        plots.run_module("timeit", "--number=1", "--repeat=1", "import os; os.abort()")


@pytest.mark.subprocess
def test_a_plot_that_takes_too_long_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "MAX_SECONDS", 0.01)
    with pytest.raises(UserError, match="not finished after"):
        png(POINTS)


def test_an_image_file_is_not_shown() -> None:
    with pytest.raises(UserError, match="it is an image file"):
        plots.png_of({"type": "image", "url": "image.png"})


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plots")
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "dvc", "init", "--quiet")
    (folder / "metrics").mkdir()
    (folder / plots.CURVE).write_text(CURVE)
    write_plots(folder, PLOT)
    commit(folder, "before")
    return folder


@pytest.fixture
def folder(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The repository with a clean workspace, which a test changes."""
    monkeypatch.chdir(repository)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    yield repository
    run(repository, "git", "checkout", "-q", ".")
    run(repository, "git", "clean", "-d", "--force", "--quiet")


def write_plots(folder: Path, *definitions: dict[str, Any]) -> None:
    named = [{f"plot{number}": definition} for number, definition in enumerate(definitions, 1)]
    (folder / "dvc.yaml").write_text(json.dumps({"plots": named}))


def write_template(folder: Path, content: str) -> None:
    (folder / ".dvc/plots").mkdir()
    (folder / ".dvc/plots/mine.json").write_text(content)


def drawn() -> list[str]:
    """The paragraphs of the Markdown, without the data of images."""
    return IMAGE.sub(r"![\1]", plots.draw(Revision("HEAD"), Revision("workspace"))).split("\n\n")


@pytest.mark.subprocess
def test_one_plot_that_can_not_be_drawn_does_not_prevent_the_others(folder: Path) -> None:
    write_template(
        folder, json.dumps(POINTS | {"mark": "x", "title": "*Mine*", "data": {"values": "<DVC_METRIC_DATA>"}})
    )
    write_plots(folder, PLOT, PLOT | {"template": "mine"}, PLOT | {"y": {"metrics/none.csv": "loss"}, "x": "step"})
    assert drawn() == [
        "![Loss]",
        "metrics/none.csv of workspace: can't be plotted: \\[Errno 2\\] No such file or directory: 'metrics/none.csv'",
        "\\*Mine\\*: this plot can't be drawn: Cannot read properties of undefined (reading 'filled')",
    ]


@pytest.mark.subprocess
def test_an_unknown_or_damaged_template_is_the_reason_why_there_are_no_plots(folder: Path) -> None:
    write_plots(folder, PLOT | {"template": "mine"})
    failed = "The plots can't be drawn: \\`dvc plots diff\\` failed: "
    assert drawn() == [f"{failed}Template 'mine' not found."]
    write_template(folder, "{")
    assert drawn() == [f"{failed}Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"]


@pytest.mark.subprocess
def test_without_plots_nothing_is_drawn(folder: Path) -> None:
    run(folder, "git", "rm", "-q", "dvc.yaml")
    run(folder, "git", "commit", "-q", "-m", "no plots")
    assert drawn() == [""]
    run(folder, "git", "reset", "-q", "--hard", "HEAD~1")
