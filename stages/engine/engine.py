"""The training engine: optimizer steps and validation for any model, precision and number of processes."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel, set_seed

from stages.data.examples import Example
from stages.engine.batches import Batches
from stages.engine.checkpoints import Checkpoints, load
from stages.engine.distributed import DistributedContext, full_tensor, shard_like
from stages.engine.loss import summed_loss
from stages.engine.models import autocast, load_model, load_on_meta, uses_bf16
from stages.engine.optimizer import create_optimizer, trainable_parameters
from stages.engine.probe import choose_batches
from stages.runtime.errors import UserError
from stages.runtime.params import TrainParams

BASE = Path("models/base")


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, over all ranks.

    loss_sum: summed over the supervised tokens of the effective batch, in nats.
    num_supervised, num_tokens: supervised tokens and all tokens of the effective batch.
    gradient_norm: L2 norm before clipping.
    """

    loss_sum: float
    num_supervised: int
    num_tokens: int
    learning_rate: float
    gradient_norm: float


class Engine:
    """A model in training with its optimizer, on one rank.

    Args:
        batches: how to divide an effective batch into micro-batches.
        num_steps: optimizer steps of the whole run, for the learning rate schedule.
        messages: log messages about the model and its batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Batches,
        params: TrainParams,
        num_steps: int,
        context: DistributedContext,
        messages: Sequence[str] = (),
    ):
        self.model = model
        self.messages = messages
        self.num_steps = num_steps
        self._batches = batches
        self.params = params
        self._context = context
        self._optimizer, self._scheduler = create_optimizer(model, params, num_steps)

    @classmethod
    def load(
        cls,
        params: TrainParams,
        examples: Sequence[Example],
        num_steps: int,
        context: DistributedContext,
        base: Path = BASE,
    ) -> Self:
        """Load the base model and prepare it for training.

        Args:
            examples: all that the model will see, to choose batches that are exact for them.
        """
        set_seed(params.seed)
        if not context.sharded:
            model = load_model(base, context.device).train()
        elif context.is_main_process:
            model = load_model(base, torch.device("cpu")).train()
        else:
            model = load_on_meta(base).train()
        messages = []
        if params.finetuning == "lora":
            from stages.engine.lora import add_adapters, store_frozen_in_bf16

            messages.append(add_adapters(model, params))
        if context.sharded:
            context.shard(model)
        if context.rank:
            set_seed(params.seed + context.rank)  # equal adapters on all ranks, but different dropout
        # FSDP2 needs all ranks for it; then one choice for all, because rounding could make theirs differ.
        choice = choose_batches(model, examples, params.batch_size * params.max_length)
        batches, reasons = context.broadcast_from_main(lambda: choice)
        context.reshard(model)
        precision = "bf16" if uses_bf16(params.precision, model.device) else "fp32"
        if params.finetuning == "lora" and precision == "bf16" and not context.sharded:
            store_frozen_in_bf16(model)  # only now, because `choose_batches` computes in fp32
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            messages.append("The load-balancing loss of the experts is not added, because it depends on micro-batches")
        messages = [f"Precision: {precision} on {model.device}", *messages, *reasons]
        return cls(model, batches, params, num_steps, context, messages)

    def train_step(self, batch: Sequence[Example]) -> StepResult:
        """Do one optimizer step on an effective batch.

        Raises:
            UserError: the loss or the gradient is not finite.
        """
        step = self._scheduler.last_epoch + 1
        num_supervised = sum(example.num_supervised for example in batch)
        loss_sum = 0.0
        with self._autocast():  # around the whole step, so that each weight is cast once
            for micro_batch, is_padding_step in self._context.micro_batches(self._batches, batch):
                loss = summed_loss(self.model, micro_batch)
                # Dividing by infinity makes the gradient of a padding step 0.
                (loss / (math.inf if is_padding_step else num_supervised)).backward()
                loss_sum += 0.0 if is_padding_step else require_finite("loss", loss.item(), step, micro_batch.examples)
        loss_sum = sum(self._context.gather(loss_sum))
        self._context.all_reduce_gradients(self.model)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.params.max_grad_norm)
        gradient_norm = require_finite("gradient norm", full_tensor(norm).item(), step, batch)
        learning_rate = self._scheduler.get_last_lr()[0]
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        num_tokens = sum(len(example.input_ids) for example in batch)
        return StepResult(loss_sum, num_supervised, num_tokens, learning_rate, gradient_norm)

    def validation_loss(self, examples: Sequence[Example]) -> float:
        """Mean loss over all supervised tokens, in nats/token."""
        self.model.eval()
        total = 0.0
        # Not inference_mode: FSDP2 reuses the gathered weights in training.
        with torch.no_grad(), self._autocast():
            for micro_batch, is_padding_step in self._context.micro_batches(self._batches, examples):
                loss = summed_loss(self.model, micro_batch).item()
                total += 0.0 if is_padding_step else loss
        self._context.reshard(self.model)
        self.model.train()
        return sum(self._context.gather(total)) / sum(example.num_supervised for example in examples)

    def trainable_weights(self) -> dict[str, torch.Tensor]:
        """Full trainable weights by name, on the main process; an empty dict on the other ranks."""
        return self._context.gather_full_tensors(trainable_parameters(self.model))

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that is needed to resume with the same bits: tensors, and state that is serializable as JSON."""
        tensors = {f"model.{name}": parameter.detach() for name, parameter in trainable_parameters(self.model).items()}
        optimizer = self._optimizer.state_dict()
        for index, entry in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in entry.items()}
        tensors = self._context.gather_full_tensors(tensors) | self._context.random_states()
        return tensors, {"param_groups": optimizer["param_groups"], "scheduler": self._scheduler.state_dict()}

    def load_state_dict(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        with torch.no_grad():
            for name, parameter in trainable_parameters(self.model).items():
                parameter.copy_(shard_like(tensors[f"model.{name}"], parameter))
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                entries.setdefault(int(index), {})[key] = shard_like(tensor, parameters[int(index)])
        self._optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
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
