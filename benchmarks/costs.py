"""What larger jobs cost in time and disk, from `benchmarks/scaling.json` and from published rates of training."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from stages.shared.terminal import size

RESULTS = Path(__file__).with_name("scaling.json")
STAGES = ("download_dataset", "format", "split")
TEN_MILLION = 10_000_000
HERE = "measured here"
WARM_UP = 1  # steps that are not timed
# Bytes for each weight: a model's file in bf16; a checkpoint with the best weights until then. Two lie there at most.
MODEL, CHECKPOINT = 2, 16
COLUMNS = (
    *("job", "tokens", "data stages here", "tables", "models and checkpoints"),
    *("device", "tokens/s", "one device", "eight", "source"),
)


@dataclass(frozen=True)
class Rate:
    """Tokens that one device trains on in a second, and who says so."""

    device: str
    tokens_per_second: float
    source: str


@dataclass(frozen=True)
class Job:
    rows: int
    model: str
    num_weights: float
    rates: list[Rate]


def jobs(measured_rate: float, processor: str) -> list[Job]:
    foundry = (
        "[llm-foundry, {}](https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md)"
    )
    return [
        Job(
            52_000,
            "GPT-2",
            124e6,
            [Rate(processor, measured_rate, HERE), Rate("A100 80 GB", 142_830, foundry.format("125m, 2048 tokens"))],
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
                    "[VectorLM, Llama 3 8B, all weights](https://github.com/VectorInstitute/vectorlm/blob/master/docs/"
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
    several = curve[1:]  # the first has one shard, so one process
    processor = f"{results['cores']} cores of {results['processor']}"
    rows = [point["rows"] for point in curve]
    lines = [
        f"{results['date']}, {processor}. Rows of {tokens_per_row(results):.0f} tokens in the mean.",
        "",
        "| rows | " + " | ".join(f"{stage}, s | peak GB" for stage in STAGES) + " |",
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
        f"A straight line through the points between foretells the seconds of {rows[-1]:,} rows: "
        + ", ".join(
            f"{stage} {line(several[:-1], seconds_of(stage))(rows[-1]):.0f} "
            f"(measured {curve[-1][stage]['seconds']:.0f})"
            for stage in STAGES
        )
        + ".",
        "",
        f"**{TEN_MILLION:,} rows, estimated** by a line through all points but the first: "
        + "; ".join(
            f"{stage} {duration(line(several, seconds_of(stage))(TEN_MILLION))}, "
            f"{size(max(line(several, peak_of(stage))(TEN_MILLION), peak_of(stage)(several[-1])))} of memory"
            for stage in STAGES
        )
        + f". The tables take {size(TEN_MILLION * bytes_per_row(results))}. Training would read its split into "
        f"{size(line(several, peak_of('read_train'))(TEN_MILLION))} of memory.",
        "",
        "One core against all, "
        + ", ".join(
            f"{stage}: {median(one / every for one, every in times):.2f} times "
            f"({', '.join(f'{one:.0f} s and {every:.0f} s' for one, every in times)})"
            for stage, times in results["one_core"].items()
        )
        + ".",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for job in jobs(measured_rate(results), processor):
        tokens = job.rows * tokens_per_row(results)
        data = sum(line(several, seconds_of(stage))(job.rows) for stage in STAGES)
        # In the workspace and again in the cache: base and tuned model, and the tables. Checkpoints are in neither.
        models = job.num_weights * (2 * 2 * MODEL + 2 * CHECKPOINT)
        for rate in job.rates:
            seconds = tokens / rate.tokens_per_second
            eight = "" if rate.source == HERE else duration(seconds / 8)
            lines.append(
                f"| {job.rows:,} × {job.model} | {tokens / 1e6:,.0f} M | {duration(data)} "
                f"| {size(2 * job.rows * bytes_per_row(results))} | {size(models)} | {rate.device} "
                f"| {rate.tokens_per_second:,.0f} | {duration(seconds)} | {eight} | {rate.source} |"
            )
    return "\n".join(lines)


def tokens_per_row(results: dict[str, Any]) -> float:
    last = results["curve"][-1]
    return float(last["tokens"] / last["rows"])


def bytes_per_row(results: dict[str, Any]) -> float:
    last = results["curve"][-1]
    return float(sum(last["bytes"].values()) / last["rows"])


def measured_rate(results: dict[str, Any]) -> float:
    """Tokens a second of the model with GPT-2's shape."""
    (run,) = results["training"]["engines"].values()
    return float(mean(results["training"]["real_tokens"][WARM_UP:]) / median(run["seconds"][WARM_UP:]))


def line(points: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> Callable[[float], float]:
    """The line of least squares through a value at each number of rows."""
    slope, start = np.polyfit([point["rows"] for point in points], [value(point) for point in points], 1)
    return lambda rows: float(start + slope * rows)


def seconds_of(stage: str) -> Callable[[dict[str, Any]], float]:
    return lambda point: float(point[stage]["seconds"])


def peak_of(stage: str) -> Callable[[dict[str, Any]], float]:
    return lambda point: float(point[stage]["peak_memory_bytes"])


def duration(seconds: float) -> str:
    """Two digits or all whole ones, in the largest unit that leaves at least 2."""
    units = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
    unit, length = next((unit for unit in units if seconds >= 2 * unit[1]), units[-1])
    number = seconds / length
    return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


if __name__ == "__main__":
    print(report(json.loads(RESULTS.read_text(encoding="utf-8"))))
