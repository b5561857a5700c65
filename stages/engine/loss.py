"""Loss at supervised positions, the same for training, validation and evaluation."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from stages.data.examples import IGNORE_INDEX, Example
from stages.engine.attention import use_packed_attention
from stages.engine.batches import Batches, MicroBatch
from stages.runtime.terminal import progress

# 4 MiB in fp32; 128 MiB on a GPU, which is slow with many small chunks.
LOGITS_PER_CHUNK = {"cpu": 2**20, "mps": 2**20, "cuda": 2**25}


@dataclass(frozen=True)
class TokenLosses:
    """The result at each supervised token, in the order of a micro-batch's examples.

    losses: float32 (tokens,), in nats.
    correct: bool (tokens,), whether the most likely token is the target.
    """

    losses: torch.Tensor
    correct: torch.Tensor


def attention_for(model: PreTrainedModel, batch: MicroBatch) -> AbstractContextManager[None]:
    """Inside the block the model can attend to this micro-batch."""
    return use_packed_attention(model) if "layout" in batch.inputs else nullcontext()


def forward(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Logits at the columns of a micro-batch, (rows, columns, vocabulary), by one call of the model."""
    with attention_for(model, batch):
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            logits: torch.Tensor = model(**batch.inputs, use_cache=False, logits_to_keep=batch.columns).logits
        else:
            logits = model(**batch.inputs, use_cache=False).logits.index_select(1, batch.columns)
    return logits


def summed_loss(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """The loss summed over supervised tokens, in nats. Not the mean, because micro-batches differ in their number."""
    batch = batch.to(model.device)
    return cross_entropy(forward(model, batch), batch.labels).sum()


def losses_by_example(
    model: PreTrainedModel, micro_batches: Iterable[MicroBatch]
) -> Iterator[tuple[Example, TokenLosses]]:
    """Each example of the micro-batches, with the result at its supervised tokens."""
    for batch in micro_batches:
        batch = batch.to(model.device)
        logits = forward(model, batch)
        losses = cross_entropy(logits, batch.labels).view(batch.labels.shape)
        is_correct, is_supervised = logits.argmax(-1) == batch.labels, batch.labels != IGNORE_INDEX
        lengths = [example.num_supervised for example in batch.examples]
        del logits  # the largest tensor by far; otherwise it would be kept during the next forward pass
        parts = (values[is_supervised].split(lengths) for values in (losses, is_correct))
        for example, *result in zip(batch.examples, *parts, strict=True):
            yield example, TokenLosses(*result)


def score(model: PreTrainedModel, batches: Batches, examples: Sequence[Example]) -> dict[str, TokenLosses]:
    """The result at the supervised tokens of each example, by its id, on the CPU, without gradients."""
    micro_batches = progress(batches.micro_batches(examples), "score", "micro-batch")
    with torch.inference_mode():
        return {
            example.example_id: TokenLosses(result.losses.cpu().double(), result.correct.cpu())
            for example, result in losses_by_example(model, micro_batches)
        }


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss at each label, (labels,), in fp32, in chunks, because fp32 copies of all logits take much memory."""
    rows = max(1, LOGITS_PER_CHUNK[logits.device.type] // logits.shape[-1])
    chunks = zip(logits.flatten(0, 1).split(rows), labels.flatten().split(rows), strict=True)
    return torch.cat(
        [checkpoint(_chunk_losses, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    )


def _chunk_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
