"""Show what selecting rows by their scores does, and how the loss depends on the number of rows.

Runs the experiments below, with three seeds each: the default data, the same with a tenth of the training answers
swapped, the same with the worst tenth of the rows dropped, and parts of the default data. Writes
`benchmarks/selection.json` and `benchmarks/learning-curve.png`, and prints tables in Markdown.
"""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import vl_convert

from benchmarks.report import markdown_table
from benchmarks.verdicts import LOSS, loss, run_experiment
from review.plots import layer, quantity
from review.revisions import Revision
from review.runs import RevisionRuns
from review.verdicts import compare_runs, signed
from stages.data.files import write_json
from stages.data.tables import read_table
from stages.runtime.run import run

SWAPPED_FILE, SWAPPED_SHARE = Path("data/swapped.jsonl"), 0.1
CLEAN, SWAPPED, SELECTED = "rows-clean", "rows-swapped", "rows-selected"
SHORT = ["replicate_seeds=[1,2]", "max_new_tokens=1"]  # only losses are compared
SELECTION = ["score_rows=true", f"drop_worst_fraction={SWAPPED_SHARE}"]
FRACTIONS = {"rows-12.5%": 0.125, "rows-25%": 0.25, "rows-50%": 0.5}
MARGIN = 0.05  # nats/token, as in gates.yaml
RESULTS, PICTURE = Path(__file__).with_name("selection.json"), Path(__file__).with_name("learning-curve.png")


def main() -> None:
    swapped = write_swapped()
    try:
        experiments = {
            CLEAN: [],
            SWAPPED: [f"dataset_file={SWAPPED_FILE}"],
            SELECTED: [f"dataset_file={SWAPPED_FILE}", *SELECTION],
            **{name: [f"train_fraction={fraction}"] for name, fraction in FRACTIONS.items()},
        }
        runs = {name: run_experiment(name, SHORT + changes) for name, changes in experiments.items()}
    finally:
        subprocess.run(["git", "rm", "--quiet", "--cached", "--force", str(SWAPPED_FILE)], check=True)
        SWAPPED_FILE.unlink()
    results: dict[str, Any] = {
        "selection": {
            "swapped": len(swapped),
            "dropped": dropped(swapped),
            "comparisons": {
                "swapped against clean": compare(runs, CLEAN, SWAPPED),
                "selected against swapped": compare(runs, SWAPPED, SELECTED),
                "selected against clean": compare(runs, CLEAN, SELECTED),
            },
        },
        "curve": [
            {
                "fraction": fraction,
                "rows": Revision(name).read_json("metrics/split.json")["train"],
                "losses": {str(seed): loss(table) for seed, table in runs[name].items()},
                "against all": compare(runs, name, CLEAN) if name != CLEAN else None,
            }
            for name, fraction in {**FRACTIONS, CLEAN: 1.0}.items()
        ],
    }
    write_json(RESULTS, results)
    PICTURE.write_bytes(draw(results["curve"]))
    print(selection_table(results["selection"]), curve_table(results["curve"]), sep="\n\n")


def write_swapped() -> set[int]:
    """Write the dataset with swapped answers in a part of the training rows; returns the numbers of these rows."""
    rows = [json.loads(line) for line in Path("data/instructions.jsonl").read_text(encoding="utf-8").splitlines()]
    train = sorted(read_table(Path("data/train.parquet"), ["source_row"])["source_row"].to_pylist())
    chosen = random.Random(0).sample(train, round(SWAPPED_SHARE * len(train)))
    answers = [rows[number - 1]["output"] for number in chosen]
    for number, answer in zip(chosen, answers[1:] + answers[:1], strict=True):
        rows[number - 1]["output"] = answer
    SWAPPED_FILE.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    subprocess.run(["git", "add", str(SWAPPED_FILE)], check=True)  # `dvc exp run --temp` copies what git knows
    return set(chosen)


def dropped(swapped: set[int]) -> dict[str, int]:
    """How many rows were dropped by their scores, and how many of these have a swapped answer."""
    scores, train = (
        Revision(SELECTED).read_table(f"data/{name}.parquet", ["source_row"]) for name in ("train_scores", "train")
    )
    assert scores is not None and train is not None
    rows = set(scores["source_row"]) - set(train["source_row"])
    return {"rows": len(rows), "swapped": len(rows & swapped)}


def compare(runs: dict[str, dict[int, pd.DataFrame]], before: str, after: str) -> dict[str, Any]:
    """The verdict of a review on the test loss."""
    runs_before, runs_after = (RevisionRuns(tables=runs[name]) for name in (before, after))
    result = compare_runs(runs_before, runs_after, (before, after), {LOSS.name: MARGIN}).metric(LOSS.name)
    assert result is not None and result.difference is not None
    return {
        "before": result.before,
        "after": result.after,
        "difference": result.difference.value,
        "low": result.difference.low,
        "high": result.difference.high,
        "verdict": result.verdict,
    }


def selection_table(selection: dict[str, Any]) -> str:
    """Markdown, for the terminal and `docs/row-scores.md`."""
    dropped = selection["dropped"]
    counts = f"{dropped['rows']:,} rows were dropped, and {dropped['swapped']:,} of these had swapped answers."
    rows = comparison_table(selection["comparisons"])
    return f"{rows}\n\n{selection['swapped']:,} training rows had swapped answers. {counts}"


def comparison_table(comparisons: dict[str, dict[str, Any]]) -> str:
    """Markdown with a row for each comparison."""
    rows = [
        [name, signed(result["difference"]), interval(result), result["verdict"]]
        for name, result in comparisons.items()
    ]
    return markdown_table(["change", "difference in test loss", "95% interval", "verdict"], rows)


def curve_table(curve: list[dict[str, Any]]) -> str:
    """Markdown, for the terminal and `docs/learning-curves.md`."""
    rows = []
    for point in curve:
        losses = ", ".join(f"{value:.4f}" for value in point["losses"].values())
        change, verdict = "–", "–"
        if result := point["against all"]:
            change, verdict = f"{signed(result['difference'])} ({interval(result)})", result["verdict"]
        rows.append([f"{point['fraction']:g}", f"{point['rows']:,}", losses, change, verdict])
    return markdown_table(["train_fraction", "rows", "test losses", "all rows against it", "verdict"], rows)


def interval(result: dict[str, Any]) -> str:
    return f"{signed(result['low'])} to {signed(result['high'])}"


def draw(curve: list[dict[str, Any]]) -> bytes:
    """A picture of the test loss of each run over the number of training rows."""
    rows = [{"rows": point["rows"], "loss": value} for point in curve for value in point["losses"].values()]
    x = quantity("rows", "training rows", scale={"type": "log", "base": 2, "nice": False, "padding": 20})
    y = quantity("loss", "test loss (nats/token)", scale={"zero": False})
    layers = [layer("point", x=x, y=y), layer("line", x=x, y={**y, "aggregate": "mean"})]
    spec = {"data": {"values": rows}, "width": 420, "height": 260, "layer": layers}
    return bytes(vl_convert.vegalite_to_png(json.dumps(spec), scale=1.5))


if __name__ == "__main__":
    run(main)
