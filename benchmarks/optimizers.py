"""Compare optimizers on the default data by the verdict of a review, with three training seeds each.

Writes `benchmarks/optimizers.json`, and prints a table in Markdown.
"""

from pathlib import Path
from typing import Any

from benchmarks.selection import SHORT, compare, comparison_table
from benchmarks.verdicts import loss, run_experiment
from stages.data.files import write_json
from stages.runtime.run import run

RESULTS = Path(__file__).with_name("optimizers.json")
ARMS = {
    "adamw": [],
    "adamw_8bit": ["optimizer=adamw_8bit"],
    "adamw_bf16": ["optimizer=adamw_bf16"],
}  # the others are compared with the first


def main() -> None:
    runs = {name: run_experiment(f"optimizer-{name}", SHORT + changes) for name, changes in ARMS.items()}
    first, *others = ARMS
    results = {
        "losses": {name: {str(seed): loss(table) for seed, table in tables.items()} for name, tables in runs.items()},
        "comparisons": {f"{name} against {first}": compare(runs, first, name) for name in others},
    }
    write_json(RESULTS, results)
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown, for the terminal and `docs/memory.md`."""
    losses = [
        f"{name}: {', '.join(f'{value:.4f}' for value in by_seed.values())}"
        for name, by_seed in results["losses"].items()
    ]
    return f"{comparison_table(results['comparisons'])}\n\nTest losses by seed: {'; '.join(losses)} nats/token."


if __name__ == "__main__":
    run(main)
