"""Loss at supervised positions: the one definition that training, validation and evaluation share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from stages.shared.attention import flat_is_exact, flat_stream
from stages.shared.batches import Batches, FlatBatches, MicroBatch, PaddedBatches
from stages.shared.examples import Example
from stages.shared.models import require_context

T = TypeVar("T")
LOGITS_PER_CHUNK = 2**25  # tokens × vocabulary that exist at once: 128 MiB for each fp32 copy


@dataclass(frozen=True)
class TokenLosses:
    """losses: float32 (tokens,), in nats. correct: bool (tokens,), the likeliest is the target."""

    losses: torch.Tensor
    correct: torch.Tensor


def token_losses(model: PreTrainedModel, batch: MicroBatch) -> TokenLosses:
    """The loss at each supervised token of a micro-batch, in the order of its examples. For use without gradients."""

    def compute() -> TokenLosses:
        losses, correct = [], []
        output, states = run_body(model, batch)
        for logits, targets in run_head(model, output, states, batch.targets):
            losses.append(losses_of(logits, targets))
            correct.append(logits.argmax(-1) == targets)
        return TokenLosses(torch.cat(losses), torch.cat(correct))

    return in_one_call(model, compute)


def accumulate_gradient(model: PreTrainedModel, batch: MicroBatch, num_supervised: float) -> float:
    """Add to the gradients those of a micro-batch's summed loss ÷ `num_supervised`, the tokens of the effective batch.

    The logits of a chunk are gone before the next come into being: memory does not grow with length × vocabulary.

    Returns:
        The summed loss of the micro-batch, in nats.
    """

    def compute() -> tuple[torch.Tensor, torch.Tensor | None, float]:
        output, states = run_body(model, batch)
        leaf = states.detach().requires_grad_()
        total = 0.0
        for logits, targets in run_head(model, output, leaf, batch.targets):
            # Sum, not mean: micro-batches differ in supervised tokens.
            loss = losses_of(logits, targets).sum()
            (loss / num_supervised).backward()
            total += loss.item()
        return states, leaf.grad, total

    states, gradient, total = in_one_call(model, compute)
    states.backward(gradient)
    return total


def in_one_call(model: PreTrainedModel, compute: Callable[[], T]) -> T:
    """Let the model's call do this. Where its weights are sharded, they are there while it is called, and body and head
    must find them; what comes out of it has the hooks that gather them again for the backward pass.
    """
    forward = model.forward

    def run() -> T:
        model.forward = forward
        return compute()

    model.forward = run
    try:
        result: T = model()
    finally:
        model.forward = forward
    if not torch.is_grad_enabled() and (reshard := getattr(model, "reshard", None)):
        reshard()  # else only a backward pass would: the next step would find the weights of the one before
    return result


def losses_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 (tokens,) of logits (tokens, vocabulary)."""
    return cross_entropy(logits.float(), targets, reduction="none")


def run_body(model: PreTrainedModel, batch: MicroBatch) -> tuple[ModelOutput, torch.Tensor]:
    """What the model's body gives, and of it (supervised tokens, hidden size), the states where it is supervised."""
    inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
    with flat_stream(model) if "layout" in inputs else nullcontext():
        output = model.base_model(**inputs, use_cache=False)
    return output, output.last_hidden_state.flatten(0, 1).index_select(0, batch.select.to(model.device))


def run_head(
    model: PreTrainedModel, output: ModelOutput, states: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits (tokens, vocabulary) of the states and their targets (tokens,), at most `LOGITS_PER_CHUNK` at once.

    Not `model.lm_head(states)`: some architectures scale or cap what the head gives. So the model's own `forward` runs,
    with a body that gives the states.
    """
    tokens = max(LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size, 1)
    body, forward = model.base_model, model.base_model.forward
    for chunk, chunk_targets in zip(states.split(tokens), targets.to(model.device).split(tokens), strict=True):
        given = replace(output, last_hidden_state=chunk[None])  # type: ignore[type-var]
        body.forward = lambda *_, given=given, **__: given
        try:
            # Which ids are passed is of no matter: the body does not look at them.
            # Not `model(...)`: that call is going on, see `in_one_call`.
            logits = model.forward(input_ids=chunk_targets[None], use_cache=False).logits[0]
        finally:
            body.forward = forward
        yield logits, chunk_targets


def choose_batches(model: PreTrainedModel, examples: Sequence[Example], max_tokens: int) -> tuple[Batches, str]:
    """The flat stream where it is exact for this model, padded micro-batches otherwise, and why.

    Raises:
        UserError: an example is longer than the model's context.
    """
    longest = max(examples, key=lambda example: len(example.input_ids))
    require_context(model, len(longest.input_ids), "max_length")
    probe = sorted([longest, examples[0]], key=lambda example: example.input_ids.tobytes())
    padded, flat = PaddedBatches(max_tokens), FlatBatches(max_tokens)
    exact, difference = flat_is_exact(
        model,
        lambda: token_losses(model, padded.collate(probe)).losses,
        lambda: token_losses(model, flat.collate([probe])).losses,
    )
    if not exact:
        return padded, f"padded micro-batches: {difference}"
    if model.training and _has_dropout(model):
        return FlatBatches(max_tokens, share_prefix=False), "flat stream, prefix not shared: dropout is on"
    return flat, "flat stream with a shared prefix"


def _has_dropout(model: PreTrainedModel) -> bool:
    modules = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    return modules or bool(getattr(model.config, "attention_dropout", 0))
