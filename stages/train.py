"""Fine-tune `models/base` on `data/train.parquet` → `models/tuned`, the checkpoint with the lowest validation loss."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.data.examples import Example, read_split
from stages.data.files import atomic_path, read_json, write_json, write_text
from stages.data.tokenizer import PROMPT_FORMAT, load_tokenizer
from stages.engine.schedule import Schedule, effective_batch_size
from stages.runtime.params import TrainParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import disk_usage, format_bytes, summary

if TYPE_CHECKING:
    from stages.engine.checkpoints import Checkpoints
    from stages.engine.engine import Engine
    from stages.engine.training_log import TrainingLog

# Parameters that may differ when a run is resumed: any number of processes can read its checkpoints.
RESUMABLE = {"launcher", "logging_steps", "save_steps"}
TUNED, METRICS, CURVE = Path("models/tuned"), Path("metrics/train.json"), Path("metrics/curve.csv")


def main() -> None:
    result = train_model(load_params(TrainParams), TUNED, CURVE)
    if result is None:
        return
    metrics, speed = result
    write_json(METRICS, metrics)
    root = Path(os.environ.get("DVC_ROOT", "."))
    used = [f"{format_bytes(disk_usage(root / name))} in {name}" for name in (".dvc/cache", ".scratch")]
    summary(
        {
            "training": f"loss {metrics['loss']:.4f}, mean of the run",
            "validation": f"loss {metrics['validation_loss']:.4f} at step {metrics['best_step']:,}, the best",
            "speed": speed,
            "disk": f"{', '.join(used)}; how to free it: docs/reliability.md, Disk",
        },
        wrote=[TUNED, CURVE, METRICS],
        then="make chat",
    )


def train_model(params: TrainParams, tuned: Path, curve: Path | None = None) -> tuple[dict[str, Any], str] | None:
    """Train the base model, and save the model with the lowest validation loss to the folder `tuned`.

    Args:
        curve: where to write the training curve.

    Returns:
        The metrics of the run and its speed on the main process, None on the other ranks.
    """
    train, validation = read_split(Path("data/train.parquet")), read_split(Path("data/validation.parquet"))
    schedule = Schedule.plan(params, len(train))  # reports mistakes before torch is imported

    from stages.engine.checkpoints import Checkpoints
    from stages.engine.distributed import init_distributed
    from stages.engine.engine import Engine
    from stages.engine.environment import environment
    from stages.engine.speed import matmul_rate
    from stages.engine.training_log import TrainingLog

    context = init_distributed()
    run_environment = environment(context.device)
    with ExitStack() as stack:
        # The main process locks the folder of the run; the other ranks only read it.
        open_run = Checkpoints.open_run("train", params.model_dump(exclude=RESUMABLE), run_environment)
        folder = context.broadcast_from_main(lambda: stack.enter_context(open_run).folder)
        checkpoints = Checkpoints(folder, read_only=not context.is_main_process)
        engine = Engine.load(params, chain(train, validation), schedule, context)
        print(f"{len(train):,} examples, {schedule.num_steps:,} steps of {effective_batch_size(params)}")
        if context.world_size > 1:
            print(f"Launcher: {params.launcher}: {context}")
        print(*engine.messages, sep="\n", flush=True)
        peak = sum(context.gather(matmul_rate(context.device, params.precision)))
        log = TrainingLog(schedule.num_steps, params.logging_steps, curve if context.is_main_process else None, peak)
        metrics = fit(engine, train, validation, checkpoints, log)
        if context.is_main_process:
            save_tuned(engine, metrics, checkpoints, tuned)
    context.shutdown()
    if context.world_size > 1:
        run_environment["processes"] = str(context)
    return ({**metrics, "environment": run_environment}, log.speed) if context.is_main_process else None


def fit(
    engine: "Engine",
    train: Sequence[Example],
    validation: Sequence[Example],
    checkpoints: "Checkpoints",
    log: "TrainingLog",
) -> dict[str, Any]:
    """Train, resuming from a checkpoint if there is one; save the weights with the lowest validation loss.

    Returns:
        The metrics of the run.

    Raises:
        UserError: the loss or the gradient is not finite.
    """
    from stages.engine.engine import require_finite

    params, schedule = engine.params, engine.schedule
    if state := engine.resume(checkpoints):
        log.load_state_dict(state["log"])
        print(f"Resuming from the checkpoint at step {log.step:,}", flush=True)

    for batch in engine.prepare(effective_batches(train, params, schedule, first_step=log.step)):
        # Step.
        result = engine.train_step(batch)

        # Log.
        log.log_step(result)

        # Validate, and keep the best.
        if schedule.validates_after(log.step):
            loss = engine.validation_loss(validation)
            if log.log_validation(require_finite("validation loss", loss, log.step, batch.examples)):
                checkpoints.save_best(engine.trainable_weights())
        log.write()

        # Stop early.
        stale = log.validations_since_best  # validations without a lower loss
        if params.early_stopping_patience and stale >= params.early_stopping_patience and log.step < schedule.num_steps:
            print(f"Stopped early at step {log.step:,}: {stale} validations without a lower loss")
            log.end()
            break

        # Checkpoint.
        if schedule.saves_after(log.step):
            tensors, engine_state = engine.state_dict()
            checkpoints.save(log.step, tensors, {"engine": engine_state, "log": log.state_dict()})
    return log.metrics(len(train))


def effective_batches(
    train: Sequence[Example], params: TrainParams, schedule: Schedule, first_step: int
) -> Iterator[Sequence[Example]]:
    """The effective batches of the run from `first_step` (counted from 0) on.

    Their order is a function of seed and epoch, so checkpoints do not record it.
    """
    from stages.engine.batches import shuffled_batches

    first_epoch, done = divmod(first_step, schedule.steps_per_epoch)
    batches = chain.from_iterable(
        shuffled_batches(train, effective_batch_size(params), params.seed, epoch, 0 if epoch > first_epoch else done)
        for epoch in range(first_epoch, params.num_epochs)
    )
    return islice(batches, schedule.num_steps - first_step)


def save_tuned(engine: "Engine", metrics: dict[str, Any], checkpoints: "Checkpoints", folder: Path) -> None:
    """Write a folder with the best weights in the base checkpoint's dtype, tokenizer, EOS token and model card."""
    import torch
    from transformers import GenerationConfig

    from stages.engine.loading import BASE
    from stages.engine.model_card import model_card
    from stages.engine.models import checkpoint_dtype, load_as_stored, release_freed_memory, save_model
    from stages.engine.optimizer import trainable_parameters

    params = engine.params
    if params.finetuning != "full":
        from stages.engine.lora import add_adapters, merge, save_adapter, without_gradient
    model = engine.model
    if hasattr(model, "unshard"):  # this rank has only a part of a sharded model
        model = load_as_stored(BASE, torch.device("cpu"))
        if params.finetuning != "full":
            add_adapters(model, params)
    best = checkpoints.load_best()
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            parameter.copy_(best[name])
    tokenizer = load_tokenizer()
    prompt_format = read_json(PROMPT_FORMAT)
    eos_token_ids = prompt_format["eos_token_ids"]
    tokenizer.chat_template = prompt_format["chat_template"]  # so that other programs prompt the model as in training
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_token_ids[0])
    with atomic_path(folder, durable=True) as partial:
        if params.finetuning != "full":
            if names := without_gradient(model):
                print(f"Adapters unchanged by training: {names}", flush=True)
            save_adapter(model, BASE, partial / "adapter")
            for parameter in model.parameters():
                parameter.data = parameter.data.new_empty(0)  # merging loads the base again
            release_freed_memory()
            model = merge(BASE, partial / "adapter")
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            # Those that were trained; the base model may use others. A list only if there are several.
            eos_token_id=eos_token_ids if len(eos_token_ids) > 1 else eos_token_ids[0],
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
        torch.nn.Module.to(model, checkpoint_dtype(BASE))
        save_model(model, partial)
        tokenizer.save_pretrained(partial)
        write_text(partial / "README.md", model_card(params, metrics))


if __name__ == "__main__":
    run(main)
