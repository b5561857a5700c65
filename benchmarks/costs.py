"""Time and disk space of larger jobs, estimated from `benchmarks/scaling.json` and from published training rates.

`python -m benchmarks.costs` prints the tables of `docs/scaling.md`.
"""

import json
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.report import WARM_UP, markdown_table
from stages.runtime.terminal import format_bytes

RESULTS = Path(__file__).with_name("scaling.json")
STAGES = ("download_dataset", "format", "split")
TEN_MILLION = 10_000_000
MODEL_BYTES = 2  # per parameter, in bf16
CHECKPOINT_BYTES = 16  # per parameter: fp32 weights, two moments and the best weights; at most two are kept
COLUMNS = (
    *("job", "tokens", "data stages here", "tables", "models and checkpoints"),
    *("device", "tokens/s", "one device", "eight", "source"),
)
FOUNDRY = "[llm-foundry, {}](https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md)"
VECTOR_LM = (
    "[VectorLM, Llama 3 8B, full fine-tuning]"
    "(https://github.com/VectorInstitute/vectorlm/blob/master/docs/reference_throughput.md)"
)
TORCHTITAN = (
    "[torchtitan, Llama 3.1 8B, FSDP]"
    "(https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md)"
)
# One epoch of full fine-tuning: rows, model, parameters; and a device, its tokens/s for this model, and the source.
PUBLISHED = (
    (52_000, "GPT-2", 124e6, "A100 80 GB", 142_830, FOUNDRY.format("125m, 2048 tokens")),
    (1_000_000, "1B", 1.1e9, "A100 40 GB", 24_000, "[TinyLlama 1.1B](https://github.com/jzhang38/TinyLlama#readme)"),
    (1_000_000, "1B", 1.1e9, "H100", 45_455, FOUNDRY.format("1b, 2048 tokens")),
    (100_000_000, "8B", 8e9, "A100 80 GB", 3_172, VECTOR_LM),
    (100_000_000, "8B", 8e9, "H100", 5_762, TORCHTITAN),
)


def report(results: dict[str, Any]) -> str:
    """Markdown, for the terminal and `docs/scaling.md`."""
    points = pd.json_normalize(results["curve"])
    tokens_per_row = results["curve"][-1]["tokens"] / results["curve"][-1]["rows"]
    return "\n\n".join(
        [
            f"{results['date']}, {results['device']}. Rows have {tokens_per_row:.0f} tokens on average.",
            curve_table(points),
            *estimates(points),
            speedups(results["one_core"]),
            jobs_table(results, points, tokens_per_row),
        ]
    )


def curve_table(points: pd.DataFrame) -> str:
    rows = []
    for _, point in points.iterrows():
        row = [f"{point['rows']:,.0f}"]
        for stage in STAGES:
            row += [f"{point[f'{stage}.seconds']:.1f}", f"{point[f'{stage}.peak_memory_bytes'] / 1e9:.2f}"]
        rows.append(row)
    return markdown_table(["rows", *(f"{stage} (s) | memory (GB)" for stage in STAGES)], rows)


def estimates(points: pd.DataFrame) -> list[str]:
    """A paragraph that tests the linear fit, one with its estimates, and one about reading the training split."""
    parallel = points[1:]  # the first point has one shard, so one process
    last = points.iloc[-1]
    tested, estimated = [], []
    for stage in STAGES:
        seconds, peak = f"{stage}.seconds", f"{stage}.peak_memory_bytes"
        predicted = linear_fit(parallel[:-1], seconds, last["rows"])
        tested.append(f"{stage} {predicted:.0f} s (measured: {last[seconds]:.0f} s)")
        duration = format_duration(linear_fit(parallel, seconds, TEN_MILLION))
        memory = format_bytes(max(linear_fit(parallel, peak, TEN_MILLION), last[peak]))
        estimated.append(f"{stage} {duration} with {memory} of memory")
    tables = format_bytes(TEN_MILLION * bytes_per_row(points))
    anonymous = "read_train.anonymous_memory_bytes"
    return [
        f"For {last['rows']:,.0f} rows, a linear fit to the points between the first and the last predicts "
        f"{', '.join(tested)}.",
        f"**Estimate for {TEN_MILLION:,} rows**, from a linear fit to all points but the first: "
        f"{'; '.join(estimated)}. The tables take {tables}.",
        f"The training split is memory-mapped. For {last['rows']:,.0f} rows, to read and order it takes "
        f"{format_duration(last['read_train.seconds'])}, and the process has {format_bytes(last[anonymous])} of "
        "memory, including the libraries, besides pages that the kernel can drop. The same fit gives "
        f"{format_bytes(linear_fit(parallel, anonymous, TEN_MILLION))} for {TEN_MILLION:,} rows.",
    ]


def speedups(one_core: dict[str, list[list[float]]]) -> str:
    parts = []
    for stage, pairs in one_core.items():
        measured = ", ".join(f"{one:.0f} s → {every:.0f} s" for one, every in pairs)
        parts.append(f"{stage} {median(one / every for one, every in pairs):.2f} ({measured})")
    return f"Speedup of all cores over one core: {', '.join(parts)}."


def jobs_table(results: dict[str, Any], points: pd.DataFrame, tokens_per_row: float) -> str:
    measured = (*PUBLISHED[0][:3], results["device"], measured_rate(results["training"]), "measured here")
    rows = []
    for num_rows, model, num_parameters, device, rate, source in (measured, *PUBLISHED):
        tokens = num_rows * tokens_per_row
        data = sum(linear_fit(points[1:], f"{stage}.seconds", num_rows) for stage in STAGES)
        # Base model, tuned model and tables are in the workspace and in the cache; the two checkpoints are in neither.
        models = num_parameters * (2 * 2 * MODEL_BYTES + 2 * CHECKPOINT_BYTES)
        rows.append(
            [
                f"{num_rows:,} × {model}",
                f"{tokens / 1e6:,.0f} M",
                format_duration(data),
                format_bytes(2 * num_rows * bytes_per_row(points)),
                format_bytes(models),
                device,
                f"{rate:,.0f}",
                format_duration(tokens / rate),
                "" if device == results["device"] else format_duration(tokens / rate / 8),
                source,
            ]
        )
    return markdown_table(COLUMNS, rows)


def bytes_per_row(points: pd.DataFrame) -> float:
    """The size of all tables at the last point ÷ its rows."""
    last = points.filter(regex="^(bytes[.]|rows$)").iloc[-1]
    return float(last.drop("rows").sum() / last["rows"])


def measured_rate(training: dict[str, Any]) -> float:
    """Tokens/s of GPT-2 in training."""
    (run,) = training["engines"].values()
    return float(mean(training["real_tokens"][WARM_UP:]) / median(run["seconds"][WARM_UP:]))


def linear_fit(points: pd.DataFrame, column: str, rows: float) -> float:
    """The value of a column for a number of rows, from a linear fit by least squares."""
    slope, start = np.polyfit(points["rows"], points[column], 1)
    return float(start + slope * rows)


def format_duration(seconds: float) -> str:
    """Two significant digits, or a whole number from 10 on, in the largest unit that gives at least 2."""
    units = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
    unit, length = next((unit for unit in units if seconds >= 2 * unit[1]), units[-1])
    number = seconds / length
    return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


if __name__ == "__main__":
    print(report(json.loads(RESULTS.read_text(encoding="utf-8"))))
