"""Time and disk space of larger jobs, estimated from `benchmarks/scaling.json` and from published training rates.

`python -m benchmarks.costs` prints the tables of `docs/scaling.md`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from benchmarks.report import WARM_UP
from stages.runtime.terminal import format_bytes

RESULTS = Path(__file__).with_name("scaling.json")
STAGES = ("download_dataset", "format", "split")
TEN_MILLION = 10_000_000
HERE = "measured here"
MODEL_BYTES = 2  # per parameter, in bf16
CHECKPOINT_BYTES = 16  # per parameter: fp32 weights, two moments and the best weights; at most two are kept
COLUMNS = (
    *("job", "tokens", "data stages here", "tables", "models and checkpoints"),
    *("device", "tokens/s", "one device", "eight", "source"),
)


@dataclass(frozen=True)
class Rate:
    """The training rate of one device, and its source."""

    device: str
    tokens_per_second: float
    source: str


@dataclass(frozen=True)
class Job:
    """One epoch of full fine-tuning, with the training rates of some devices for that model."""

    rows: int
    model: str
    num_parameters: float
    rates: list[Rate]


def jobs(measured_rate: float, device: str) -> list[Job]:
    """The jobs to estimate.

    Args:
        measured_rate: of GPT-2 on `device`, in tokens/s.
    """
    foundry = (
        "[llm-foundry, {}](https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md)"
    )
    return [
        Job(
            52_000,
            "GPT-2",
            124e6,
            [Rate(device, measured_rate, HERE), Rate("A100 80 GB", 142_830, foundry.format("125m, 2048 tokens"))],
        ),
        Job(
            1_000_000,
            "1B",
            1.1e9,
            [
                Rate("A100 40 GB", 24_000, "[TinyLlama 1.1B](https://github.com/jzhang38/TinyLlama#readme)"),
                Rate("H100", 45_455, foundry.format("1b, 2048 tokens")),
            ],
        ),
        Job(
            100_000_000,
            "8B",
            8e9,
            [
                Rate(
                    "A100 80 GB",
                    3_172,
                    "[VectorLM, Llama 3 8B, full fine-tuning](https://github.com/VectorInstitute/vectorlm/blob/master/docs/"
                    "reference_throughput.md)",
                ),
                Rate(
                    "H100",
                    5_762,
                    "[torchtitan, Llama 3.1 8B, FSDP](https://github.com/pytorch/torchtitan/blob/main/benchmarks/"
                    "llama3_h100_202412_torchtitan.md)",
                ),
            ],
        ),
    ]


def report(results: dict[str, Any]) -> str:
    """Markdown, for the terminal and `docs/scaling.md`."""
    curve = results["curve"]
    parallel = curve[1:]  # the first point has one shard, so one process
    lines = [
        f"{results['date']}, {results['device']}. Rows have {tokens_per_row(results):.0f} tokens on average.",
        "",
        "| rows | " + " | ".join(f"{stage} (s) | memory (GB)" for stage in STAGES) + " |",
        "|---" * (2 * len(STAGES) + 1) + "|",
        *(
            f"| {point['rows']:,} | "
            + " | ".join(
                f"{point[stage]['seconds']:.1f} | {point[stage]['peak_memory_bytes'] / 1e9:.2f}" for stage in STAGES
            )
            + " |"
            for point in curve
        ),
        "",
        f"For {curve[-1]['rows']:,} rows, a linear fit to the points between the first and the last predicts "
        + ", ".join(
            f"{stage} {linear_fit(parallel[:-1], seconds_of(stage))(curve[-1]['rows']):.0f} s "
            f"(measured: {curve[-1][stage]['seconds']:.0f} s)"
            for stage in STAGES
        )
        + ".",
        "",
        f"**Estimate for {TEN_MILLION:,} rows**, from a linear fit to all points but the first: "
        + "; ".join(
            f"{stage} {format_duration(linear_fit(parallel, seconds_of(stage))(TEN_MILLION))} with "
            + format_bytes(max(linear_fit(parallel, peak_of(stage))(TEN_MILLION), peak_of(stage)(parallel[-1])))
            + " of memory"
            for stage in STAGES
        )
        + f". The tables take {format_bytes(TEN_MILLION * bytes_per_row(results))}.",
        "",
        f"The training split is memory-mapped. For {curve[-1]['rows']:,} rows, to read and order it takes "
        f"{format_duration(seconds_of('read_train')(curve[-1]))}, and the process has "
        f"{format_bytes(anonymous_of(curve[-1]))} of memory, including the libraries, besides pages that the kernel "
        f"can drop. The same fit gives {format_bytes(linear_fit(parallel, anonymous_of)(TEN_MILLION))} for "
        f"{TEN_MILLION:,} rows.",
        "",
        "Speedup of all cores over one core: "
        + ", ".join(
            f"{stage} {median(one / every for one, every in pairs):.2f} "
            f"({', '.join(f'{one:.0f} s → {every:.0f} s' for one, every in pairs)})"
            for stage, pairs in results["one_core"].items()
        )
        + ".",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for job in jobs(measured_rate(results), results["device"]):
        tokens = job.rows * tokens_per_row(results)
        data = sum(linear_fit(parallel, seconds_of(stage))(job.rows) for stage in STAGES)
        # Base model, tuned model and tables are in the workspace and in the cache; the two checkpoints are in neither.
        models = job.num_parameters * (2 * 2 * MODEL_BYTES + 2 * CHECKPOINT_BYTES)
        for rate in job.rates:
            seconds = tokens / rate.tokens_per_second
            eight = "" if rate.source == HERE else format_duration(seconds / 8)
            lines.append(
                f"| {job.rows:,} × {job.model} | {tokens / 1e6:,.0f} M | {format_duration(data)} "
                f"| {format_bytes(2 * job.rows * bytes_per_row(results))} | {format_bytes(models)} | {rate.device} "
                f"| {rate.tokens_per_second:,.0f} | {format_duration(seconds)} | {eight} | {rate.source} |"
            )
    return "\n".join(lines)


def tokens_per_row(results: dict[str, Any]) -> float:
    last = results["curve"][-1]
    return float(last["tokens"] / last["rows"])


def bytes_per_row(results: dict[str, Any]) -> float:
    last = results["curve"][-1]
    return float(sum(last["bytes"].values()) / last["rows"])


def measured_rate(results: dict[str, Any]) -> float:
    """Tokens/s of GPT-2 in training."""
    (run,) = results["training"]["engines"].values()
    return float(mean(results["training"]["real_tokens"][WARM_UP:]) / median(run["seconds"][WARM_UP:]))


def linear_fit(points: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> Callable[[float], float]:
    """Fit a value as a linear function of the number of rows, by least squares."""
    slope, start = np.polyfit([point["rows"] for point in points], [value(point) for point in points], 1)
    return lambda rows: float(start + slope * rows)


def seconds_of(stage: str) -> Callable[[dict[str, Any]], float]:
    """A function that returns the seconds of a stage at a point of the curve."""
    return lambda point: float(point[stage]["seconds"])


def peak_of(stage: str) -> Callable[[dict[str, Any]], float]:
    """A function that returns the peak memory of a stage, in bytes, at a point of the curve."""
    return lambda point: float(point[stage]["peak_memory_bytes"])


def anonymous_of(point: dict[str, Any]) -> float:
    """Memory without pages of files, in bytes, of reading the training split at a point of the curve."""
    return float(point["read_train"]["anonymous_memory_bytes"])


def format_duration(seconds: float) -> str:
    """Two significant digits, or a whole number from 10 on, in the largest unit that gives at least 2."""
    units = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
    unit, length = next((unit for unit in units if seconds >= 2 * unit[1]), units[-1])
    number = seconds / length
    return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


if __name__ == "__main__":
    print(report(json.loads(RESULTS.read_text(encoding="utf-8"))))
