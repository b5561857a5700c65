"""Draw DVC's plots without a browser and without a network."""

import io
import json
import subprocess
import sys
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import vl_convert

from review.revisions import Revision
from review.verdicts import MetricResult
from stages.runtime.errors import UserError
from stages.runtime.files import write_text
from stages.runtime.text import printable

CURVE = "metrics/curve.csv"
POINTS = 40  # per curve in Mermaid text
COLORS = {"blue": "#4c78a8", "orange": "#f58518"}  # before, after
COLOR = {"field": "color", "type": "nominal", "scale": None}
VERDICT_COLORS = {"better": "#1a7f37", "worse": "#cf222e", "equivalent": "#4c78a8"}
THEME = {"themeVariables": {"xyChart": {"plotColorPalette": ", ".join(COLORS.values())}}}
PAGE = Path(".venv/plots.html")  # `make` sets it as DVC's plots.html_template, in .dvc/config.local


def draw(before: Revision, after: Revision) -> list[tuple[str, bytes]]:
    """For each plot in `dvc.yaml`, its title and a PNG with the curves of both revisions."""
    names = [side.name for side in (before, after)]
    command = [sys.executable, "-m", "dvc", "plots", "diff", "--json", *names]
    result = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 (a list; DVC knows both names)
    if result.returncode:
        raise UserError(f"`dvc plots diff {' '.join(names)}` failed; fix the error and review again:\n{result.stderr}")
    plots = json.loads(result.stdout)["data"].values()
    specs: list[dict[str, Any]] = [plot["content"] for parts in plots for plot in parts if plot["type"] == "vega"]
    return [(spec["title"]["text"], vl_convert.vegalite_to_png(json.dumps(spec), scale=1.5)) for spec in specs]


def forest(results: Sequence[MetricResult], caption: str) -> str:
    """A forest plot as inline SVG: for each metric or slice the difference, its interval, and the runs of each seed.

    Metrics have different units, so each has its own scale; the slices of one metric share theirs.
    """
    rows: list[dict[str, Any]] = []
    for result in results:
        if difference := result.difference:
            name, color = (
                printable(result.slice or result.metric.name),
                VERDICT_COLORS.get(result.verdict, "currentColor"),
            )
            bounds = {"low": difference.low, "high": difference.high, "value": difference.value}
            rows.append({"name": name, "color": color, **bounds})
            if len(difference.by_seed) > 1:
                rows += [{"name": name, "seed": value} for value in difference.by_seed.values()]
    if not rows:
        return ""
    ink = {"labelColor": "currentColor", "labelFontSize": 12, "labelLimit": 260}
    names = {"field": "name", "sort": list(dict.fromkeys(row["name"] for row in rows)), "title": None}
    spec = {
        "config": {
            "background": None,
            "view": {"stroke": None},
            "header": ink,
            "axis": {**ink, "domainColor": "currentColor", "tickColor": "currentColor", "tickCount": 5, "grid": False},
        },
        "data": {"values": rows},
        "facet": {"row": {**names, "header": {"labelAngle": 0, "labelAlign": "left"}}},
        "resolve": {"scale": {"x": "shared" if results[0].slice else "independent"}},
        "spec": {
            "width": 380,
            "height": 24,
            "layer": [
                layer({"type": "rule", "strokeDash": [3, 3]}, {"x": {"datum": 0}}),
                layer(
                    {"type": "rule", "size": 3}, {"x": value_of("low"), "x2": {"field": "high"}, "color": COLOR}, "low"
                ),
                layer({"type": "point", "filled": True, "size": 90}, {"x": value_of("value"), "color": COLOR}, "value"),
                layer({"type": "point", "size": 22}, {"x": value_of("seed")}, "seed"),
            ],
        },
    }
    svg = vl_convert.vegalite_to_svg(json.dumps(spec))
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>\n"


def layer(mark: dict[str, Any], encoding: dict[str, Any], field: str | None = None) -> dict[str, Any]:
    """A layer of a Vega-Lite plot, of the rows that have a value in `field`."""
    transform = [{"filter": {"field": field, "valid": True}}] if field else []
    return {"mark": {"color": "currentColor", **mark}, "encoding": encoding, "transform": transform}


def value_of(field: str) -> dict[str, Any]:
    return {"field": field, "type": "quantitative", "title": None}


def as_images(drawn: list[tuple[str, bytes]]) -> str:
    """Markdown with embedded images, for a self-contained page."""
    return " ".join(f"![{title}](data:image/png;base64,{b64encode(png).decode()})" for title, png in drawn)


def as_mermaid(before: Revision, after: Revision) -> str:
    """The loss curves as Mermaid text, which GitHub draws, because a workflow can't attach images to a comment."""
    curves = [read_curve(side) for side in (before, after)]
    charts = []
    for field, title in (("loss", "Training loss"), ("validation_loss", "Validation loss")):
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
    """The training curve, indexed by step; NaN for values that were not measured at a step."""
    content = revision.read(CURVE) or b"step,loss,validation_loss"
    with revision.user_errors(CURVE):
        return pd.read_csv(io.BytesIO(content), index_col="step", dtype=float)


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
