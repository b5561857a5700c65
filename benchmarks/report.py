"""Benchmark results as Markdown and as a picture: `python -m benchmarks.report`."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

WARM_UP = 1  # steps at the beginning of a run that are not timed
COLUMNS = (
    *("engine", "s/step", "time ÷ ours", "supervised tokens/s", "tokens/s"),
    *("share of peak", "peak memory (GB)", "last loss"),
)


def results_file(device: str) -> Path:
    return Path(__file__).with_name("results.json" if device == "cpu" else f"results-{device}.json")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown. A column may be several, with their titles and values separated by bars."""
    header = f"| {' | '.join(columns)} |"
    line = "|---" * (header.count(" | ") + 1) + "|"
    return "\n".join([header, line, *(f"| {' | '.join(row)} |" for row in rows)])


def table(results: dict[str, Any]) -> str:
    """Markdown, for the terminal and `docs/benchmarks.md`."""
    parts = [f"{results['date']}, {results['device']}, torch {results['torch']}"]
    for name, measured in results["training"].items():
        real, distinct, supervised = (
            statistics.mean(measured[f"{kind}_tokens"][WARM_UP:]) for kind in ("real", "distinct", "supervised")
        )
        parts.append(
            f"{name[0].upper()}{name[1:]} examples: {real:,.0f} tokens/step, of which {distinct:,.0f} are distinct and "
            f"{supervised:,.0f} supervised."
        )
        seconds = pd.DataFrame({engine: run["seconds"] for engine, run in measured["engines"].items()})[WARM_UP:]
        ratios = seconds.div(seconds.iloc[:, -1], axis=0)  # this project is the last column
        shares = shares_of_peak(results, measured, seconds)
        rows = []
        for engine, run in measured["engines"].items():
            step, ratio = seconds[engine].median(), ratios[engine]
            times = f"{step:.3g}", f"{ratio.median():.1f} ({ratio.min():.1f}–{ratio.max():.1f})"
            rates = f"{supervised / step:,.0f}", f"{real / step:,.0f}", f"{shares[engine].median():.0%}"
            rows.append([engine, *times, *rates, f"{run['peak_memory_bytes'] / 1e9:.1f}", f"{run['losses'][-1]:.4f}"])
        parts.append(markdown_table(COLUMNS, rows))
    if measured := results.get("format"):
        stage, tokenizer, start_up = (
            statistics.median(measured[f"{kind}_seconds"]) for kind in ("stage", "tokenizer", "start_up")
        )
        parts.append(
            f"Format, {measured['rows']:,} long rows: {stage:.1f} s, of which {start_up:.1f} s are start-up. "
            f"The bare tokenizer takes {tokenizer:.1f} s. "
            f"The ratio is {stage / tokenizer:.2f}, or {(stage - start_up) / tokenizer:.2f} without start-up."
        )
    return "\n\n".join(parts)


def shares_of_peak(results: dict[str, Any], measured: dict[str, Any], seconds: pd.DataFrame) -> pd.DataFrame:
    """Model FLOPs of the distinct tokens of each step ÷ those of a large matrix multiplication in the same time.

    Args:
        seconds: of each step (rows) and engine (columns).
    """
    body, head = results["flops_per_token"]
    steps = pd.DataFrame({key: measured[key] for key in ("distinct_tokens", "supervised_tokens", "matmul_flops")})
    flops = body * steps["distinct_tokens"] + head * steps["supervised_tokens"]
    shares = (1 / seconds).mul((flops / steps["matmul_flops"])[seconds.index], axis=0)
    lora = [engine for engine in shares if "LoRA" in engine]
    shares[lora] *= 2 / 3  # frozen matrices have no gradients; the FLOPs of the adapters are not counted
    return shares


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the time per step and the losses of all engines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results["training"]), 2, figsize=(11, 11), layout="constrained")
    for row, (name, measured) in zip(axes, results["training"].items(), strict=True):
        for place, (engine, run) in enumerate(measured["engines"].items()):
            seconds = run["seconds"][WARM_UP:]
            row[0].barh(place, statistics.median(seconds), color=f"C{place}")
            row[0].plot(seconds, [place] * len(seconds), "k|")
            row[0].text(max(seconds), place, f"  {statistics.median(seconds):.3g}", va="center")
            steps = range(1, len(run["losses"]) + 1)
            # Later lines are thinner, so that equal losses stay visible.
            width = 2 * (len(measured["engines"]) - place) - 1
            row[1].plot(steps, run["losses"], color=f"C{place}", linewidth=width, label=engine)
        row[0].set(title=f"{name} examples", xlabel="s/step (one tick per step)")
        row[0].set_yticks(range(len(measured["engines"])), measured["engines"])
        row[0].invert_yaxis()
        row[0].margins(x=0.2)
        row[1].set(title=f"{name} examples", xlabel="optimizer step", ylabel="loss (nats/token)")
        row[1].set_xticks(steps)
        row[1].legend()
    figure.suptitle(f"{results['device']}, {results['date']}")
    figure.savefig(path, dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    for device in ("cpu", "cuda"):
        print(table(json.loads(results_file(device).read_text(encoding="utf-8"))), end="\n\n")
