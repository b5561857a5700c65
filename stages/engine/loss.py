"""Loss at supervised positions, the same for training, validation and evaluation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from stages.data.examples import Example
from stages.engine.attention import packed_is_exact, use_packed_attention
from stages.engine.batches import Batches, MicroBatch, PackedBatches, PaddedBatches
from stages.engine.models import check_context_length

T = TypeVar("T")
LOGITS_PER_CHUNK = 2**25  # tokens × vocabulary computed at once; 128 MiB per fp32 copy


@dataclass(frozen=True)
class TokenLosses:
    """The result at each supervised token.

    losses: float32 (tokens,), in nats.
    correct: bool (tokens,), whether the most likely token is the target.
    """

    losses: torch.Tensor
    correct: torch.Tensor


def token_losses(model: PreTrainedModel, batch: MicroBatch) -> TokenLosses:
    """The loss at each supervised token of a micro-batch, in the order of its examples, without gradients."""

    def compute() -> TokenLosses:
        losses, correct = [], []
        output, states = run_body(model, batch)
        for logits, targets in run_head(model, output, states, batch.targets):
            losses.append(token_cross_entropy(logits, targets))
            correct.append(logits.argmax(-1) == targets)
        return TokenLosses(torch.cat(losses), torch.cat(correct))

    return in_one_call(model, compute)


def accumulate_gradient(model: PreTrainedModel, batch: MicroBatch, num_supervised: float) -> float:
    """Add the gradients of a micro-batch's summed loss ÷ `num_supervised`, the tokens of the effective batch.

    Logits are computed and freed in chunks, so memory does not grow with length × vocabulary.

    Returns:
        The summed loss of the micro-batch, in nats.
    """

    def compute() -> tuple[torch.Tensor, torch.Tensor | None, float]:
        # Each chunk of logits adds to the gradient of `leaf`; then one backward pass goes through the body.
        output, states = run_body(model, batch)
        leaf = states.detach().requires_grad_()
        total = 0.0
        for logits, targets in run_head(model, output, leaf, batch.targets):
            # Sum, not mean: micro-batches differ in supervised tokens.
            loss = token_cross_entropy(logits, targets).sum()
            (loss / num_supervised).backward()
            total += loss.item()
        return states, leaf.grad, total

    states, gradient, total = in_one_call(model, compute)
    states.backward(gradient)
    return total


def in_one_call(model: PreTrainedModel, compute: Callable[[], T]) -> T:
    """Run `compute` inside a call of the model.

    FSDP2 gathers sharded weights only during that call, and adds hooks to its output that gather them again for the
    backward pass.
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
        reshard()  # otherwise only a backward pass would, and the next step would use outdated weights
    return result


def token_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss at each token, float32 (tokens,), in nats. logits: (tokens, vocabulary)."""
    return cross_entropy(logits.float(), targets, reduction="none")


def run_body(model: PreTrainedModel, batch: MicroBatch) -> tuple[ModelOutput, torch.Tensor]:
    """The output of the model's body, and its hidden states at the targets, (supervised tokens, hidden size)."""
    inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
    with use_packed_attention(model) if "layout" in inputs else nullcontext():
        output = model.base_model(**inputs, use_cache=False)
    return output, output.last_hidden_state.flatten(0, 1).index_select(0, batch.target_positions.to(model.device))


def run_head(
    model: PreTrainedModel, output: ModelOutput, states: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Chunks of at most `LOGITS_PER_CHUNK` logits, (tokens, vocabulary), and their targets, (tokens,).

    `model.lm_head(states)` is not sufficient, because some architectures scale or cap its output. So the model's own
    `forward` runs, with a body that returns the given states.
    """
    tokens = max(LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size, 1)
    body, forward = model.base_model, model.base_model.forward
    for chunk, chunk_targets in zip(states.split(tokens), targets.to(model.device).split(tokens), strict=True):
        body_output = replace(output, last_hidden_state=chunk[None])  # type: ignore[type-var]
        body.forward = lambda *_, body_output=body_output, **__: body_output
        try:
            # The body ignores the ids. Not `model(...)`, because this runs inside that call (see `in_one_call`).
            logits = model.forward(input_ids=chunk_targets[None], use_cache=False).logits[0]
        finally:
            body.forward = forward
        yield logits, chunk_targets


def choose_batches(model: PreTrainedModel, examples: Sequence[Example], max_tokens: int) -> tuple[Batches, str]:
    """Packed batches if they are exact for this model, else padded ones, and a log message with the reason.

    Raises:
        UserError: an example is longer than the model's context.
    """
    longest = max(examples, key=lambda example: len(example.input_ids))
    check_context_length(model, len(longest.input_ids), "max_length")
    probe = sorted([longest, examples[0]], key=lambda example: example.input_ids.tobytes())
    padded, packed = PaddedBatches(max_tokens), PackedBatches(max_tokens)
    exact, difference = packed_is_exact(
        model,
        lambda: token_losses(model, padded.collate(probe)).losses,
        lambda: token_losses(model, packed.collate([probe])).losses,
    )
    if not exact:
        return padded, f"padded batches: {difference}"
    if model.training and _has_dropout(model):
        return PackedBatches(max_tokens, share_prefix=False), "packed batches; no shared prefixes because of dropout"
    return packed, "packed batches with shared prefixes"


def _has_dropout(model: PreTrainedModel) -> bool:
    modules = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    return modules or bool(getattr(model.config, "attention_dropout", 0))
