"""Choose the size of micro-batches, and activation checkpointing, so that training fits into the device's memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedModel

from stages.data.examples import IGNORE_INDEX, Example
from stages.engine.batches import Batches, Limits, MicroBatch, PackedBatches
from stages.runtime.errors import UserError, is_out_of_memory

Trial = Callable[[MicroBatch], int]  # a forward and a backward pass; returns the peak memory in bytes


class Fit(NamedTuple):
    """Settings with which the largest micro-batch fits, and its peak memory in bytes."""

    limits: Limits
    checkpointing: bool
    peak: int


def check_checkpointing(model: PreTrainedModel, setting: str) -> list[bool]:
    """The values of activation checkpointing that a setting allows for this model, the fastest first.

    Raises:
        UserError: it is on, and the model does not support it.
    """
    if setting == "on" and not model.supports_gradient_checkpointing:
        raise UserError(
            f"activation_checkpointing: found 'on'; {type(model).__name__} does not support it; must be auto or off"
        )
    if setting == "auto" and model.supports_gradient_checkpointing:
        return [False, True]
    return [setting == "on"]


def set_checkpointing(model: PreTrainedModel, enabled: bool) -> None:
    """Enable or disable activation checkpointing: the backward pass computes each layer's activations again."""
    if enabled is not model.is_activation_checkpointing:
        if enabled:
            model.activation_checkpointing_enable()
        else:
            model.activation_checkpointing_disable()


def find_fit(model: PreTrainedModel, batches: Batches, longest: Example, choices: list[bool], trial: Trial) -> Fit:
    """Try the largest micro-batch with each choice of activation checkpointing, then halve its size.

    How a batch is divided changes the time of a step, but not its gradient.

    Raises:
        UserError: not even the longest example fits by itself.
    """
    limits = batches.limits
    while True:
        for checkpointing in choices:
            set_checkpointing(model, checkpointing)
            try:
                peak = trial(largest_micro_batch(replace(batches, limits=limits), longest))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            else:
                return Fit(limits, checkpointing, peak)
        if limits.tokens <= len(longest.input_ids):
            raise UserError(
                f"an example of {len(longest.input_ids):,} tokens does not fit into this GPU's memory; "
                "lower max_length, set finetuning to lora or qlora, or use a launcher that shards the weights"
            )
        choices = choices[-1:]
        limits = Limits(limits.tokens // 2, limits.supervised // 2)


def largest_micro_batch(batches: Batches, longest: Example) -> MicroBatch:
    """A micro-batch of examples of this length that reaches both limits, tokens and supervised tokens."""
    num_tokens, limits = len(longest.input_ids), batches.limits
    num_supervised = min(max(limits.supervised * num_tokens // limits.tokens, 1), num_tokens - 1)
    labels = longest.input_ids.copy()
    labels[:-num_supervised] = IGNORE_INDEX
    examples = [
        Example(str(number), longest.input_ids, labels) for number in range(max(limits.tokens // num_tokens, 1))
    ]
    if isinstance(batches, PackedBatches):
        batches = replace(batches, share_prefix=False)
    return next(batches.micro_batches(examples))
