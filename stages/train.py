"""The training loop: `models/base` + `data/train.parquet` → `models/tuned`, the checkpoint that is best on validation.

Loss is summed over supervised tokens and divided once by their number in the effective batch, so that how a batch is
cut into micro-batches never changes the gradient.
"""

import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.shared.errors import UserError
from stages.shared.examples import Example, read_split
from stages.shared.files import atomic_path, file_sha256, read_json, write_csv, write_json, write_text
from stages.shared.params import TrainParams, load_params
from stages.shared.run import run
from stages.shared.templates import render_prompt
from stages.shared.terminal import disk_use, size, summary
from stages.shared.text import code

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stages.shared.batches import Batches
    from stages.shared.checkpoints import Checkpoints

BASE, TUNED = Path("models/base"), Path("models/tuned")
CURVE = Path("metrics/curve.csv")
POINT = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm")  # of the curve
STEPS_TO_ESTIMATE = 3  # then the pace is known


def main() -> None:
    params = load_params(TrainParams)
    train, validation = read_split(Path("data/train.parquet")), read_split(Path("data/validation.parquet"))
    num_steps = params.num_epochs * math.ceil(len(train) / effective_batch(params))
    num_warmup_steps = count_warmup_steps(params.warmup_steps, num_steps)

    from transformers import set_seed

    from stages.shared.checkpoints import Checkpoints
    from stages.shared.environment import environment
    from stages.shared.loss import choose_batches
    from stages.shared.models import load_model, pick_device, uses_bf16

    made_with = environment(pick_device())
    with Checkpoints.opened("train", params.model_dump(), made_with) as checkpoints:
        set_seed(params.seed)
        model = load_model(BASE).train()
        batches, reason = choose_batches(model, [*train, *validation], params.batch_size * params.max_length)
        precision = "bf16" if uses_bf16(params.precision, model.device) else "fp32"
        print(
            f"{len(train):,} examples, {num_steps:,} steps of {effective_batch(params)}; {precision} on {model.device}"
        )
        print(f"Engine: {reason}", flush=True)
        metrics = fit(model, batches, train, validation, params, num_steps, num_warmup_steps, checkpoints)
        save_tuned(model, params, metrics, checkpoints)
        write_json(Path("metrics/train.json"), {**metrics, "environment": made_with})
    root = Path(os.environ.get("DVC_ROOT", "."))
    used = [f"{size(disk_use(root / folder))} in {folder}" for folder in (".dvc/cache", ".scratch")]
    summary(
        {
            "training": f"loss {metrics['loss']:.4f}, mean of the run",
            "validation": f"loss {metrics['validation_loss']:.4f} at step {metrics['best_step']:,}, the best",
            "disk": f"{', '.join(used)}; how to get it back is in the README, Disk",
        },
        wrote=[TUNED, CURVE, "metrics/train.json"],
        then="make chat",
    )


def effective_batch(params: TrainParams) -> int:
    """Examples for each optimizer step."""
    return params.batch_size * params.gradient_accumulation_steps


def count_warmup_steps(warmup_steps: float, num_steps: int) -> int:
    """Optimizer steps of warmup: 1 or more counts steps, below 1 is a fraction of the run.

    Raises:
        UserError: warmup is not shorter than the run.
    """
    steps = int(warmup_steps) if warmup_steps >= 1 else math.ceil(warmup_steps * num_steps)
    if steps and steps >= num_steps:
        raise UserError(
            f"warmup_steps: found {warmup_steps:g}, which is {steps:,} steps of a run of {num_steps:,}; "
            "must be shorter than the run: lower it, or train longer (num_epochs, a smaller effective batch)"
        )
    return steps


def fit(
    model: "PreTrainedModel",
    batches: "Batches",
    train: Sequence[Example],
    validation: Sequence[Example],
    params: TrainParams,
    num_steps: int,
    num_warmup_steps: int,
    checkpoints: "Checkpoints",
) -> dict[str, Any]:
    """Train, from a checkpoint if there is one; leave the weights with the lowest validation loss in `checkpoints`.

    Returns:
        The metrics of the run.

    Raises:
        UserError: the loss or the gradient is not finite.
    """
    import torch
    from tqdm import tqdm
    from transformers import get_scheduler

    from stages.shared.batches import shuffle
    from stages.shared.loss import accumulate_gradient
    from stages.shared.models import autocast

    optimizer = torch.optim.AdamW(parameter_groups(model, params.weight_decay), params.learning_rate, fused=True)
    kind = "constant_with_warmup" if params.lr_scheduler == "constant" else params.lr_scheduler
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps, num_steps)
    state: dict[str, Any] = {"step": 0, "curve": []}  # of the curve: step and what was measured then
    # Summed loss and supervised tokens of the run, and of what the next point of the curve averages.
    state |= {"run_loss": 0.0, "run_tokens": 0, "point_loss": 0.0, "point_tokens": 0}
    if checkpoint := checkpoints.load():
        state = restore(checkpoint, model, optimizer, scheduler)
        print(f"Going on from the checkpoint of step {state['step']:,}", flush=True)

    steps_per_epoch = num_steps // params.num_epochs
    progress = tqdm(total=num_steps, initial=state["step"], unit="step")
    started, first = time.monotonic(), state["step"]
    while state["step"] < num_steps:
        # The data order is a function of seed and epoch, so a resumed run needs no record of it.
        epoch, done = divmod(state["step"], steps_per_epoch)
        for batch in shuffle(train, effective_batch(params), params.seed, epoch)[done:]:
            # Forward and backward.
            num_supervised = sum(example.num_supervised for example in batch)
            loss_sum = 0.0
            with autocast(params.precision, model.device):  # around all of a step: weights are cast once
                for micro_batch in batches.cut(batch):
                    loss = accumulate_gradient(model, micro_batch, num_supervised)
                    loss_sum += require_finite("loss", loss, state["step"] + 1, micro_batch.examples)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), params.max_grad_norm).item()
            require_finite("gradient norm", norm, state["step"] + 1, batch)

            # Step.
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            state["step"] += 1
            for name in ("run", "point"):
                state[f"{name}_loss"] += loss_sum
                state[f"{name}_tokens"] += num_supervised
            last = state["step"] == num_steps

            # Log.
            point = dict.fromkeys(POINT)
            if state["step"] % params.logging_steps == 0 or last:
                loss_mean = state["point_loss"] / state["point_tokens"]
                point |= {"loss": loss_mean, "learning_rate": learning_rate, "gradient_norm": norm}
                state["point_loss"], state["point_tokens"] = 0.0, 0
                rate = sum(len(example.input_ids) for example in batch) * (progress.format_dict["rate"] or 0)
                progress.set_postfix_str(f"loss {loss_mean:.3f}, lr {learning_rate:.2e}, {rate:,.0f} tokens/s")
            progress.update()
            if state["step"] == first + STEPS_TO_ESTIMATE:
                minutes = (time.monotonic() - started) / STEPS_TO_ESTIMATE * (num_steps - state["step"]) / 60
                tqdm.write(f"About {math.ceil(minutes):,} min to come, validation apart")

            # Validate, and keep the best.
            if state["step"] % params.eval_steps == 0 or last:
                validation_loss = validate(model, batches, validation, params.precision)
                require_finite("validation loss", validation_loss, state["step"], batch)
                if validation_loss < min((loss for _, loss in validations(state["curve"])), default=math.inf):
                    checkpoints.save_best(dict(model.named_parameters()))
                point["validation_loss"] = validation_loss
            if any(value is not None for value in point.values()):
                state["curve"].append({**point, "step": state["step"]})
                write_csv(CURVE, ",".join(POINT), [list(point.values()) for point in state["curve"]])
            if state["step"] % params.save_steps == 0 and not last:
                checkpoints.save(state["step"], *snapshot(model, optimizer, scheduler, state))
    progress.close()

    best_step, best_loss = min(validations(state["curve"]), key=lambda validation: validation[1])
    return {
        "steps": num_steps,
        "examples": len(train),
        "supervised_tokens": state["run_tokens"],
        "loss": state["run_loss"] / state["run_tokens"],
        "validation_loss": best_loss,
        "best_step": best_step,
    }


def validations(curve: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Step and loss of each validation so far."""
    return [(point["step"], point["validation_loss"]) for point in curve if point["validation_loss"] is not None]


def validate(model: "PreTrainedModel", batches: "Batches", examples: Sequence[Example], precision: str) -> float:
    """Mean loss over all supervised tokens, in nats."""
    import torch

    from stages.shared.loss import token_losses
    from stages.shared.models import autocast

    model.eval()
    with torch.inference_mode(), autocast(precision, model.device):
        total = sum(token_losses(model, batch).losses.sum().item() for batch in batches.cut(examples))
    model.train()
    return total / sum(example.num_supervised for example in examples)


def parameter_groups(model: "PreTrainedModel", weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on biases and norms, which are vectors."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def require_finite(name: str, value: float, step: int, examples: Sequence[Example]) -> float:
    if not math.isfinite(value):
        ids = ", ".join(example.example_id for example in examples[:16])
        raise UserError(
            f"step {step:,}: {name} is {value}; lower learning_rate or max_grad_norm, or set precision to fp32. "
            f"Look at these rows of data/train.parquet: {ids}"
        )
    return value


def snapshot(
    model: "PreTrainedModel", optimizer: "torch.optim.Optimizer", scheduler: Any, state: dict[str, Any]
) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
    """All that a run needs to go on bit for bit, as tensors and as JSON-able state."""
    import torch

    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    saved = optimizer.state_dict()
    for index, entry in saved["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in entry.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors, {**state, "param_groups": saved["param_groups"], "scheduler": scheduler.state_dict()}


def restore(
    checkpoint: tuple[dict[str, "torch.Tensor"], dict[str, Any]],
    model: "PreTrainedModel",
    optimizer: "torch.optim.Optimizer",
    scheduler: Any,
) -> dict[str, Any]:
    """The reverse of `snapshot`. Returns the JSON-able state of the loop."""
    import torch

    tensors, state = checkpoint
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            entries.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": state.pop("param_groups")})
    scheduler.load_state_dict(state.pop("scheduler"))
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return state


def save_tuned(
    model: "PreTrainedModel", params: TrainParams, metrics: dict[str, Any], checkpoints: "Checkpoints"
) -> None:
    """Write `models/tuned`: the best weights in the base checkpoint's dtype, tokenizer, stop token, model card."""
    import torch
    from transformers import GenerationConfig

    from stages.shared.models import checkpoint_dtype, load_tokenizer

    best = checkpoints.load_best()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(best[name])
    tokenizer = load_tokenizer()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # the one that was trained, whatever the base model stopped at
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    with atomic_path(TUNED, durable=True) as partial:
        torch.nn.Module.to(model, checkpoint_dtype(BASE))
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_text(partial / "README.md", model_card(params, metrics))


def model_card(params: TrainParams, metrics: dict[str, Any]) -> str:
    base = read_json(BASE / "source.json")
    data = read_json(Path("data/source.json"))
    data_hash = file_sha256(Path("data/train.parquet"))
    listed = "\n".join(f"| {name} | {value} |" for name, value in params.model_dump().items())
    prompt = render_prompt(params.template, "What is the capital of France?")
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
---
# {code(re.sub("#sha256=.*", "", base["model_name"]))}, fine-tuned on {code(data["source"])}

| what | value |
|---|---|
| base model | {code(base["model_name"])}, revision {code(base["revision"] or "as named")} |
| dataset | {code(data["source"])}, revision {code(data["revision"])}, licence {code(data["licence"] or "not stated")} |
| examples trained on | {metrics["examples"]:,}; sha256 of `data/train.parquet`: `{data_hash}` |
| training loss | {metrics["loss"]:.4f} nats a token, mean of the run |
| validation loss | {metrics["validation_loss"]:.4f} nats a token, step {metrics["best_step"]} of {metrics["steps"]} |

| parameter | value |
|---|---|
{listed}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("models/tuned")
tokenizer = AutoTokenizer.from_pretrained("models/tuned")
prompt = {prompt!r}
inputs = tokenizer(prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""


if __name__ == "__main__":
    run(main)
