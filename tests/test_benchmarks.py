"""All engines of the benchmarks do the same work, one step at a time; the results are summarized correctly."""

from pathlib import Path

import pytest

from benchmarks import report, training
from stages.runtime.params import TrainParams, load_params
from tests.clone import edit
from tests.conftest import example

LOSSES = [5.942, 5.94074, 5.91694]  # of the textbook loop
EXAMPLES = [example([5, 6, 7 + n], [*range(20, 22 + n), 0], str(n)) for n in range(12)]


@pytest.mark.parametrize(
    ("engine", "expected"),
    # The adapters are 0 at first, so LoRA differs from the second loss on.
    [("textbook", LOSSES), ("this project", LOSSES), ("this project, LoRA", [LOSSES[0], 5.95238, 5.93938])],
)
def test_engine_waits_before_each_step_and_after_the_last_one(
    engine: str, expected: list[float], project: Path, tiny_model: Path
) -> None:
    edit(project, batch_size="2", gradient_accumulation_steps="2", precision="fp32", max_length="32")
    edit(project, lr_scheduler="constant", warmup_steps="0", eval_steps="1000")
    waits: list[None] = []
    work = training.Work(EXAMPLES, load_params(TrainParams), tiny_model)
    losses = training.ENGINES[engine](work, lambda: waits.append(None))
    assert len(waits) == 4
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.subprocess
def test_engines_in_separate_processes_do_the_same_steps(
    project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "matmul_rate", lambda device, precision: 1e9)
    edit(project, batch_size="2", gradient_accumulation_steps="2", max_length="32")
    runs = [("textbook", "fp32"), ("this project", "fp32")]
    measured = training.measure(EXAMPLES, load_params(TrainParams), runs, tiny_model)
    assert sum(measured["real_tokens"]) == 12 * 6 + 66
    assert sum(measured["supervised_tokens"]) == 12 * 3 + 66
    assert all(
        distinct < real for distinct, real in zip(measured["distinct_tokens"], measured["real_tokens"], strict=True)
    )
    for name in ("textbook, fp32", "this project, fp32"):
        run = measured["engines"][name]
        assert run["losses"] == pytest.approx(LOSSES, rel=1e-4)
        assert len(run["seconds"]) == 3
        assert run["peak_memory_bytes"] > 100_000_000


def test_table_compares_steps_pairwise_without_the_warm_up_step() -> None:
    def run(seconds: list[float], loss: float) -> dict[str, object]:
        return {"seconds": seconds, "losses": [3.0, 2.5, loss], "peak_memory_bytes": 4_500_000_000}

    measured = {
        "real_tokens": [9, 1000, 1200],
        "distinct_tokens": [9, 700, 900],
        "supervised_tokens": [9, 300, 500],
        "matmul_flops": [1.0, 10_000.0, 10_000.0],
        "engines": {"TRL, bf16": run([99.0, 8.0, 12.0], 2.25), "this project, bf16": run([99.0, 2.0, 4.0], 2.24)},
    }
    formatting = {
        "rows": 52_000,
        "start_up_seconds": [2.0],
        "stage_seconds": [8.0, 9.0, 7.0],
        "tokenizer_seconds": [5.0],
    }
    results = {
        "date": "2026-11-24",
        "device": "2 cores of P",
        "torch": "2",
        "flops_per_token": [10, 20],
        "training": {"short": measured},
        "format": formatting,
    }
    lines = report.table(results).splitlines()
    assert lines[2:9] == [
        "Short examples: 1,100 tokens/step, of which 800 are distinct and 400 supervised.",
        "",
        "| engine | s/step | time ÷ ours | supervised tokens/s | tokens/s "
        "| share of peak | peak memory (GB) | last loss |",
        "|---|---|---|---|---|---|---|---|",
        "| TRL, bf16 | 10 | 3.5 (3.0–4.0) | 40 | 110 | 16% | 4.5 | 2.2500 |",
        "| this project, bf16 | 3 | 1.0 (1.0–1.0) | 133 | 367 | 56% | 4.5 | 2.2400 |",
        "",
    ]
    assert lines[9] == (
        "Format, 52,000 long rows: 8.0 s, of which 2.0 s are start-up. The bare tokenizer takes 5.0 s. "
        "The ratio is 1.60, or 1.20 without start-up."
    )
