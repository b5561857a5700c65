"""The training engine: optimizer steps and validation for any model, precision and number of processes."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from stages.data.examples import Example
from stages.engine.batches import Batches, Limits, MicroBatch, partition_by_cost
from stages.engine.checkpoints import Checkpoints, load
from stages.engine.distributed import DistributedContext, full_tensor, shard_like
from stages.engine.loading import BASE, load_for_training
from stages.engine.loss import attention_for, cross_entropy, forward, summed_loss
from stages.engine.memory import (
    available_memory,
    check_checkpointing,
    find_fit,
    largest_micro_batch,
    peak_memory,
    set_checkpointing,
    use_deterministic_kernels,
)
from stages.engine.models import autocast
from stages.engine.optimizer import create_optimizer, load_optimizer_state, optimizer_state, trainable_parameters
from stages.engine.probe import choose_batches
from stages.engine.schedule import Schedule
from stages.engine.speed import flops_per_token
from stages.runtime.errors import UserError
from stages.runtime.parallel import prefetch_map
from stages.runtime.params import TrainParams
from stages.runtime.terminal import format_bytes

CHUNK = 256  # validation examples whose micro-batches are in memory


@dataclass(frozen=True)
class EffectiveBatch:
    """The examples of an optimizer step, and the micro-batches of this rank."""

    examples: Sequence[Example]
    micro_batches: Sequence[MicroBatch]

    @property
    def num_supervised(self) -> int:
        """Supervised tokens of all ranks."""
        return sum(example.num_supervised for example in self.examples)


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, over all ranks.

    loss_sum: summed over the supervised tokens of the effective batch, in nats.
    num_supervised, num_tokens: supervised tokens and all tokens of the effective batch.
    gradient_norm: L2 norm before clipping.
    flops: model FLOPs of forward and backward.
    seconds: the duration of the step.
    """

    loss_sum: float
    num_supervised: int
    num_tokens: int
    learning_rate: float
    gradient_norm: float
    flops: float
    seconds: float = 0.0


class Engine:
    """A model in training with its optimizer, on one rank.

    Args:
        batches: how to divide an effective batch into micro-batches.
        messages: log messages about the model and its batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Batches,
        params: TrainParams,
        schedule: Schedule,
        context: DistributedContext,
        messages: Sequence[str] = (),
    ):
        self.model = model
        self.messages = list(messages)
        self.schedule = schedule
        self.params = params
        self._batches = batches
        self._context = context
        self._optimizer, self._scheduler = create_optimizer(model, params, schedule)
        self._flops_per_token = flops_per_token(model)

    @classmethod
    def load(
        cls,
        params: TrainParams,
        examples: Iterable[Example],
        schedule: Schedule,
        context: DistributedContext,
        base: Path = BASE,
    ) -> Self:
        """Load the base model and prepare it for training.

        Args:
            examples: all that the model will see, to choose batches that are exact for them.
        """
        model, messages = load_for_training(params, context, base)
        allowed = check_checkpointing(model, params.activation_checkpointing)
        # FSDP2 needs all ranks for it; then one choice for all, because rounding could make theirs differ.
        own_choice = choose_batches(model, examples, params.batch_size * params.max_length, params.precision)
        choice = context.broadcast_from_main(lambda: own_choice)
        context.reshard(model)
        engine = cls(model, choice.batches, params, schedule, context, [*messages, *choice.messages])
        engine._fit_to_device(choice.longest, allowed)
        return engine

    def prepare(self, batches: Iterable[Sequence[Example]]) -> Iterator[EffectiveBatch]:
        """Divide effective batches into the micro-batches of this rank.

        On a GPU, a thread prepares the next one during a step. On a CPU, it would take cores from the step: a default
        run took a third longer.
        """
        if self.model.device.type == "cuda":
            return prefetch_map(self._prepare, iter(batches), num_ahead=1)
        return map(self._prepare, batches)

    def _prepare(self, examples: Sequence[Example]) -> EffectiveBatch:
        ranks = partition_by_cost(self._batches.costs(examples), self._context.world_size)
        micro_batches = self._batches.micro_batches([examples[index] for index in ranks[self._context.rank]])
        if self.model.device.type != "cuda":
            return EffectiveBatch(examples, list(micro_batches))
        with torch.cuda.device(self.model.device):  # the current device is that of the thread
            return EffectiveBatch(examples, [micro_batch.pin_memory() for micro_batch in micro_batches])

    def train_step(self, batch: EffectiveBatch) -> StepResult:
        """Do one optimizer step, for the mean loss over the supervised tokens of an effective batch.

        The effective batch has `batch_size` * `gradient_accumulation_steps` examples. It is divided into micro-batches
        that fit into memory: each has a forward and a backward pass, and their gradients add up.

        Raises:
            UserError: the loss or the gradient is not finite.
        """
        start, losses = time.perf_counter(), []
        with self._autocast():  # around the whole step, so that each weight is cast once
            for micro_batch, is_padding_step in self._calls(batch):
                micro_batch = micro_batch.to(self.model.device)
                with attention_for(self.model, micro_batch):  # backward calls layers again if they are checkpointed
                    loss = cross_entropy(forward(self.model, micro_batch), micro_batch.labels).sum()
                    # Dividing by infinity makes the gradient of a padding step 0.
                    (loss / (math.inf if is_padding_step else batch.num_supervised)).backward()
                losses.append(loss.detach())
        self._context.all_reduce_gradients(self.model)
        gradient_norm = clip_grad_norm_(self.model.parameters(), self.params.max_grad_norm)
        result = self._step_result(batch, losses, gradient_norm)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        return replace(result, seconds=time.perf_counter() - start)

    def _step_result(self, batch: EffectiveBatch, losses: list[torch.Tensor], norm: torch.Tensor) -> StepResult:
        """Add up the losses of all ranks; waits for the device."""
        step, own_losses = self._scheduler.last_epoch + 1, self._own_losses(losses, batch)
        loss_sum = sum(self._context.gather(sum(own_losses)))
        for value, micro_batch in zip(own_losses, batch.micro_batches, strict=True):
            require_finite("loss", value, step, micro_batch.examples)
        require_finite("loss", loss_sum, step, batch.examples)  # of another rank
        return StepResult(
            loss_sum=loss_sum,
            num_supervised=batch.num_supervised,
            num_tokens=sum(len(example.input_ids) for example in batch.examples),
            learning_rate=float(self._scheduler.get_last_lr()[0]),
            gradient_norm=require_finite("gradient norm", full_tensor(norm).item(), step, batch.examples),
            flops=sum(self._context.gather(sum(map(self._flops, batch.micro_batches)))),
        )

    def validation_loss(self, examples: Sequence[Example]) -> float:
        """Mean loss over all supervised tokens, in nats/token."""
        total, num_supervised = 0.0, 0
        chunks = (examples[start : start + CHUNK] for start in range(0, len(examples), CHUNK))
        self.model.eval()
        # Not inference_mode: FSDP2 reuses the gathered weights in training.
        with torch.no_grad(), self._autocast():
            for batch in self.prepare(chunks):
                losses = [summed_loss(self.model, micro_batch) for micro_batch, _ in self._calls(batch)]
                total += sum(self._own_losses(losses, batch))
                num_supervised += batch.num_supervised
        self._context.reshard(self.model)
        self.model.train()
        return sum(self._context.gather(total)) / num_supervised

    def trainable_weights(self) -> dict[str, torch.Tensor]:
        """Full trainable weights by name, on the main process; an empty dict on the other ranks."""
        return self._context.gather_full_tensors(trainable_parameters(self.model))

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that is needed to resume with the same bits: tensors, and state that is serializable as JSON."""
        tensors = {f"model.{name}": parameter.detach() for name, parameter in trainable_parameters(self.model).items()}
        optimizer_tensors, param_groups = optimizer_state(self._optimizer)
        tensors = self._context.gather_full_tensors(tensors | optimizer_tensors) | self._context.random_states()
        return tensors, {"param_groups": param_groups, "scheduler": self._scheduler.state_dict()}

    def load_state_dict(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        with torch.no_grad():
            for name, parameter in trainable_parameters(self.model).items():
                parameter.copy_(shard_like(tensors[f"model.{name}"], parameter))
        load_optimizer_state(self._optimizer, tensors, state["param_groups"])
        self._scheduler.load_state_dict(state["scheduler"])
        self._context.load_random_state(tensors)

    def resume(self, checkpoints: Checkpoints) -> dict[str, Any] | None:
        """Load the newest checkpoint and return its state; None if there is no checkpoint."""
        folder = self._context.broadcast_from_main(checkpoints.restore_newest)
        if folder is None:
            return None
        tensors, state = load(folder)
        self.load_state_dict(tensors, state["engine"])
        return state

    def _fit_to_device(self, longest: Example, allowed: list[bool]) -> None:
        """Choose activation checkpointing and the size of micro-batches; a GPU tries them, unless weights are sharded.

        Args:
            allowed: values of activation checkpointing, the fastest first.
        """
        limits, checkpointing, measured = self._batches.limits, allowed[0], ""
        if self.model.device.type == "cuda" and not self._context.sharded:
            short = replace(longest, input_ids=longest.input_ids[:2], labels=longest.labels[:2])
            smallest = largest_micro_batch(replace(self._batches, limits=Limits(1, 1)), short)
            self.messages.append(use_deterministic_kernels(partial(self._try, smallest)))
            num_batches = math.ceil(self.params.gradient_accumulation_steps / self._context.world_size)
            fit = find_fit(self.model, self._batches, longest, allowed, num_batches, self._peak_memory)
            available = available_memory(self.model.device)
            measured = f"; peak {format_bytes(fit.peak)}, headroom {format_bytes(available - fit.peak)}"
            # The same on all ranks, because each of them has the same model and the same longest example.
            checkpointing = bool(max(self._context.gather(fit.checkpointing)))
            limits = Limits(*(int(min(self._context.gather(limit))) for limit in astuple(fit.limits)))
        set_checkpointing(self.model, checkpointing)
        self._batches = replace(self._batches, limits=limits)
        self.messages.append(
            f"Memory: micro-batches of up to {limits.tokens:,} tokens and {limits.supervised:,} supervised tokens, "
            f"activation checkpointing {'on' if checkpointing else 'off'}{measured}"
        )

    def _peak_memory(self, micro_batch: MicroBatch) -> int:
        return peak_memory(self.model, partial(self._try, micro_batch), self.params.optimizer)

    def _try(self, micro_batch: MicroBatch) -> None:
        with torch.random.fork_rng([self.model.device]), self._autocast(), attention_for(self.model, micro_batch):
            summed_loss(self.model, micro_batch).backward()

    def _calls(self, batch: EffectiveBatch) -> list[tuple[MicroBatch, bool]]:
        """The calls of the model, each with whether it is a padding step, whose result is not used."""
        calls = [(micro_batch, False) for micro_batch in batch.micro_batches]
        for _ in range(self._context.num_padding_steps(len(calls))):
            calls.append((next(self._batches.micro_batches(batch.examples[:1])), True))
        return calls

    def _own_losses(self, losses: list[torch.Tensor], batch: EffectiveBatch) -> list[float]:
        """The losses of this rank's micro-batches, without padding steps. This waits for the device."""
        return torch.stack(losses).tolist()[: len(batch.micro_batches)] if losses else []

    def _flops(self, batch: MicroBatch) -> int:
        body, head = self._flops_per_token
        return body * batch.num_tokens + head * sum(example.num_supervised for example in batch.examples)

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast(self.params.precision, self.model.device, cache_enabled=not self._context.sharded)


def require_finite(name: str, value: float, step: int, examples: Sequence[Example]) -> float:
    """Return the value if it is finite.

    Args:
        examples: named in the message, because one of them may be the cause.

    Raises:
        UserError: the value is infinite or NaN.
    """
    if not math.isfinite(value):
        ids = ", ".join(example.example_id for example in examples[:16])
        raise UserError(
            f"step {step:,}: {name} is {value}; lower learning_rate or max_grad_norm, or set precision to fp32. "
            f"Check these examples of data/train.parquet: {ids}"
        )
    return value
