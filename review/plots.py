"""Pictures of DVC's plots without a browser and without the network."""

import csv
import io
import json
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import vl_convert

from review.revisions import Revision
from stages.shared.errors import UserError
from stages.shared.files import write_text

CURVE = "metrics/curve.csv"
POINTS = 40  # of a curve as text
COLOURS = {"blue": "#4c78a8", "orange": "#f58518"}  # before, after
THEME = {"themeVariables": {"xyChart": {"plotColorPalette": ", ".join(COLOURS.values())}}}
PAGE = Path(".venv/plots.html")  # `make` sets it as DVC's plots.html_template, in .dvc/config.local


def pictures(before: Revision, after: Revision) -> list[tuple[str, bytes]]:
    """The title of each plot in `dvc.yaml` and a PNG with both revisions on top of each other."""
    names = [side.name for side in (before, after)]
    command = [sys.executable, "-m", "dvc", "plots", "diff", "--json", *names]
    result = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 (a list; DVC knows both names)
    if result.returncode:
        raise UserError(
            f"`dvc plots diff {' '.join(names)}` failed; mend what it says and review again:\n{result.stderr}"
        )
    plots = json.loads(result.stdout)["data"].values()
    specs: list[dict[str, Any]] = [plot["content"] for parts in plots for plot in parts if plot["type"] == "vega"]
    return [(spec["title"]["text"], vl_convert.vegalite_to_png(json.dumps(spec), scale=1.5)) for spec in specs]


def as_images(drawn: list[tuple[str, bytes]]) -> str:
    """Markdown with the pictures in it, for a page that stands alone."""
    return " ".join(f"![{title}](data:image/png;base64,{b64encode(png).decode()})" for title, png in drawn)


def as_mermaid(before: Revision, after: Revision) -> str:
    """The training and validation losses as text that GitHub draws, since a comment there can't bring pictures."""
    curves = [read_curve(side) for side in (before, after)]
    charts = []
    for field, title in (("loss", "Training loss"), ("validation_loss", "Validation loss")):
        lines = [[(step, row[field]) for step, row in curve.items() if row[field] is not None] for curve in curves]
        if min(map(len, lines)) < 2:
            continue
        num = min(POINTS, max(map(len, lines)))
        drawn = [resample(line, num) for line in lines]
        low, high = min(map(min, drawn)), max(map(max, drawn))
        charts += [
            "```mermaid",
            f"%%{{init: {json.dumps(THEME)}}}%%",
            "xychart-beta",
            f'    title "{title}: {" before, ".join(COLOURS)} after"',
            '    x-axis "from the first to the last point, %" 0 --> 100',
            f'    y-axis "nats a token" {low - 0.02:.2f} --> {high + 0.02:.2f}',
            *(f"    line [{', '.join(f'{loss:.3f}' for loss in line)}]" for line in drawn),
            "```",
        ]
    return "\n".join(charts)


def read_curve(revision: Revision) -> dict[int, dict[str, float | None]]:
    """The points of a training curve by step; None where something was not measured at that step."""
    rows = csv.DictReader(io.StringIO((revision.read(CURVE) or b"").decode()))
    return {int(row["step"]): {name: float(value) if value else None for name, value in row.items()} for row in rows}


def resample(line: list[tuple[int, float | None]], num: int) -> list[float]:
    """`num` values at equal distances over the steps of a line: two runs may differ in their number of steps."""
    steps, values = zip(*line, strict=True)
    return [float(value) for value in np.interp(np.linspace(steps[0], steps[-1], num), steps, values)]


def write_page() -> None:
    """A template for the HTML of `dvc plots`, with vega inside: DVC's own fetches it from the network at each look."""
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    write_text(
        PAGE,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{refresh_tag}<title>Plots</title>\n'
        "<style>body { font: 15px sans-serif; margin: 2rem } div { display: inline-block; margin: 1rem }</style>\n"
        f"<script>{script}</script></head>\n<body>{{plot_divs}}</body></html>\n",
    )


if __name__ == "__main__":
    write_page()
