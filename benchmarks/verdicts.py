"""Validate the verdicts of a review by simulation, where the truth is known, and on real runs that differ in seed only.

Runs the experiments below, then writes `benchmarks/verdicts.json` and `benchmarks/verdicts.png`, and prints tables in
Markdown.
"""

import json
import math
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import vl_convert

from review.revisions import Revision
from review.runs import RevisionRuns, find_runs, read_runs
from review.statistics import SIGNIFICANCE, Runs, compare
from review.verdicts import compare_runs, metric_runs, signed
from stages.data.files import write_json
from stages.runtime.run import run
from stages.runtime.terminal import progress
from stages.scoring.metrics import METRICS

DEFAULT = "run-noise"
EXPERIMENTS = {  # the default with six training seeds, and changes of it with three of them
    DEFAULT: ["replicate_seeds=[1,2,3,4,5]"],
    "lr-1e-4": ["replicate_seeds=[1,2]", "learning_rate=1e-4"],
    "weight-decay": ["replicate_seeds=[1,2]", "weight_decay=0.1"],
    "batch-size": ["replicate_seeds=[1,2]", "gradient_accumulation_steps=8"],
    "fewer-rows": ["replicate_seeds=[1,2]", "max_examples=960"],  # 5% fewer
}
RESULTS, PICTURE = Path(__file__).with_name("verdicts.json"), Path(__file__).with_name("verdicts.png")
REVIEWS = 500  # simulated for each combination
NUM_RUNS, NUM_PROMPTS, EFFECTS = (2, 3, 5), (50, 100, 300, 1000), (0, 1, 2, 4)
# Standard deviations in nats/token, as measured on the default data: of the test loss between seeds, of the difference
# between two learning rates between seeds, of this difference between prompts, and of what remains.
RUN_NOISE, PAIRED_RUN_NOISE, PROMPT_NOISE, RESIDUAL_NOISE = 0.007, 0.003, 0.064, 0.04
LOSS = METRICS[0]
DESIGNS = {"same seeds": "paired", "other seeds": "pooled", "a single new run": "pooled"}


def main() -> None:
    real = {name: run_experiment(name, changes) for name, changes in EXPERIMENTS.items()}
    cells = list(simulated_cells())
    results = {
        "simulation": [simulate(*cell) for cell in progress(cells, "simulate", "setting", len(cells))],
        "test_losses": {str(seed): loss(table) for seed, table in real[DEFAULT].items()},
        "changes": {name: paired_noise(real[DEFAULT], tables) for name, tables in real.items() if name != DEFAULT},
        "pairs": compare_pairs(real[DEFAULT]),
    }
    write_json(RESULTS, results)
    PICTURE.write_bytes(draw(results))
    print(tables(results))


def run_experiment(name: str, changes: list[str]) -> dict[int, pd.DataFrame]:
    """The predictions of an experiment by seed. It runs only if the current commit has no experiment of this name."""
    known = subprocess.run(["dvc", "exp", "list", "--name-only"], capture_output=True, text=True, check=True)
    if name not in known.stdout.split():
        options = [part for change in changes for part in ("--set-param", change)]
        subprocess.run(["dvc", "exp", "run", "--temp", "--name", name, *options], check=True)
    revision = Revision(name)
    runs = find_runs(revision)
    read_runs(revision, runs)
    return runs.of_split("test").tables


def simulated_cells() -> Iterator[tuple[str, int, int]]:
    for design in DESIGNS:
        for num_runs in NUM_RUNS:
            for num_prompts in NUM_PROMPTS:
                yield design, num_runs, num_prompts


def simulate(design: str, num_runs: int, num_prompts: int) -> dict[str, Any]:
    """Simulate reviews: how often the interval contains the true difference, and how often it is called significant."""
    random = np.random.default_rng([num_runs, num_prompts, list(DESIGNS).index(design)])
    covered, significant = 0, dict.fromkeys(EFFECTS, 0)
    for effect in EFFECTS:
        true = effect * RUN_NOISE
        for _ in range(REVIEWS):
            found = compare(*simulated_review(random, design, num_runs, num_prompts, true), np.arange(num_prompts))
            assert found.run_noise == DESIGNS[design]
            covered += found.low <= true <= found.high
            significant[effect] += found.p_value < SIGNIFICANCE
    return {
        "seeds": design,
        "runs": num_runs,
        "prompts": num_prompts,
        "coverage": covered / (len(EFFECTS) * REVIEWS),
        "significant": {str(effect): count / REVIEWS for effect, count in significant.items()},
    }


def simulated_review(
    random: np.random.Generator, design: str, num_runs: int, num_prompts: int, true: float
) -> tuple[Runs, Runs]:
    """Runs of two configurations with a true difference, with crossed effects of prompts and runs."""

    def normal(scale: float, *shape: int) -> Any:
        return scale * random.standard_normal(shape)

    difficulty = normal(1.0, 1, num_prompts)
    run_noise = normal(RUN_NOISE, num_runs, 1)
    before = difficulty + run_noise + normal(RESIDUAL_NOISE, num_runs, num_prompts)
    if design == "same seeds":
        seeds, run_noise = range(num_runs), run_noise + normal(PAIRED_RUN_NOISE, num_runs, 1)
    else:
        num_new = 1 if design == "a single new run" else num_runs
        seeds, run_noise = range(num_runs, num_runs + num_new), normal(RUN_NOISE, num_new, 1)
    change = true + normal(PROMPT_NOISE, 1, num_prompts)
    after = difficulty + change + run_noise + normal(RESIDUAL_NOISE, len(seeds), num_prompts)
    return Runs(range(num_runs), before, np.ones_like(before)), Runs(seeds, after, np.ones_like(after))


def loss(table: pd.DataFrame) -> float:
    return float(LOSS.sums(table).sum() / LOSS.counts(table).sum())


def paired_noise(before: dict[int, pd.DataFrame], after: dict[int, pd.DataFrame]) -> dict[str, Any]:
    """The difference in test loss of each seed, and its standard deviation between seeds.

    prompts, residual: standard deviations of the differences between prompts, and of what neither explains.
    """
    common = next(iter(before.values())).index.intersection(next(iter(after.values())).index)
    sides = [{seed: tables[seed].loc[common] for seed in after} for tables in (before, after)]
    cells, _ = metric_runs(LOSS, sides, ("before", "after"))
    found = compare(cells[0], cells[1], np.arange(len(common)))
    return {
        "differences": {str(seed): value for seed, value in found.by_seed.items()},
        "paired": float(np.std(list(found.by_seed.values()), ddof=1)),
        "prompts": math.sqrt(found.variances.per_prompt),
        "residual": math.sqrt(found.variances.residual),
    }


def compare_pairs(tables: dict[int, pd.DataFrame]) -> dict[str, Any]:
    """Review each pair of real runs, which differ in their seed only: how many are called different.

    First the two models alone, without their run noise. Then each with two of the other runs as its replicates.
    """
    different = {"two models": {"loss": 0, "any metric": 0}, "with replicates": {"loss": 0, "any metric": 0}}
    pairs = list(combinations(tables, 2))
    for first, second in pairs:
        others = [seed for seed in tables if seed not in (first, second)]
        sides = {
            "two models": ([first], [second]),
            "with replicates": ([first, *others[:2]], [second, *others[2:4]]),
        }
        for name, (before, after) in sides.items():
            runs = [RevisionRuns(tables={seed: tables[seed] for seed in side}) for side in (before, after)]
            found = compare_runs(runs[0], runs[1], ("before", "after"), {})
            # Of the loss without Holm's correction, which would hide whether the interval is right.
            p_values = {one.metric.name: one.difference.p_value for one in found.metrics if one.difference}
            different[name]["loss"] += p_values["loss"] < SIGNIFICANCE
            different[name]["any metric"] += any(one.is_significant for one in found.metrics)
    return {"number": len(pairs), "different": different}


def tables(results: dict[str, Any]) -> str:
    """Markdown, for the terminal and `docs/verdicts.md`."""
    lines = ["| seeds | runs | prompts | coverage | false alarms | found: 1× | 2× | 4× |", "|---" * 8 + "|"]
    for cell in results["simulation"]:
        shares = " | ".join(f"{share:.0%}" for share in cell["significant"].values())
        lines.append(f"| {cell['seeds']} | {cell['runs']} | {cell['prompts']:,} | {cell['coverage']:.1%} | {shares} |")
    lines += ["", "| change | difference in test loss, by seed | standard deviation |", "|---" * 3 + "|"]
    for name, found in results["changes"].items():
        change = ", ".join(change for change in EXPERIMENTS[name] if "replicate" not in change)
        listed = ", ".join(map(signed, found["differences"].values()))
        lines.append(f"| `{change}` | {listed} | {found['paired']:.4f} |")
    losses = ", ".join(f"{value:.4f}" for value in results["test_losses"].values())
    deviation = np.std(list(results["test_losses"].values()), ddof=1)
    lines += ["", f"Test losses of the real runs: {losses} nats/token; standard deviation {deviation:.4f}.", ""]
    lines += [
        f"| {results['pairs']['number']} pairs of real runs | loss differs | any metric differs |",
        "|---" * 3 + "|",
    ]
    for name, counts in results["pairs"]["different"].items():
        lines.append(f"| {name} | {counts['loss']} | {counts['any metric']} |")
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> bytes:
    """A picture of coverage and false alarms over the number of prompts."""
    rows = [
        {
            "seeds": cell["seeds"],
            "runs": f"{cell['runs']} runs",
            "prompts": cell["prompts"],
            "share": share,
            "kind": kind,
        }
        for cell in results["simulation"]
        for kind, share in (("coverage", cell["coverage"]), ("false alarms", cell["significant"]["0"]))
    ]
    panels = []
    for kind, low, high, target in (("coverage", 0.88, 1.0, 0.95), ("false alarms", 0.0, 0.12, 0.05)):
        scale = {"domain": [low, high]}
        y = {"field": "share", "type": "quantitative", "scale": scale, "title": kind, "axis": {"format": "%"}}
        x_scale = {"type": "log", "domain": [40, 1200]}
        x = {"field": "prompts", "type": "quantitative", "scale": x_scale, "title": "test prompts"}
        lines = {
            "mark": {"type": "line", "point": True},
            "encoding": {
                "x": x,
                "y": y,
                "color": {"field": "runs", "title": "per side"},
                "strokeDash": {"field": "seeds"},
            },
        }
        rule = {"mark": {"type": "rule", "strokeDash": [2, 4]}, "encoding": {"y": {"datum": target}}}
        panel = {"width": 300, "height": 220, "transform": [{"filter": f"datum.kind == '{kind}'"}]}
        panels.append({**panel, "layer": [lines, rule]})
    spec = {"data": {"values": rows}, "hconcat": panels}
    return bytes(vl_convert.vegalite_to_png(json.dumps(spec), scale=1.5))


if __name__ == "__main__":
    run(main)
