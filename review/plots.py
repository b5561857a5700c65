"""Draw DVC's plots without a browser and without a network."""

import io
import json
import os
import re
import subprocess
import sys
import textwrap
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import vl_convert

from review.markup import text, truncate
from review.revisions import Revision
from review.verdicts import MetricResult
from stages.data.files import write_text
from stages.runtime.errors import UserError, user_errors
from stages.runtime.secrets import without_secrets
from stages.text import printable

CURVE = "metrics/curve.csv"
LOSSES = {"loss": "Training loss", "validation_loss": "Validation loss"}
POINTS = 40  # per curve in Mermaid text
COLORS = {"blue": "#4c78a8", "orange": "#f58518"}  # before, after
COLOR = {"field": "color", "type": "nominal", "scale": None}
VERDICT_COLORS = {"better": "#1a7f37", "worse": "#cf222e", "equivalent": "#4c78a8"}
THEME = {"themeVariables": {"xyChart": {"plotColorPalette": ", ".join(COLORS.values())}}}
MAX_ROWS = 100  # of a forest plot; Vega-Lite fails for thousands
MAX_NAME = 60  # characters
MAX_SECONDS = 120  # to read the plots, and to draw one
PAGE = Path(".venv/plots.html")  # `make` sets it as DVC's plots.html_template, in .dvc/config.local


def draw(before: Revision, after: Revision) -> str:
    """Markdown with an image of each plot in `dvc.yaml`, with the curves of both revisions, or why there is none."""
    try:
        with TemporaryDirectory() as folder:  # DVC writes image files there
            plots = json.loads(run_module("dvc", "plots", "diff", "--json", "--out", folder, before.name, after.name))
    except UserError as error:
        return text(f"The plots can't be drawn: `dvc plots diff` failed: {error}")
    errors = []
    for failure in plots.get("errors", []):
        where = failure.get("source") or failure.get("name") or "dvc.yaml"
        errors.append(f"{where} of {failure['rev']}: can't be plotted: {reason(failure['msg'] or failure['type'])}")
    errors = list(dict.fromkeys(errors))  # several plots may need the same file
    images = []
    for name, parts in plots.get("data", {}).items():
        for part in parts:
            title = title_of(part) or name
            try:
                images.append(as_image(title, png_of(part)))
            except UserError as error:
                errors.append(f"{title}: this plot can't be drawn: {error}")
    return "\n\n".join([" ".join(images), *map(text, errors)]).strip()


def title_of(plot: dict[str, Any]) -> str:
    """The title of a plot, which may be text, lines of text or an object with such a text."""
    title = plot.get("content", {}).get("title")
    lines = title.get("text") if isinstance(title, dict) else title
    return truncate(" ".join(map(str, lines)) if isinstance(lines, list) else str(lines or ""))


def png_of(plot: dict[str, Any]) -> bytes:
    """The plot as an image.

    Raises:
        UserError: it is an image file, or Vega-Lite refuses it.
    """
    if plot["type"] != "vega":
        raise UserError("it is an image file")
    return run_module("review.draw", stdin=json.dumps(plot["content"]).encode())


def run_module(*command: str, stdin: bytes = b"") -> bytes:
    """The standard output of a Python program.

    Raises:
        UserError: it failed or took too long.
    """
    try:
        result = subprocess.run(  # noqa: S603 (a list; git or DVC knows the revisions)
            [sys.executable, "-m", *command],
            input=stdin,
            capture_output=True,
            timeout=MAX_SECONDS,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"not finished after {MAX_SECONDS} s") from None
    if result.returncode:
        stderr = result.stderr.decode(errors="replace")
        message = re.search(r"^\w*error: (?:unexpected error - )?(.+)", stderr, re.IGNORECASE | re.MULTILINE)
        too_large = f"the program ended with exit code {result.returncode}; the plot may be too large"
        raise UserError(reason(message[1]) if message else too_large)
    return result.stdout


def reason(message: str) -> str:
    return textwrap.shorten(without_secrets(message), 300, placeholder=" ...")


def forest(results: Sequence[MetricResult], caption: str) -> str:
    """A forest plot as inline SVG: for each metric or slice the difference, its interval, and the runs of each seed.

    Metrics have different units, so each has its own scale; the slices of one metric share theirs.
    """
    rows: list[dict[str, Any]] = []
    if len(results) > MAX_ROWS:
        caption += f"; the first {MAX_ROWS} of {len(results):,}"
    for result in results[:MAX_ROWS]:
        difference = result.difference
        if difference and np.isfinite([difference.low, difference.high, *difference.by_seed.values()]).all():
            color = VERDICT_COLORS.get(result.verdict, "currentColor")
            name = printable(result.slice or result.metric.name)[:MAX_NAME]
            while any(row["name"] == name for row in rows):  # rows with one name would be drawn as one
                name += "…"
            bounds = {"low": difference.low, "high": difference.high, "value": difference.value}
            rows.append({"name": name, "color": color, **bounds})
            if len(difference.by_seed) > 1:
                rows += [{"name": name, "seed": value} for value in difference.by_seed.values()]
    if not rows:
        return ""
    # The whole names, because Vega cuts emoji in half and fails.
    ink = {"labelColor": "currentColor", "labelFontSize": 12, "labelLimit": 0}
    axis = {**ink, "domainColor": "currentColor", "tickColor": "currentColor", "tickCount": 5, "grid": False}
    header = {"labelAngle": 0, "labelAlign": "left"}
    names = list(dict.fromkeys(row["name"] for row in rows))
    layers = [
        layer({"type": "rule", "strokeDash": [3, 3], "color": "currentColor"}, x={"datum": 0}),
        layer({"type": "rule", "size": 3}, x=quantity("low"), x2={"field": "high"}, color=COLOR),
        layer({"type": "point", "filled": True, "size": 90}, x=quantity("value"), color=COLOR),
        layer({"type": "point", "size": 22, "color": "currentColor"}, x=quantity("seed")),
    ]
    spec = {
        "config": {"background": None, "view": {"stroke": None}, "header": ink, "axis": axis},
        "data": {"values": rows},
        "facet": {"row": {"field": "name", "sort": names, "title": None, "header": header}},
        "resolve": {"scale": {"x": "shared" if results[0].slice else "independent"}},
        "spec": {"width": 380, "height": 24, "layer": layers},
    }
    svg = vl_convert.vegalite_to_svg(json.dumps(spec))
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>\n"


def layer(mark: Any, **encoding: Any) -> dict[str, Any]:
    return {"mark": mark, "encoding": encoding}


def quantity(field: str, title: str | None = None, **options: Any) -> dict[str, Any]:
    """The encoding of an axis of numbers in Vega-Lite."""
    return {"field": field, "type": "quantitative", "title": title, **options}


def as_image(title: str, png: bytes) -> str:
    """Markdown with an embedded image, for a self-contained page."""
    return f"![{text(title)}](data:image/png;base64,{b64encode(png).decode()})"


def as_mermaid(before: Revision, after: Revision) -> str:
    """The loss curves as Mermaid text, which GitHub draws, because a workflow can't attach images to a comment."""
    try:
        curves = [read_curve(side) for side in (before, after)]
    except UserError as error:
        return text(f"The curves can't be drawn: {error}")
    charts = []
    for field, title in LOSSES.items():
        lines = [curve[field].dropna() for curve in curves]
        if min(map(len, lines)) < 2:
            continue
        num = min(POINTS, max(map(len, lines)))
        drawn = [resample(line, num) for line in lines]
        low, high = min(map(min, drawn)), max(map(max, drawn))
        charts += [
            "```mermaid",
            f"%%{{init: {json.dumps(THEME)}}}%%",
            "xychart-beta",
            f'    title "{title}: {" before, ".join(COLORS)} after"',
            '    x-axis "progress of training, %" 0 --> 100',
            f'    y-axis "nats/token" {low - 0.02:.2f} --> {high + 0.02:.2f}',
            *(f"    line [{', '.join(f'{loss:.3f}' for loss in line)}]" for line in drawn),
            "```",
        ]
    return "\n".join(charts)


def read_curve(revision: Revision) -> pd.DataFrame:
    """The training curve, indexed by step; NaN for values that were not measured at a step or are not finite.

    Raises:
        UserError: the file is damaged.
    """
    content = revision.read(CURVE) or ",".join(["step", *LOSSES]).encode()
    with user_errors(f"{CURVE} of {revision.name}", "`dvc repro` in a checkout of that revision writes it again"):
        curve = pd.read_csv(io.BytesIO(content), index_col="step", dtype=float)[[*LOSSES]]
        return curve.where(np.isfinite(curve))[np.isfinite(curve.index)]


def resample(curve: "pd.Series[float]", num: int) -> list[float]:
    """`num` evenly spaced values of a curve, because two runs may differ in their number of steps."""
    steps = np.linspace(curve.index[0], curve.index[-1], num)
    return [float(value) for value in np.interp(steps, curve.index, curve)]


def write_page() -> None:
    """Write an HTML template for `dvc plots` that includes Vega; DVC's own template loads it from the network."""
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    write_text(
        PAGE,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{refresh_tag}<title>Plots</title>\n'
        "<style>body { font: 15px sans-serif; margin: 2rem } div { display: inline-block; margin: 1rem }</style>\n"
        f"<script>{script}</script></head>\n<body>{{plot_divs}}</body></html>\n",
    )


if __name__ == "__main__":
    write_page()
