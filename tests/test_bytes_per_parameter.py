"""The benchmarks of memory and optimizers, and their tables."""

from pathlib import Path

import pytest

from benchmarks import bytes_per_parameter, optimizers
from stages.runtime.params import TrainParams, load_params

TINY = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 400}


@pytest.mark.subprocess
def test_each_setting_is_measured_in_its_own_process(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"finetuning": ["full", "lora"], "optimizer": ["adamw_8bit"], "activation_checkpointing": ["on"]}
    monkeypatch.setattr(bytes_per_parameter, "SETTINGS", settings)
    monkeypatch.setattr(bytes_per_parameter, "in_new_process", lambda function, *arguments: function(*arguments))
    params = load_params(TrainParams).model_copy(update={"precision": "fp32"})
    results = bytes_per_parameter.measure(TINY, params)
    # Embedding and head, four matrices of attention, three of the MLP, three norms.
    assert results["parameters"] == 2 * 64 * 400 + 7 * 64 * 64 + 3 * 64
    assert (results["tokens"], results["precision"]) == (128, "fp32")
    full, lora = results["runs"]
    assert (full["finetuning"], lora["finetuning"]) == ("full", "lora")
    large, small = 2 * 64 * 400 + 7 * 64 * 64, 3 * 64
    assert full["computed"] == (4 + 4 + 2 + 8 / 256) * large + 16 * small
    assert lora["computed"] == 4 * (large + small) + 16 * 7 * 16 * 128
    assert full["measured"] >= 0


def test_the_table_has_bytes_per_parameter() -> None:
    run = {"finetuning": "full", "optimizer": "adamw", "activation_checkpointing": "off"}
    results = {
        "date": "2026-11-30",
        "device": "2 cores of P",
        "precision": "bf16",
        "parameters": 1_000_000,
        "tokens": 128,
        "runs": [{**run, "computed": 17_880_000, "measured": 18_600_000}],
    }
    assert bytes_per_parameter.table(results).splitlines() == [
        "2026-11-30, 2 cores of P, bf16. 1,000,000 parameters, 128 tokens/step.",
        "",
        "| finetuning | optimizer | activation checkpointing | computed (bytes/parameter) | measured |",
        "|---|---|---|---|---|",
        "| full | adamw | off | 17.88 | 18.60 |",
    ]


def test_the_table_of_optimizers_has_verdicts_and_losses() -> None:
    found = {"difference": 0.0012, "low": -0.004, "high": 0.0064, "verdict": "equivalent"}
    losses = {"adamw": {"42": 1.78861, "1": 1.8}, "adamw_8bit": {"42": 1.7898, "1": 1.801}}
    table = optimizers.table({"losses": losses, "comparisons": {"adamw_8bit against adamw": found}})
    assert table.splitlines() == [
        "| change | difference in test loss | 95% interval | verdict |",
        "|---|---|---|---|",
        "| adamw_8bit against adamw | +0.0012 | −0.0040 to +0.0064 | equivalent |",
        "",
        "Test losses by seed: adamw: 1.7886, 1.8000; adamw_8bit: 1.7898, 1.8010 nats/token.",
    ]
