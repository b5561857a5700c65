"""The training loop, held against a textbook loop on a tiny model."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from stages import train
from stages.shared import loss
from stages.shared.batches import Batches, FlatBatches, PaddedBatches, shuffle
from stages.shared.checkpoints import Checkpoints
from stages.shared.distributed import Processes
from stages.shared.errors import UserError
from stages.shared.examples import FORMATTED, read_split
from stages.shared.files import parquet_writer, write_json
from stages.shared.masking import load_tokenizer
from stages.shared.models import load_model
from stages.shared.params import TrainParams, load_params
from stages.shared.templates import AlpacaTemplate, Conversation
from tests.conftest import example
from tests.test_loss import CONFIGS, SLIDING_WINDOW, make
from tests.test_params import edit
from tests.textbook import textbook_steps

ALONE = Processes(torch.device("cpu"))


@pytest.mark.parametrize(
    ("warmup_steps", "num_steps", "expected"),
    [(0, 10, 0), (0, 1, 0), (0.1, 10, 1), (0.1, 51, 6), (0.5, 3, 2), (1, 2, 1), (9, 10, 9)],
)
def test_warmup_counts_steps_or_is_a_fraction(warmup_steps: float, num_steps: int, expected: int) -> None:
    assert train.count_warmup_steps(warmup_steps, num_steps) == expected


@pytest.mark.parametrize(("warmup_steps", "num_steps", "said"), [(10, 10, "10"), (500, 57, "500"), (0.9, 1, "1")])
def test_warmup_that_is_not_shorter_than_the_run_says_both_numbers(
    warmup_steps: float, num_steps: int, said: str
) -> None:
    with pytest.raises(UserError) as error:
        train.count_warmup_steps(warmup_steps, num_steps)
    assert f"which is {said} steps of a run of {num_steps}; must be shorter than the run" in str(error.value)


def test_biases_and_norms_are_not_decayed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Embedding(4, 2))
    decayed, free = train.parameter_groups(model, 0.1)  # type: ignore[arg-type]
    assert (decayed["weight_decay"], [tuple(p.shape) for p in decayed["params"]]) == (0.1, [(3, 2), (4, 2)])
    assert (free["weight_decay"], [tuple(p.shape) for p in free["params"]]) == (0.0, [(3,), (3,), (3,)])


@pytest.fixture
def inputs(project: Path, tiny_model: Path) -> Path:
    """All that train depends on: 22 examples of uneven length to train on, 5 to validate on, a tiny base model."""
    root = Path(__file__).parent.parent
    for name in ("stages", "templates"):
        shutil.copytree(root / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_model, project / "models/base")
    shutil.copytree(tiny_model, project / "models/tokenizer")
    write_json(project / "models/base/source.json", {"model_name": "tiny", "revision": None})
    write_json(
        project / "data/source.json", {"source": "a.jsonl", "revision": "sha256:00", "licence": None, "rows": 27}
    )
    template = AlpacaTemplate(load_tokenizer())
    for name, numbers in (("train", range(22)), ("validation", range(22, 27))):
        with parquet_writer(project / f"data/{name}.parquet", FORMATTED) as writer:
            for n in numbers:
                question = {"role": "user", "content": "Name a colour." * (1 + n % 3)}
                answer = {"role": "assistant", "content": "Red. " * (1 + n % 7)}
                encoded = template.format([Conversation([question, answer], "x" * (n % 2))], 256).encoded
                writer.write([{"example_id": str(n), "input_ids": encoded.input_ids, "labels": encoded.labels}])
    edit(project, batch_size="2", gradient_accumulation_steps="2", num_epochs="4", eval_steps="6", save_steps="5")
    edit(project, learning_rate="1e-3", lr_scheduler="cosine", warmup_steps="3", logging_steps="1", precision="fp32")
    return project


def curve(column: str) -> list[tuple[int, float]]:
    """Step and value of each point of the curve at which this column was measured."""
    with Path("metrics/curve.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row[column]]


def test_losses_and_weights_are_the_textbook_loops(inputs: Path) -> None:
    edit(inputs, eval_steps="1000")
    params = load_params(TrainParams)
    model = load_model(Path("models/base")).train()
    examples = read_split(Path("data/train.parquet"))
    batches = [batch for epoch in range(4) for batch in shuffle(examples, 4, params.seed, epoch)]
    losses = list(textbook_steps(model, batches, params, num_warmup_steps=3))
    train.main()
    points = curve("loss")
    assert [step for step, _ in points] == list(range(1, 25))
    assert [found for _, found in points] == pytest.approx(losses, rel=1e-5)
    assert [rate for _, rate in curve("learning_rate")[:4]] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3])
    assert losses[-1] < losses[0] - 0.3
    tuned = dict(load_model(Path("models/tuned")).named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(tuned[name], weight.to(torch.bfloat16).float(), rtol=8e-3, atol=1e-5)


PATHS: dict[str, Batches] = {
    "padded": PaddedBatches(1000),
    "padded, in small micro-batches": PaddedBatches(40),
    "flat": FlatBatches(1000),
    "flat, in small micro-batches": FlatBatches(40),
    "flat, prefix not shared": FlatBatches(1000, share_prefix=False),
}


def assert_trains_as_the_textbook_loop_does(config: PreTrainedConfig, batches: Batches | None = None) -> None:
    """Over 24 steps, to 1e-5. `batches` None: those that the stage chooses for this model."""
    edit(Path.cwd(), batch_size="4", gradient_accumulation_steps="2", num_epochs="8", eval_steps="1000")
    params = load_params(TrainParams)
    random = np.random.default_rng(0)
    beginnings = [random.integers(3, 50, 12).tolist() for _ in range(2)]
    examples = [
        example(
            beginnings[n % 2] + random.integers(3, 50, random.integers(1, 9)).tolist(),
            [*random.integers(3, 50, random.integers(0, 20)), 2],
            str(n),
        )
        for n in range(22)
    ]
    expected = make(config).train()
    effective_batches = [batch for epoch in range(8) for batch in shuffle(examples, 8, params.seed, epoch)]
    losses = list(textbook_steps(expected, effective_batches, params, num_warmup_steps=3))

    model = make(config).train()
    batches = batches or loss.choose_batches(model, examples, 1000)[0]
    checkpoints = Checkpoints(Path("checkpoints"))
    train.fit(model, batches, examples, examples[:3], params, 24, 3, checkpoints, ALONE)
    assert [point[1] for point in curve("loss")] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0] - 0.2
    for (name, weight), found in zip(expected.named_parameters(), model.parameters(), strict=True):
        difference = found - weight
        if name.endswith("c_attn.bias"):
            # A key's bias adds the same to all scores: its gradient is 0, and Adam makes steps of the rounding there.
            difference = torch.cat([difference[:32], difference[64:]])
        assert difference.norm() <= 1e-5 * weight.norm(), name


@pytest.mark.parametrize("logits_per_chunk", [50 * 7, 2**25])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
def test_every_path_trains_as_the_textbook_loop_does(
    architecture: str, path: str, logits_per_chunk: int, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", logits_per_chunk)
    assert_trains_as_the_textbook_loop_does(CONFIGS[architecture], PATHS[path])


def test_a_model_with_a_sliding_window_trains_as_the_textbook_loop_does(inputs: Path) -> None:
    assert_trains_as_the_textbook_loop_does(SLIDING_WINDOW)


def test_the_tuned_model_is_complete(inputs: Path) -> None:
    train.main()
    names = {path.name for path in Path("models/tuned").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads(Path("models/tuned/config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads(Path("models/tuned/generation_config.json").read_text())["eos_token_id"] == 0
    card = Path("models/tuned/README.md").read_text()
    assert "# `tiny`, fine-tuned on `a.jsonl`" in card
    assert "| learning_rate | 0.001 |" in card
    assert "| examples trained on | 22; sha256 of `data/train.parquet`: `" in card
    (run,) = Path(".scratch/train").glob("*/")
    assert sorted(path.name for path in run.iterdir()) == ["finished", "step-00000020"]


def test_the_usage_snippet_of_the_model_card_runs(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main()
    capsys.readouterr()
    snippet = Path("models/tuned/README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(snippet, {})
    assert capsys.readouterr().out.endswith("\n")


def test_the_best_checkpoint_on_validation_is_the_tuned_model(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = train.validate, count(1)
    # From the tenth on, validations are bad: the best is not the last.
    monkeypatch.setattr(train, "validate", lambda *args: real(*args) + 100 * (next(calls) >= 10))
    edit(inputs, eval_steps="1")
    train.main()
    monkeypatch.setattr(train, "validate", real)
    validations = curve("validation_loss")
    metrics = json.loads(Path("metrics/train.json").read_text())
    best_step, best_loss = min(validations, key=lambda point: point[1])
    assert len(validations) == 24
    assert best_step < 10
    assert (metrics["best_step"], metrics["validation_loss"]) == (best_step, pytest.approx(best_loss, rel=1e-5))

    from stages.shared.loss import choose_batches

    model = load_model(Path("models/tuned"))
    examples = read_split(Path("data/validation.parquet"))
    batches, _ = choose_batches(model.eval(), examples, 1000)
    # What was written is what was measured, but for bf16.
    assert train.validate(model, batches, examples, "fp32", ALONE) == pytest.approx(best_loss, rel=5e-3)


def outcome() -> dict[str, bytes]:
    paths = [*Path("models/tuned").iterdir(), *Path("metrics").iterdir()]
    return {str(path): path.read_bytes() for path in sorted(paths)}


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the loop fail when it computes this step's gradient norm. Returns the undoing."""
    real = train.require_finite

    def failing(name: str, value: float, at: int, examples: Any) -> float:
        if at == step:
            raise KeyboardInterrupt
        return real(name, value, at, examples)

    monkeypatch.setattr(train, "require_finite", failing)
    return lambda: monkeypatch.setattr(train, "require_finite", real)


@pytest.mark.parametrize(
    ("interrupted_at", "save_steps", "logging_steps", "dropout", "going_on_from"),
    [(14, 5, 1, 0.0, 10), (14, 5, 3, 0.0, 10), (24, 7, 4, 0.2, 21), (2, 1, 24, 0.2, 1)],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    interrupted_at: int,
    save_steps: int,
    logging_steps: int,
    dropout: float,
    going_on_from: int,
) -> None:
    config = json.loads(Path("models/base/config.json").read_text())
    Path("models/base/config.json").write_text(json.dumps({**config, "attention_dropout": dropout}))
    edit(inputs, save_steps=str(save_steps), logging_steps=str(logging_steps))
    train.main()
    expected = outcome()
    for folder in ("models/tuned", "metrics", ".scratch"):
        shutil.rmtree(folder)
    undo = interrupt_at(interrupted_at, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train.main()
    undo()
    assert not Path("models/tuned").exists()
    capsys.readouterr()
    train.main()
    assert f"Going on from the checkpoint of step {going_on_from}" in capsys.readouterr().out
    assert outcome() == expected


def test_a_run_whose_result_was_lost_after_its_end_goes_on_too(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main()
    expected = outcome()
    shutil.rmtree("models/tuned")
    capsys.readouterr()
    train.main()
    assert "Going on from the checkpoint of step 20" in capsys.readouterr().out
    assert outcome() == expected


@pytest.mark.parametrize("change", ["seed", "input", "code"])
def test_a_run_of_which_something_changed_starts_anew(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    undo = interrupt_at(14, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train.main()
    undo()
    if change == "seed":
        edit(inputs, seed="7")
    elif change == "input":
        Path("data/validation.parquet").write_bytes(Path("data/train.parquet").read_bytes())
    else:
        with Path("stages/shared/loss.py").open("a") as file:
            file.write("# another line\n")
    train.main()
    assert "Going on" not in capsys.readouterr().out


def test_a_gradient_that_is_not_finite_stops_the_run_with_step_and_examples(inputs: Path) -> None:
    edit(inputs, learning_rate="1e30", lr_scheduler="constant", warmup_steps="0", max_grad_norm="1e30")
    with pytest.raises(UserError) as error:
        train.main()
    assert str(error.value) == (
        "step 2: gradient norm is nan; lower learning_rate or max_grad_norm, or set precision to fp32. "
        "Look at these rows of data/train.parquet: 12, 15, 7, 6"
    )
    assert not Path("models/tuned").exists()


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_examples(inputs: Path) -> None:
    weights = load_file("models/base/model.safetensors")
    weights["model.norm.weight"] *= float("nan")
    save_file(weights, "models/base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^step 1: loss is nan; .* rows of data/train.parquet: \d+"):
        train.main()
    assert not Path("models/tuned").exists()


def test_the_last_smaller_batch_of_an_epoch_is_trained(inputs: Path) -> None:
    edit(inputs, num_epochs="1")
    train.main()
    metrics = json.loads(Path("metrics/train.json").read_text())
    examples = read_split(Path("data/train.parquet"))
    assert metrics["steps"] == 6  # five of 4 examples, one of 2
    assert metrics["supervised_tokens"] == sum(example.num_supervised for example in examples)


def test_how_a_batch_is_divided_changes_nothing(inputs: Path) -> None:
    edit(inputs, num_epochs="1")
    losses = []
    for batch_size, accumulation in (("4", "1"), ("1", "4"), ("2", "2")):
        edit(inputs, batch_size=batch_size, gradient_accumulation_steps=accumulation)
        train.main()
        losses.append([point[1] for point in curve("loss")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_validation_between_two_logged_steps_has_a_row_of_its_own(inputs: Path) -> None:
    edit(inputs, num_epochs="1", logging_steps="4", eval_steps="3")
    train.main()
    assert [step for step, _ in curve("loss")] == [4, 6]
    assert [step for step, _ in curve("validation_loss")] == [3, 6]
    lines = Path("metrics/curve.csv").read_text().splitlines()
    assert lines[0] == "step,loss,validation_loss,learning_rate,gradient_norm"
    assert [line.count(",") for line in lines] == [4, 4, 4, 4]
    assert re.fullmatch(r"3,,[\d.]+,,", lines[1])


def test_curves_are_averages_over_the_logged_steps(inputs: Path) -> None:
    edit(inputs, num_epochs="1", lr_scheduler="constant", learning_rate="1e-9", warmup_steps="0", logging_steps="6")
    train.main()
    ((step, loss),) = curve("loss")
    model = load_model(Path("models/base"))
    examples = read_split(Path("data/train.parquet"))
    assert step == 6
    assert loss == pytest.approx(train.validate(model, PaddedBatches(1000), examples, "fp32", ALONE), rel=1e-4)
