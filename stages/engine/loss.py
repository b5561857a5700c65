"""Loss at supervised positions, the same for training, validation and evaluation."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from stages.data.examples import IGNORE_INDEX, Example
from stages.engine.attention import use_packed_attention
from stages.engine.batches import MicroBatch


@dataclass(frozen=True)
class TokenLosses:
    """The result at each supervised token, in the order of a micro-batch's examples.

    losses: float32 (tokens,), in nats.
    correct: bool (tokens,), whether the most likely token is the target.
    """

    losses: torch.Tensor
    correct: torch.Tensor


def target_logits(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Logits at the columns of a micro-batch, (rows, columns, vocabulary), by one call of the model."""
    inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
    columns = batch.columns.to(model.device)
    with use_packed_attention(model) if "layout" in inputs else nullcontext():
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            logits: torch.Tensor = model(**inputs, use_cache=False, logits_to_keep=columns).logits
        else:
            logits = model(**inputs, use_cache=False).logits.index_select(1, columns)
    return logits


def summed_loss(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """The loss summed over supervised tokens, in nats. Not the mean, because micro-batches differ in their number."""
    return _cross_entropy(target_logits(model, batch), batch, "sum")


def token_losses(model: PreTrainedModel, batch: MicroBatch) -> TokenLosses:
    """The loss at each supervised token of a micro-batch."""
    logits = target_logits(model, batch)
    labels = batch.labels.to(logits.device)
    is_supervised = labels != IGNORE_INDEX
    losses = _cross_entropy(logits, batch, "none").view(labels.shape)
    return TokenLosses(losses[is_supervised], (logits.argmax(-1) == labels)[is_supervised])


def losses_by_example(
    model: PreTrainedModel, micro_batches: Iterable[MicroBatch]
) -> Iterator[tuple[Example, TokenLosses]]:
    """Each example of the micro-batches, with the result at its supervised tokens."""
    for batch in micro_batches:
        result = token_losses(model, batch)
        lengths = [example.num_supervised for example in batch.examples]
        parts = zip(batch.examples, result.losses.split(lengths), result.correct.split(lengths), strict=True)
        for example, losses, correct in parts:
            yield example, TokenLosses(losses, correct)


def _cross_entropy(logits: torch.Tensor, batch: MicroBatch, reduction: str) -> torch.Tensor:
    labels = batch.labels.to(logits.device).flatten()
    return cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORE_INDEX, reduction=reduction)
