"""Validate the verdicts of a review by simulation, where the truth is known, and on real runs that differ in seed only.

Runs the experiments below, then writes `benchmarks/verdicts.json` and `benchmarks/verdicts.png`, and prints tables in
Markdown.
"""

import json
import math
import subprocess
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import vl_convert

from benchmarks.report import markdown_table
from review.plots import layer, quantity
from review.rescoring import Rescoring
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
SHOWN = {"0": "false alarms", "1": "found: 1×", "2": "found: 2×", "4": "found: 4×"}  # by the effect
LIMITS = {"coverage": (0.88, 1.0, 0.95), "false alarms": (0.0, 0.12, 0.05)}  # of an axis, and what should be there
DESIGNS = {"same seeds": "paired", "other seeds": "pooled", "a single new run": "pooled"}


def main() -> None:
    real = {name: run_experiment(name, changes) for name, changes in EXPERIMENTS.items()}
    settings = list(product(DESIGNS, NUM_RUNS, NUM_PROMPTS))
    results = {
        "simulation": [simulate(*setting) for setting in progress(settings, "simulate", "setting")],
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
    read_runs(revision, runs, Rescoring())
    return runs.of_split("test").tables


def simulate(design: str, num_runs: int, num_prompts: int) -> dict[str, Any]:
    """Simulate reviews: how often the interval contains the true difference, and how often it is called significant."""
    random = np.random.default_rng([num_runs, num_prompts, list(DESIGNS).index(design)])
    covered, significant = 0, dict.fromkeys(EFFECTS, 0)
    for effect in EFFECTS:
        true = effect * RUN_NOISE
        for _ in range(REVIEWS):
            difference = compare(*simulated_review(random, design, num_runs, num_prompts, true), np.arange(num_prompts))
            assert difference.run_noise == DESIGNS[design]
            covered += difference.low <= true <= difference.high
            significant[effect] += difference.p_value < SIGNIFICANCE
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
    same_seeds = RevisionRuns(tables={seed: before[seed] for seed in after})
    first, second = (metric_runs(LOSS, side, common, "") for side in (same_seeds, RevisionRuns(tables=after)))
    difference = compare(first, second, np.arange(len(common)))
    return {
        "differences": {str(seed): value for seed, value in difference.by_seed.items()},
        "paired": float(np.std(list(difference.by_seed.values()), ddof=1)),
        "prompts": math.sqrt(difference.variances.per_prompt),
        "residual": math.sqrt(difference.variances.residual),
    }


def compare_pairs(tables: dict[int, pd.DataFrame]) -> dict[str, Any]:
    """Review each pair of real runs, which differ in their seed only: how many are called different.

    First the two models alone, without their run noise. Then each with two of the other runs as its replicates.
    """
    different = {"two models": {"loss": 0, "any metric": 0}, "with replicates": {"loss": 0, "any metric": 0}}
    pairs = list(combinations(tables, 2))
    for first, second in pairs:
        others = [seed for seed in tables if seed not in (first, second)]
        seeds = {
            "two models": ([first], [second]),
            "with replicates": ([first, *others[:2]], [second, *others[2:4]]),
        }
        for name, (before, after) in seeds.items():
            runs = [RevisionRuns(tables={seed: tables[seed] for seed in side}) for side in (before, after)]
            results = compare_runs(runs[0], runs[1], ("before", "after"), {})
            # Of the loss without Holm's correction, which would hide whether the interval is right.
            loss_result = results.metric(LOSS.name)
            assert loss_result is not None and loss_result.difference is not None
            different[name]["loss"] += loss_result.difference.p_value < SIGNIFICANCE
            different[name]["any metric"] += any(result.is_significant for result in results.metrics)
    return {"number": len(pairs), "different": different}


def tables(results: dict[str, Any]) -> str:
    """Markdown, for the terminal and `docs/verdicts.md`."""
    simulated = pd.DataFrame(
        {"seeds": setting["seeds"], "coverage": setting["coverage"], "false alarms": setting["significant"]["0"]}
        for setting in results["simulation"]
    )
    summary = []
    for seeds, shares in simulated.groupby("seeds", sort=False):
        coverage, alarms = shares["coverage"], shares["false alarms"]
        ranges = f"{coverage.min():.1%} to {coverage.max():.1%}", f"{alarms.min():.0%} to {alarms.max():.0%}"
        summary.append([str(seeds), ranges[0], f"{ranges[1]}, on average {alarms.mean():.1%}"])
    changes = []
    for name, result in results["changes"].items():
        change = ", ".join(change for change in EXPERIMENTS[name] if "replicate" not in change)
        differences = ", ".join(map(signed, result["differences"].values()))
        changes.append([f"`{change}`", differences, f"{result['paired']:.4f}"])
    losses = [*results["test_losses"].values()]
    pairs = [[name, *map(str, counts.values())] for name, counts in results["pairs"]["different"].items()]
    return "\n\n".join(
        [
            markdown_table(["seeds", "coverage", "false alarms"], summary),
            markdown_table(["change", "difference in test loss, by seed", "standard deviation"], changes),
            f"Test losses of the real runs: {', '.join(f'{value:.4f}' for value in losses)} nats/token; "
            f"standard deviation {np.std(losses, ddof=1):.4f}.",
            markdown_table(
                [f"{results['pairs']['number']} pairs of real runs", "loss differs", "any metric differs"], pairs
            ),
        ]
    )


def draw(results: dict[str, Any]) -> bytes:
    """A picture of coverage, false alarms and differences found over the number of prompts; a row of panels each."""
    rows = []
    for setting in results["simulation"]:
        shares = {"coverage": setting["coverage"]}
        shares |= {SHOWN[effect]: setting["significant"][effect] for effect in SHOWN}
        columns = {"seeds": setting["seeds"], "runs": f"{setting['runs']} runs", "prompts": setting["prompts"]}
        rows += [{**columns, "kind": kind, "share": share} for kind, share in shares.items()]
    prompts_scale = {"type": "log", "domain": [40, 1200]}
    x = quantity("prompts", "test prompts", axis={"values": NUM_PROMPTS}, scale=prompts_scale)
    panels = []
    for kind in ("coverage", *SHOWN.values()):
        low, high, target = LIMITS.get(kind, (0, 1, None))
        y = quantity("share", kind, axis={"format": "%", "tickCount": 4}, scale={"domain": [low, high]})
        line = layer({"type": "line", "point": True}, x=x, y=y, color={"field": "runs", "title": "per side"})
        rule = layer({"type": "rule", "strokeDash": [2, 4]}, y={"datum": target})
        panels.append(
            {
                "transform": [{"filter": {"field": "kind", "equal": kind}}],
                "facet": {"column": {"field": "seeds", "title": None, "sort": list(DESIGNS)}},
                "spec": {"width": 220, "height": 110, "layer": [line, rule] if target else [line]},
            }
        )
    spec = {"data": {"values": rows}, "vconcat": panels}
    return bytes(vl_convert.vegalite_to_png(json.dumps(spec)))


if __name__ == "__main__":
    run(main)
