"""Choose the size of micro-batches, and activation checkpointing, so that training fits into the device's memory."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from stages.data.examples import IGNORE_INDEX, Example
from stages.engine.batches import Batches, Limits, MicroBatch, PackedBatches
from stages.engine.optimizer import state_bytes, trainable_parameters
from stages.runtime.errors import UserError, is_out_of_memory

MARGIN = 0.1  # of the available memory stays free, because later micro-batches have other shapes, which fragments it

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


def find_fit(
    model: PreTrainedModel, batches: Batches, longest: Example, choices: list[bool], num_batches: int, trial: Trial
) -> Fit:
    """Try micro-batches of different sizes, with and without activation checkpointing, until one fits.

    How a batch is divided changes the time of a step, but not its gradient.

    Args:
        choices: the values of activation checkpointing that are allowed, the fastest first.
        num_batches: the size of this rank's part of an effective batch, in micro-batches of the current limits.

    Raises:
        UserError: not even the longest example fits by itself.
    """
    for limits, checkpointing in candidates(batches.limits, len(longest.input_ids), choices, num_batches):
        set_checkpointing(model, checkpointing)
        try:
            peak = trial(largest_micro_batch(replace(batches, limits=limits), longest))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return Fit(limits, checkpointing, peak)
    raise UserError(
        f"an example of {len(longest.input_ids):,} tokens does not fit into this GPU's memory, a tenth of which stays "
        "free; lower max_length, set finetuning to lora or qlora, or use a launcher that shards the weights"
    )


def candidates(limits: Limits, num_tokens: int, choices: list[bool], num_batches: int) -> Iterator[tuple[Limits, bool]]:
    """Limits of a micro-batch, each with activation checkpointing or not; the fastest first.

    First the whole effective batch, then half of it, and so on, down to the given limits; then the given limits with
    checkpointing; then smaller ones, down to an example of `num_tokens`.
    """
    while num_batches > 1:
        yield Limits(limits.tokens * num_batches, limits.supervised * num_batches), choices[0]
        num_batches = math.ceil(num_batches / 2)
    for checkpointing in choices:
        yield limits, checkpointing
    while limits.tokens > num_tokens:
        limits = Limits(limits.tokens // 2, limits.supervised // 2)
        yield limits, choices[-1]


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


def peak_memory(model: PreTrainedModel, step: Callable[[], None], optimizer: str) -> int:
    """Peak GPU memory in bytes of a forward and backward pass, with gradients and optimizer state, not fragmentation.

    Raises:
        torch.OutOfMemoryError: it does not fit, or leaves less than `MARGIN` of the memory free.
    """
    device, state = model.device, []
    torch.cuda.reset_peak_memory_stats(device)
    try:
        for parameter in trainable_parameters(model).values():
            state.append(torch.empty(state_bytes(parameter.numel(), optimizer), dtype=torch.uint8, device=device))
            parameter.grad = torch.zeros_like(parameter)  # as in all micro-batches but the first
        step()
        peak = torch.cuda.max_memory_allocated(device)
    finally:
        model.zero_grad()
        state.clear()
        torch.cuda.empty_cache()
    if peak > (1 - MARGIN) * available_memory(device):
        raise torch.OutOfMemoryError("CUDA out of memory: too little would be free")
    return peak


def available_memory(device: torch.device) -> int:
    """GPU memory in bytes that is free or already held by this process."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def use_deterministic_kernels(step: Callable[[], None]) -> str:
    """Make the GPU compute the same bits in each run, if all operations of a training step have such a kernel.

    `CUBLAS_WORKSPACE_CONFIG` must have been set before the first matrix multiplication.

    Returns:
        A log message.
    """
    torch.use_deterministic_algorithms(True)
    # Filling new tensors would cost time and only help to find bugs.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (not in its type stub)
    try:
        step()
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        torch.use_deterministic_algorithms(False)
        return f"Kernels: not deterministic ({str(error).partition(',')[0]})"
    return "Kernels: deterministic"
