"""Loss at supervised positions: the one definition that training, validation and evaluation share."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from stages.shared.attention import flat_stream
from stages.shared.batches import Batches, FlatBatches, MicroBatch, PaddedBatches
from stages.shared.examples import Example

TOLERANCE = 1e-4  # nats a token; fp32 rounding is a hundredth of it, another attention pattern far above


@dataclass(frozen=True)
class TokenLosses:
    """losses: float32 (tokens,), in nats. correct: bool (tokens,), the likeliest is the target."""

    losses: torch.Tensor
    correct: torch.Tensor


def token_losses(model: PreTrainedModel, batch: MicroBatch) -> TokenLosses:
    """The loss at each supervised token of a micro-batch, in the order of its examples. Logits exist only there."""
    inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
    targets = batch.targets.to(model.device)
    with flat_stream(model) if "layout" in inputs else nullcontext():
        logits = model(**inputs, use_cache=False).logits
    logits = logits.flatten(0, 1)
    if batch.select is not None:
        logits = logits.index_select(0, batch.select.to(model.device))
    losses = cross_entropy(logits.float(), targets, reduction="none")
    return TokenLosses(losses, logits.detach().argmax(-1) == targets)


def choose_batches(model: PreTrainedModel, examples: Sequence[Example], max_tokens: int) -> tuple[Batches, str]:
    """The flat stream where it is exact for this model, padded micro-batches otherwise, and why.

    Nothing is taken on trust from the architecture's name: the longest and the first example are computed both ways.
    An attention window that is shorter than the longest example, or attention of the model's own, shows there.
    """
    longest = max(examples, key=lambda example: len(example.input_ids))
    probe = sorted([longest, examples[0]], key=lambda example: example.input_ids.tobytes())
    padded, flat = PaddedBatches(max_tokens), FlatBatches(max_tokens)
    training = model.training
    model.eval()
    with torch.no_grad():
        expected = token_losses(model, padded.collate(probe)).losses
        try:
            found = token_losses(model, flat.collate(probe)).losses
            difference = float((found - expected).abs().max())
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            difference, reason = float("inf"), f"this model can't take a flat stream ({type(error).__name__})"
        else:
            reason = f"a flat stream differs by up to {difference:.2g} nats a token"
    model.train(training)
    if not difference <= TOLERANCE:
        return padded, f"padded micro-batches: {reason}"
    if training and _has_dropout(model):
        return FlatBatches(max_tokens, share_prefix=False), "flat stream, prefix not shared: dropout is on"
    return flat, "flat stream with a shared prefix"


def _has_dropout(model: PreTrainedModel) -> bool:
    modules = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    return modules or bool(getattr(model.config, "attention_dropout", 0))
