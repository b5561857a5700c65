"""The training loop: compared with a textbook loop on tiny models, interrupted and resumed."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jinja2 import Environment
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from stages import train
from stages.data.examples import read_split
from stages.engine import engine as engine_module
from stages.engine.batches import Batches, Limits, PackedBatches, PaddedBatches, shuffled_batches
from stages.engine.checkpoints import Checkpoints
from stages.engine.distributed import DistributedContext
from stages.engine.engine import Engine
from stages.engine.models import load_model
from stages.engine.probe import choose_batches
from stages.engine.schedule import Schedule
from stages.engine.training_log import TrainingLog
from stages.runtime.errors import UserError
from stages.runtime.params import TrainParams, load_params
from stages.templates.alpaca import render_alpaca
from tests.clone import edit
from tests.conftest import example
from tests.test_loss import CONFIGS
from tests.textbook import textbook_steps
from tests.tiny_models import random_model, tiny_config, tiny_model

ONE_PROCESS = DistributedContext(torch.device("cpu"))


def curve(column: str) -> list[tuple[int, float]]:
    """Step and value of each record of the training curve that has this column."""
    with Path("metrics/curve.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row[column]]


def test_losses_and_weights_equal_those_of_the_textbook_loop(training_inputs: Path) -> None:
    edit(training_inputs, eval_steps="1000")
    params = load_params(TrainParams)
    model = load_model(Path("models/base")).train()
    examples = read_split(Path("data/train.parquet"))
    batches = [batch for epoch in range(4) for batch in shuffled_batches(examples, 4, params.seed, epoch)]
    losses = list(textbook_steps(model, batches, params, num_warmup_steps=3))
    train.main()
    records = curve("loss")
    assert [step for step, _ in records] == list(range(1, 25))
    assert [found for _, found in records] == pytest.approx(losses, rel=1e-5)
    assert [rate for _, rate in curve("learning_rate")[:4]] == pytest.approx(
        [1e-3 / 3, 2e-3 / 3, 1e-3, 0.9949e-3], rel=1e-4
    )
    assert losses[-1] < losses[0] - 0.3
    tuned = dict(load_model(Path("models/tuned")).named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(tuned[name], weight.to(torch.bfloat16).float(), rtol=8e-3, atol=1e-5)


BATCHES: dict[str, Batches] = {
    "padded": PaddedBatches(Limits(1000, 1000)),
    "padded, small micro-batches": PaddedBatches(Limits(40, 1000)),
    "packed": PackedBatches(Limits(1000, 1000)),
    "packed, few supervised tokens": PackedBatches(Limits(1000, 20)),
    "packed, prefix not shared": PackedBatches(Limits(1000, 1000), share_prefix=False),
}


TEXTBOOK_RUNS: dict[str, tuple[list[float], dict[str, torch.Tensor]]] = {}  # losses and weights


def assert_trains_like_the_textbook_loop(config: PreTrainedConfig, batches: Batches | None = None) -> None:
    """Over 24 steps, to 1e-5. If `batches` is None, those that the engine chooses for this model."""
    edit(Path.cwd(), batch_size="4", gradient_accumulation_steps="2", num_epochs="8", eval_steps="1000")
    params = load_params(TrainParams)
    random = np.random.default_rng(0)
    prefixes = [random.integers(3, 50, 12).tolist() for _ in range(2)]
    examples = [
        example(
            prefixes[n % 2] + random.integers(3, 50, random.integers(1, 9)).tolist(),
            [*random.integers(3, 50, random.integers(0, 20)), 2],
            str(n),
        )
        for n in range(22)
    ]
    effective_batches = [batch for epoch in range(8) for batch in shuffled_batches(examples, 8, params.seed, epoch)]
    key = config.to_json_string()
    if key not in TEXTBOOK_RUNS:
        expected = random_model(config).train()
        losses = list(textbook_steps(expected, effective_batches, params, num_warmup_steps=3))
        TEXTBOOK_RUNS[key] = losses, dict(expected.named_parameters())
    losses, expected_weights = TEXTBOOK_RUNS[key]

    model = random_model(config).train()
    batches = batches or choose_batches(model, examples, 1000)[0]
    engine = Engine(model, batches, params, Schedule.plan(params, len(examples)), ONE_PROCESS)
    log = TrainingLog(24, params.logging_steps, train.CURVE)
    train.fit(engine, examples, examples[:3], Checkpoints(Path("checkpoints")), log)
    assert [found for _, found in curve("loss")] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0] - 0.2
    for (name, weight), found in zip(expected_weights.items(), model.parameters(), strict=True):
        difference = found - weight
        # A key's bias adds the same value to all scores, so its gradient is 0 and Adam amplifies rounding errors.
        if name.endswith("k_proj.bias"):
            continue
        if name.endswith("c_attn.bias"):
            difference = torch.cat([difference[:32], difference[64:]])
        assert difference.norm() <= 1e-5 * weight.norm(), name


@pytest.mark.parametrize("path", BATCHES)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.usefixtures("training_inputs")
def test_every_kind_of_batch_trains_like_the_textbook_loop(architecture: str, path: str) -> None:
    assert_trains_like_the_textbook_loop(CONFIGS[architecture], BATCHES[path])


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "mistral", "opt", "lfm2", "mamba"])
@pytest.mark.usefixtures("training_inputs")
def test_the_batches_that_the_engine_chooses_train_like_the_textbook_loop(name: str) -> None:
    assert_trains_like_the_textbook_loop(tiny_config(name))


@pytest.mark.usefixtures("training_inputs")
def test_the_log_says_that_the_load_balancing_loss_of_experts_is_not_added() -> None:
    model = tiny_model("mixtral")
    model.config.output_router_logits = True
    model.save_pretrained("models/base")
    params = load_params(TrainParams)
    engine = Engine.load(params, read_split(Path("data/train.parquet")), Schedule.plan(params, 22), ONE_PROCESS)
    assert engine.messages[1] == (
        "The load-balancing loss of the experts is not added, because it depends on micro-batches"
    )


@pytest.mark.usefixtures("training_inputs")
def test_the_tuned_model_is_complete_and_its_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    train.main()
    names = {path.name for path in Path("models/tuned").iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads(Path("models/tuned/config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads(Path("models/tuned/generation_config.json").read_text())["eos_token_id"] == 0
    template = Path("models/tuned/chat_template.jinja").read_text()  # other programs prompt the model as in training
    assert Environment(autoescape=False).from_string(template).render(
        messages=[{"role": "user", "content": "Why?"}]
    ) == render_alpaca("Why?")
    card = Path("models/tuned/README.md").read_text()
    assert "# `tiny`, fine-tuned on `a.jsonl`" in card
    assert "| learning_rate | 0.001 |" in card
    assert "| training examples | 22; sha256 of `data/train.parquet`: `" in card
    (folder,) = Path(".scratch/train").glob("*/")
    assert sorted(path.name for path in folder.iterdir()) == ["finished", "run.json", "step-00000020"]
    capsys.readouterr()
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.endswith("\n")


def test_the_tuned_model_has_the_lowest_validation_loss(training_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Engine.validation_loss, count(1)
    # From the tenth validation on the losses are high, so the best checkpoint is not the last.
    monkeypatch.setattr(Engine, "validation_loss", lambda *args: real(*args) + 100 * (next(calls) >= 10))
    edit(training_inputs, eval_steps="1")
    train.main()
    monkeypatch.setattr(Engine, "validation_loss", real)
    validations = curve("validation_loss")
    metrics = json.loads(Path("metrics/train.json").read_text())
    best_step, best_loss = min(validations, key=lambda record: record[1])
    assert len(validations) == 24
    assert best_step < 10
    assert (metrics["best_step"], metrics["validation_loss"]) == (best_step, pytest.approx(best_loss, rel=1e-5))
    examples = read_split(Path("data/validation.parquet"))
    # The saved weights are those that were validated, except for rounding to bf16.
    assert validation_loss(Path("models/tuned"), examples) == pytest.approx(best_loss, rel=5e-3)


def test_training_stops_after_validations_without_a_lower_loss(
    training_inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([3.0, 2.0, 2.5, 1.5, 1.6, 1.5, 1.4])
    monkeypatch.setattr(Engine, "validation_loss", lambda *_: next(losses))
    edit(training_inputs, eval_steps="3", early_stopping_patience="2")
    train.main()
    assert curve("validation_loss") == [(3, 3.0), (6, 2.0), (9, 2.5), (12, 1.5), (15, 1.6), (18, 1.5)]
    metrics = json.loads(Path("metrics/train.json").read_text())
    assert (metrics["steps"], metrics["best_step"], metrics["validation_loss"]) == (18, 12, 1.5)
    assert "Stopped early at step 18: 2 validations without a lower loss\n" in capsys.readouterr().out


def test_a_run_of_max_steps_ends_within_an_epoch_and_reports_its_speed(
    training_inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(training_inputs, max_steps="4")
    train.main()
    assert [step for step, _ in curve("loss")] == [1, 2, 3, 4]
    assert json.loads(Path("metrics/train.json").read_text())["steps"] == 4
    assert re.search(r"^  speed +[\d,]+ tokens/s, \d+% of peak$", capsys.readouterr().out, re.M)


def validation_loss(folder: Path, examples: Any) -> float:
    params = load_params(TrainParams)
    schedule = Schedule.plan(params, 22)
    engine = Engine(load_model(folder), PaddedBatches(Limits(1000, 1000)), params, schedule, ONE_PROCESS)
    return engine.validation_loss(examples)


def outcome() -> dict[str, bytes]:
    paths = [*Path("models/tuned").rglob("*"), *Path("metrics").iterdir()]
    return {str(path): path.read_bytes() for path in sorted(paths) if path.is_file()}


def take_outcome() -> dict[str, bytes]:
    """The outcome of a run, which is then deleted with its checkpoints."""
    taken = outcome()
    for folder in ("models/tuned", "metrics", ".scratch"):
        shutil.rmtree(folder)
    return taken


@contextmanager
def interruption(step: int) -> Iterator[None]:
    """The run in the block is interrupted when it checks the loss of this step."""
    real = engine_module.require_finite

    def interrupting(name: str, value: float, at: int, examples: Any) -> float:
        if at == step:
            raise KeyboardInterrupt
        return real(name, value, at, examples)

    with pytest.MonkeyPatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(engine_module, "require_finite", interrupting)
        yield


def assert_resumes_to_the_same_bytes(capsys: pytest.CaptureFixture[str], interrupted_at: int, resumed_from: int) -> str:
    """Train, then train again with an interruption; returns the log of the run that resumes."""
    train.main()
    expected = take_outcome()
    with interruption(interrupted_at):
        train.main()
    assert not Path("models/tuned").exists()
    capsys.readouterr()
    train.main()
    log = capsys.readouterr().out
    assert f"Resuming from the checkpoint at step {resumed_from}\n" in log
    assert outcome() == expected
    return log


@pytest.mark.parametrize(
    ("interrupted_at", "resumed_from", "dropout", "params"),
    [
        (14, 10, 0.0, {"save_steps": "5", "logging_steps": "3"}),
        (24, 21, 0.2, {"save_steps": "7", "logging_steps": "4"}),
        (2, 1, 0.2, {"save_steps": "1", "logging_steps": "24"}),
        (14, 10, 0.0, {"save_steps": "0.25", "max_steps": "17", "min_learning_rate_ratio": "0.1"}),
        (7, 5, 0.0, {"save_steps": "5", "eval_steps": "2", "early_stopping_patience": "3", "learning_rate": "0.3"}),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    training_inputs: Path,
    capsys: pytest.CaptureFixture[str],
    interrupted_at: int,
    resumed_from: int,
    dropout: float,
    params: dict[str, str],
) -> None:
    config = json.loads(Path("models/base/config.json").read_text())
    Path("models/base/config.json").write_text(json.dumps({**config, "attention_dropout": dropout}))
    edit(training_inputs, **params)
    assert_resumes_to_the_same_bytes(capsys, interrupted_at, resumed_from)


def test_logging_and_saving_may_change_when_a_run_is_resumed(
    training_inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(training_inputs, logging_steps="4")
    train.main()
    expected = take_outcome()
    edit(training_inputs, logging_steps="1")
    with interruption(14):
        train.main()
    edit(training_inputs, logging_steps="4", save_steps="7")
    capsys.readouterr()
    train.main()
    assert "Resuming from the checkpoint at step 10\n" in capsys.readouterr().out
    found = outcome()
    for one in (expected, found):
        del one["models/tuned/README.md"]  # lists all parameters
    assert found == expected


def test_a_run_with_changed_parameters_or_code_starts_from_the_beginning_and_says_why(
    training_inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with interruption(14):
        train.main()
    edit(training_inputs, seed="7", optimizer="adamw_8bit")
    with Path("stages/engine/loss.py").open("a") as file:
        file.write("# another line\n")
    train.main()
    log = capsys.readouterr().out
    assert (
        "Starting from the beginning: the checkpoint at step 10 is of a run with optimizer: adamw (now adamw_8bit), "
        "seed: 42 (now 7), another stages/engine/loss.py\n"
    ) in log
    assert "Resuming" not in log


def test_a_gradient_that_is_not_finite_ends_the_run_with_its_step_and_examples(training_inputs: Path) -> None:
    edit(training_inputs, learning_rate="1e30", lr_scheduler="constant", warmup_steps="0", max_grad_norm="1e30")
    with pytest.raises(UserError) as error:
        train.main()
    assert str(error.value) == (
        "step 2: gradient norm is nan; lower learning_rate or max_grad_norm, or set precision to fp32. "
        "Check these examples of data/train.parquet: 5, 11, 12, 20"
    )
    assert not Path("models/tuned").exists()


@pytest.mark.usefixtures("training_inputs")
def test_a_loss_that_is_not_finite_ends_the_run_with_its_step_and_examples() -> None:
    weights = load_file("models/base/model.safetensors")
    weights["model.norm.weight"] *= float("nan")
    save_file(weights, "models/base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^step 1: loss is nan; .* examples of data/train.parquet: \d+"):
        train.main()
    assert not Path("models/tuned").exists()


def test_the_division_of_a_batch_changes_no_loss_and_the_smaller_last_batch_is_trained(training_inputs: Path) -> None:
    edit(training_inputs, num_epochs="1")
    losses = []
    for batch_size, accumulation in (("4", "1"), ("1", "4"), ("2", "2")):
        edit(training_inputs, batch_size=batch_size, gradient_accumulation_steps=accumulation)
        train.main()
        losses.append([loss for _, loss in curve("loss")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    metrics = json.loads(Path("metrics/train.json").read_text())
    assert metrics["steps"] == 6  # five of 4 examples, one of 2
    assert metrics["supervised_tokens"] == sum(one.num_supervised for one in read_split(Path("data/train.parquet")))


def test_a_validation_between_two_logged_steps_has_its_own_row(training_inputs: Path) -> None:
    edit(training_inputs, num_epochs="1", logging_steps="4", eval_steps="3")
    train.main()
    assert [step for step, _ in curve("loss")] == [4, 6]
    assert [step for step, _ in curve("validation_loss")] == [3, 6]
    lines = Path("metrics/curve.csv").read_text().splitlines()
    assert lines[0] == "step,loss,validation_loss,learning_rate,gradient_norm"
    assert [line.count(",") for line in lines] == [4, 4, 4, 4]
    assert re.fullmatch(r"3,,[\d.]+,,", lines[1])


def test_the_curve_has_averages_over_the_logged_steps(training_inputs: Path) -> None:
    edit(training_inputs, num_epochs="1", lr_scheduler="constant", learning_rate="1e-9", warmup_steps="0")
    edit(training_inputs, logging_steps="6")
    train.main()
    ((step, found),) = curve("loss")
    examples = read_split(Path("data/train.parquet"))
    assert step == 6
    assert found == pytest.approx(validation_loss(Path("models/base"), examples), rel=1e-4)
