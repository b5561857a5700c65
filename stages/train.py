"""The training loop: `models/base` + `data/train.parquet` → `models/tuned`, the checkpoint that is best on validation.

Loss is summed over supervised tokens and divided once by their number in the effective batch, so that how a batch is
cut into micro-batches never changes the gradient.
"""

import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.shared.errors import UserError
from stages.shared.examples import Example, read_split
from stages.shared.files import atomic_path, read_json, table_sha256, write_csv, write_json, write_text
from stages.shared.masking import load_tokenizer
from stages.shared.params import TrainParams, load_params
from stages.shared.run import run
from stages.shared.templates import load_template, render_alpaca
from stages.shared.terminal import disk_use, size, summary
from stages.shared.text import code

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stages.shared.batches import Batches
    from stages.shared.checkpoints import Checkpoints
    from stages.shared.distributed import Processes

BASE, TUNED = Path("models/base"), Path("models/tuned")
CURVE = Path("metrics/curve.csv")
POINT = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm")  # of the curve
ADAPTER = """
The adapter alone lies in `adapter/`; `peft` puts it on the base model, and takes it off again:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("models/base")
model = PeftModel.from_pretrained(base, "models/tuned/adapter")
```
"""  # of the model card
STEPS_TO_ESTIMATE = 3  # then the pace is known


def main() -> None:
    params = load_params(TrainParams)
    train, validation = read_split(Path("data/train.parquet")), read_split(Path("data/validation.parquet"))
    num_steps = params.num_epochs * math.ceil(len(train) / effective_batch(params))
    num_warmup_steps = count_warmup_steps(params.warmup_steps, num_steps)

    from stages.shared.checkpoints import Checkpoints
    from stages.shared.distributed import start
    from stages.shared.environment import environment
    from stages.shared.models import uses_bf16

    processes = start()
    made_with = environment(processes.device, str(processes) if processes.count > 1 else None)
    with ExitStack() as stack:
        # The first process holds the run's folder, the others read in it.
        opened = Checkpoints.opened("train", params.model_dump(), made_with)
        checkpoints = Checkpoints(processes.first(lambda: stack.enter_context(opened).folder))
        model, batches, said = prepare(params, [*train, *validation], processes)
        precision = "bf16" if uses_bf16(params.precision, model.device) else "fp32"
        steps = f"{len(train):,} examples, {num_steps:,} steps of {effective_batch(params)}"
        print(f"{steps}; {precision} on {model.device}")
        if processes.count > 1:
            print(f"{params.launcher}: {processes}")
        print(*said, sep="\n", flush=True)
        metrics = fit(model, batches, train, validation, params, num_steps, num_warmup_steps, checkpoints, processes)
        if processes.is_first:
            save_tuned(model, params, metrics, checkpoints)
            write_json(Path("metrics/train.json"), {**metrics, "environment": made_with})
    processes.end()
    if not processes.is_first:
        return
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


def prepare(
    params: TrainParams, examples: Sequence[Example], processes: "Processes", base: Path = BASE
) -> tuple["PreTrainedModel", "Batches", list[str]]:
    """The base model, ready to train, how its batches are cut, and what a person may know of both."""
    import torch
    from transformers import set_seed

    from stages.shared.loss import choose_batches
    from stages.shared.models import load_model, load_shape, uses_bf16

    set_seed(params.seed)
    if not processes.sharded:
        model = load_model(base, processes.device).train()
    elif processes.is_first:
        model = load_model(base, torch.device("cpu")).train()
    else:
        model = load_shape(base).train()
    said = []
    if params.finetuning == "lora":
        said.append(add_adapters_to(model, params))
    if processes.sharded:
        processes.shard(model)
    if processes.rank:
        set_seed(params.seed + processes.rank)  # other dropout in each, after the same adapters
    batches, reason = choose_batches(model, examples, params.batch_size * params.max_length)
    if params.finetuning == "lora" and uses_bf16(params.precision, model.device) and not processes.sharded:
        from stages.shared.lora import store_frozen_in_bf16

        store_frozen_in_bf16(model)  # only now: what was computed above was computed in fp32
    return model, batches, [*said, f"Engine: {reason}"]


def add_adapters_to(model: "PreTrainedModel", params: TrainParams) -> str:
    from stages.shared.lora import add_adapters

    return add_adapters(model, params.lora_rank, params.lora_alpha, params.lora_dropout, params.lora_target_modules)


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
    processes: "Processes",
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
    from stages.shared.checkpoints import load
    from stages.shared.distributed import join
    from stages.shared.loss import accumulate_gradient
    from stages.shared.models import autocast

    optimizer = torch.optim.AdamW(parameter_groups(model, params.weight_decay), params.learning_rate, fused=True)
    kind = "constant_with_warmup" if params.lr_scheduler == "constant" else params.lr_scheduler
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps, num_steps)
    state: dict[str, Any] = {"step": 0, "curve": []}  # of the curve: step and what was measured then
    # Summed loss and supervised tokens of the run, and of what the next point of the curve averages.
    state |= {"run_loss": 0.0, "run_tokens": 0, "point_loss": 0.0, "point_tokens": 0}
    if folder := processes.first(checkpoints.newest):
        state = restore(load(folder), model, optimizer, scheduler, processes)
        print(f"Going on from the checkpoint of step {state['step']:,}", flush=True)

    processes.join_gradients(list(trained_parameters(model).values()))
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
            # Around all of a step: weights are cast once.
            with autocast(params.precision, model.device, keep=not processes.sharded):
                for micro_batch, counts in processes.cut(batches, batch):
                    # What does not count is divided by infinity: its gradient is 0.
                    loss = accumulate_gradient(model, micro_batch, num_supervised if counts else math.inf)
                    loss_sum += counts * require_finite("loss", loss, state["step"] + 1, micro_batch.examples)
            loss_sum = processes.sum_loss(loss_sum)
            processes.sum_gradients()
            norm = join(torch.nn.utils.clip_grad_norm_(model.parameters(), params.max_grad_norm)).item()
            require_finite("gradient norm", norm, state["step"] + 1, batch)

            # Step.
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=not processes.gradients)
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
                validation_loss = validate(model, batches, validation, params.precision, processes)
                require_finite("validation loss", validation_loss, state["step"], batch)
                if validation_loss < min((loss for _, loss in validations(state["curve"])), default=math.inf):
                    best = processes.whole(trained_parameters(model))
                    if processes.is_first:
                        checkpoints.save_best(best)
                point["validation_loss"] = validation_loss
            if any(value is not None for value in point.values()):
                state["curve"].append({**point, "step": state["step"]})
                if processes.is_first:
                    write_csv(CURVE, ",".join(POINT), [list(point.values()) for point in state["curve"]])
            if state["step"] % params.save_steps == 0 and not last:
                tensors, to_go_on = snapshot(model, optimizer, scheduler, state, processes)
                if processes.is_first:
                    checkpoints.save(state["step"], tensors, to_go_on)
    progress.close()
    if processes.count > 1 and processes.mean:
        print(
            f"The busiest process of a step computed {processes.busiest / processes.mean:.3f} times the mean's tokens"
        )

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


def validate(
    model: "PreTrainedModel",
    batches: "Batches",
    examples: Sequence[Example],
    precision: str,
    processes: "Processes",
) -> float:
    """Mean loss over all supervised tokens, in nats."""
    import torch

    from stages.shared.loss import token_losses
    from stages.shared.models import autocast

    model.eval()
    # Not inference_mode: what sharded weights are gathered into is used in training again.
    with torch.no_grad(), autocast(precision, model.device, keep=not processes.sharded):
        total = sum(
            counts * token_losses(model, batch).losses.sum().item()
            for batch, counts in processes.cut(batches, examples)
        )
    model.train()
    processes.tokens = 0
    return sum(part for (part,) in processes.gather(total)) / sum(example.num_supervised for example in examples)


def trained_parameters(model: "PreTrainedModel") -> dict[str, "torch.Tensor"]:
    """By name: all of them, or with LoRA the adapters'. Those of the base model are frozen then."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: "PreTrainedModel", weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on biases and norms, which are vectors."""
    parameters = trained_parameters(model).values()
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
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
    model: "PreTrainedModel",
    optimizer: "torch.optim.Optimizer",
    scheduler: Any,
    state: dict[str, Any],
    processes: "Processes",
) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
    """All that a run needs to go on bit for bit, as tensors and as JSON-able state."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in trained_parameters(model).items()}
    saved = optimizer.state_dict()
    for index, entry in saved["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in entry.items()}
    tensors = processes.whole(tensors) | processes.random_states()
    return tensors, {**state, "param_groups": saved["param_groups"], "scheduler": scheduler.state_dict()}


def restore(
    checkpoint: tuple[dict[str, "torch.Tensor"], dict[str, Any]],
    model: "PreTrainedModel",
    optimizer: "torch.optim.Optimizer",
    scheduler: Any,
    processes: "Processes",
) -> dict[str, Any]:
    """The reverse of `snapshot`. Returns the JSON-able state of the loop."""
    import torch

    from stages.shared.distributed import part

    tensors, state = checkpoint
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(part(tensors[f"model.{name}"], parameter))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            entries.setdefault(int(index), {})[key] = part(tensor, parameters[int(index)])
    optimizer.load_state_dict({"state": entries, "param_groups": state.pop("param_groups")})
    scheduler.load_state_dict(state.pop("scheduler"))
    processes.restore_random_state(tensors)
    return state


def save_tuned(
    model: "PreTrainedModel", params: TrainParams, metrics: dict[str, Any], checkpoints: "Checkpoints"
) -> None:
    """Write `models/tuned`: the best weights in the base checkpoint's dtype, tokenizer, stop token, model card."""
    import torch
    from transformers import GenerationConfig

    from stages.shared.models import checkpoint_dtype, load_model

    if hasattr(model, "unshard"):  # a part of it is here
        model = load_model(BASE, torch.device("cpu"))
        if params.finetuning == "lora":
            add_adapters_to(model, params)
    best = checkpoints.load_best()
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(best[name])
    tokenizer = load_tokenizer()
    template = load_template(params.template, tokenizer)
    tokenizer.chat_template = template.chat_template or tokenizer.chat_template
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(template.end_token_id)
    with atomic_path(TUNED, durable=True) as partial:
        if params.finetuning == "lora":
            from stages.shared.lora import merge, save_adapter

            save_adapter(model, BASE, partial / "adapter")
            model = merge(BASE, partial / "adapter")
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=template.end_token_id,  # the one that was trained, whatever the base model stopped at
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else template.end_token_id,
        )
        torch.nn.Module.to(model, checkpoint_dtype(BASE))
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_text(partial / "README.md", model_card(params, metrics))


def model_card(params: TrainParams, metrics: dict[str, Any]) -> str:
    base = read_json(BASE / "source.json")
    data = read_json(Path("data/source.json"))
    data_hash = table_sha256(Path("data/train.parquet"))
    listed = "\n".join(f"| {name} | {value} |" for name, value in params.model_dump().items())
    question = "What is the capital of France?"
    if params.template == "alpaca":
        ask = f'prompt = {render_alpaca(question)!r}\ninputs = tokenizer(prompt, return_tensors="pt")'
    else:
        ask = f'messages = [{{"role": "user", "content": "{question}"}}]\ninputs = tokenizer.apply_chat_template('
        ask += 'messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)'
    how = f"LoRA of rank {params.lora_rank}; the weights are merged" if params.finetuning == "lora" else "all weights"
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
| fine-tuned | {how} |
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
{ask}
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
{ADAPTER if params.finetuning == "lora" else ""}"""


if __name__ == "__main__":
    run(main)
