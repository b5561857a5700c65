"""Results as a table and a picture."""

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
PICTURE = Path(__file__).with_name("results.png")
WARM_UP = 1  # steps that are not timed


def table(results: dict[str, Any]) -> str:
    """Markdown, for the terminal and the README."""
    lines = [f"{results['date']}, {results['cores']} cores of {results['processor']}, torch {results['torch']}", ""]
    for name, measured in results["training"].items():
        timed = range(WARM_UP, len(measured["real_tokens"]))
        real, distinct, supervised = (
            statistics.mean(measured[f"{kind}_tokens"][step] for step in timed)
            for kind in ("real", "distinct", "supervised")
        )
        title = name[0].upper() + name[1:]
        lines += [
            f"{title} examples: {real:,.0f} tokens a step, of which {distinct:,.0f} are distinct and "
            f"{supervised:,.0f} supervised.",
            "",
            "| engine | s a step | time ÷ ours | supervised tokens/s | tokens/s | of the peak | peak GB | last loss |",
            "|---|---|---|---|---|---|---|---|",
        ]
        *_, ours = measured["engines"].values()
        for engine, run in measured["engines"].items():
            seconds = statistics.median(run["seconds"][WARM_UP:])
            ratios = [a / b for a, b in zip(run["seconds"], ours["seconds"], strict=True)][WARM_UP:]
            shares = [share_of_peak(results, measured, engine, step) for step in timed]
            lines.append(
                f"| {engine} | {seconds:.1f} | {statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f}) "
                f"| {supervised / seconds:,.0f} | {real / seconds:,.0f} | {statistics.median(shares):.0%} "
                f"| {run['peak_memory_bytes'] / 1e9:.1f} | {run['losses'][-1]:.4f} |"
            )
        lines.append("")
    measured = results["format"]
    stage, tokenizer, start_up = (
        statistics.median(measured[f"{kind}_seconds"]) for kind in ("stage", "tokenizer", "start_up")
    )
    lines += [
        f"Format, {measured['rows']:,} long rows: {stage:.1f} s, of which {start_up:.1f} s are start-up. "
        f"The bare tokenizer: {tokenizer:.1f} s. "
        f"That is {stage / tokenizer:.2f} times, {(stage - start_up) / tokenizer:.2f} without start-up.",
    ]
    return "\n".join(lines)


def share_of_peak(results: dict[str, Any], measured: dict[str, Any], engine: str, step: int) -> float:
    """The model FLOPs of a step's distinct tokens ÷ what the machine's matrix multiplication does in the same time."""
    run = measured["engines"][engine]
    body, head = results["flops_per_token"]
    flops = body * measured["distinct_tokens"][step] + head * measured["supervised_tokens"][step]
    if "LoRA" in engine:
        flops *= 2 / 3  # a frozen matrix has no gradient; what the adapters compute is left out
    return float(flops / run["seconds"][step] / measured["matmul_flops"][step])


def draw(results: dict[str, Any]) -> None:
    """Seconds a step, and losses on top of each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results["training"]), 2, figsize=(11, 11), layout="constrained")
    for row, (name, measured) in zip(axes, results["training"].items(), strict=True):
        for place, (engine, run) in enumerate(measured["engines"].items()):
            seconds = run["seconds"][WARM_UP:]
            row[0].barh(place, statistics.median(seconds), color=f"C{place}")
            row[0].plot(seconds, [place] * len(seconds), "k|")
            row[0].text(max(seconds), place, f"  {statistics.median(seconds):.1f}", va="center")
            steps = range(1, len(run["losses"]) + 1)
            # The later, the thinner: what lies on top of each other stays visible.
            width = 2 * (len(measured["engines"]) - place) - 1
            row[1].plot(steps, run["losses"], color=f"C{place}", linewidth=width, label=engine)
        row[0].set(title=f"{name} examples", xlabel="seconds an optimizer step (each step is a tick)")
        row[0].set_yticks(range(len(measured["engines"])), measured["engines"])
        row[0].invert_yaxis()
        row[0].margins(x=0.2)
        row[1].set(title=f"{name} examples", xlabel="optimizer step", ylabel="loss (nats a supervised token)")
        row[1].set_xticks(steps)
        row[1].legend()
    figure.suptitle(f"{results['cores']} cores of {results['processor']}, {results['date']}")
    figure.savefig(PICTURE, dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))
