"""Choose the fastest kind of batch that is exact for this model and these data.

The name of an architecture does not say how it handles positions, masks and padding. So some examples are computed in
fp32 without dropout, and their losses are compared with those of the plain model,
`model(input_ids, attention_mask).logits` of one example at a time.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from stages.data.examples import IGNORE_INDEX, Example
from stages.engine.batches import MAX_LOGITS, NO_LIMITS, Batches, Limits, PackedBatches, PaddedBatches
from stages.engine.loss import forward, losses_by_example
from stages.engine.models import autocast, check_context_length, inference, probing, uses_bf16
from stages.engine.varlen import VarlenLayout
from stages.runtime.errors import UserError, is_out_of_memory
from stages.runtime.params import InferenceParams

ROUNDING_FACTOR = 4  # over few tokens, rounding errors of equal kernels can differ by 2; a wrong one gives far more
MAX_EXAMPLES = 8
SCORED_TOKENS = 2  # per token of a micro-batch in training; no activations are kept for a backward pass
TOLERANCE = 1e-4  # nats/token; fp32 rounding gives a hundredth of this, a different attention pattern far more


class Choice(NamedTuple):
    """The fastest kind of batch that is exact, log messages with the reason, and the longest of the examples."""

    batches: Batches
    messages: list[str]
    longest: Example


def choose_batches(
    model: PreTrainedModel, examples: Iterable[Example], max_tokens: int, precision: str = "fp32"
) -> Choice:
    """Choose the fastest kind of batch that is exact for this model.

    Args:
        examples: all that the model will see; they are read once.
        max_tokens: of a micro-batch.
        precision: that of matrix multiplications in later calls; it decides which kernels can be used.

    Raises:
        UserError: an example is longer than the model's context, or no kind of batch is exact.
    """
    limits = Limits(max_tokens, MAX_LOGITS[model.device.type] // model.config.get_text_config().vocab_size)
    probe, num_large = scan_examples(examples, limits)
    check_context_length(model, len(probe[0].input_ids), "the longest example (max_length)")
    share_prefix = not (model.training and has_dropout(model, probe[1:]))  # without the longest, which is slow
    candidates: dict[str, Callable[[Limits], Batches]] = {
        f"packed batches{' with shared prefixes' if share_prefix else ''}": partial(
            PackedBatches, share_prefix=share_prefix
        ),
        "padded batches": PaddedBatches,
        "one example at a time": lambda limits: PaddedBatches(replace(limits, tokens=1)),
    }
    reasons = [] if share_prefix else ["no shared prefixes because of dropout"]
    with probing(model):
        expected = torch.cat([plain_losses(model, example) for example in probe])
        for name, make_batches in candidates.items():
            problem = find_difference(model, make_batches(NO_LIMITS), probe, expected)
            if problem is None:
                break
            reasons.append(f"{name}: {problem}")
        else:
            raise UserError(
                f"no kind of batch gives the losses of the plain model ({'; '.join(reasons)}); "
                "set model_name to another model"
            )
    batches = make_batches(limits)
    if isinstance(batches, PackedBatches) and has_varlen_kernel(model, precision):
        with_kernel = replace(batches, layout=VarlenLayout)
        problem = find_kernel_problem(model, replace(with_kernel, limits=NO_LIMITS), probe, expected, precision)
        if problem is None:
            batches, name = with_kernel, f"{name}, variable-length kernel"
        else:
            reasons.append(f"variable-length kernel: {problem}")
    messages = ["; ".join([f"Engine: {name}", *reasons])]
    if num_large:
        messages.append(
            f"Examples with more than {limits.tokens:,} tokens or {limits.supervised:,} supervised tokens, "
            f"each a micro-batch of its own: {num_large:,}"
        )
    return Choice(batches, messages, probe[0])


def choose_scoring_batches(model: PreTrainedModel, examples: Iterable[Example], params: InferenceParams) -> Batches:
    """The kind of batch that is exact for a model that is not trained; also prints it."""
    max_tokens = SCORED_TOKENS * params.batch_size * params.max_length
    choice = choose_batches(model, examples, max_tokens, params.precision)
    print(*choice.messages, sep="\n", flush=True)
    return choice.batches


def scan_examples(examples: Iterable[Example], limits: Limits) -> tuple[list[Example], int]:
    """At most a micro-batch of examples for the probe, and how many examples exceed a limit by themselves.

    The probe has the longest example, the shortest, the one with the longest prompt twice, and the first ones. Two have
    the same prompt, so that a prefix is shared; in each of them one token is supervised.
    """
    first: list[Example] = []
    num_large = 0
    examples = iter(examples)
    longest = shortest = long_prompt = next(examples)
    for example in chain([longest], examples):
        longest = max(longest, example, key=lambda example: len(example.input_ids))
        shortest = min(shortest, example, key=lambda example: len(example.input_ids))
        long_prompt = max(long_prompt, example, key=lambda example: example.prompt_length)
        num_large += len(example.input_ids) > limits.tokens or example.num_supervised > limits.supervised
        if len(first) < MAX_EXAMPLES:
            first.append(example)
    end = long_prompt.prompt_length + 1
    short = replace(long_prompt, input_ids=long_prompt.input_ids[:end], labels=long_prompt.labels[:end])
    probe = [longest, shortest, short, short]
    # All of them must also fit into one padded micro-batch.
    room = min(limits.tokens // len(longest.input_ids), MAX_EXAMPLES) - len(probe)
    num_supervised = longest.num_supervised
    for example in first[: max(room, 0)]:
        num_supervised += example.num_supervised
        if num_supervised > limits.supervised:
            break
        probe.append(example)
    return [replace(example, example_id=str(number)) for number, example in enumerate(probe)], num_large


def plain_losses(model: PreTrainedModel, example: Example) -> torch.Tensor:
    """The loss at each supervised token of an example, (supervised tokens,), by the plain model.

    Raises:
        UserError: the model can't compute it.
    """
    input_ids = torch.from_numpy(example.input_ids.astype(np.int64)[None]).to(model.device)
    try:
        logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    except Exception as error:  # a model can raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"this model can't compute an example of {input_ids.shape[1]:,} tokens: {error}; "
            "set model_name to another model"
        ) from None
    labels = torch.from_numpy(example.labels[1:].astype(np.int64)).to(model.device)
    losses = cross_entropy(logits[0, :-1].float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
    return losses[labels != IGNORE_INDEX]


def find_difference(
    model: PreTrainedModel, batches: Batches, examples: Sequence[Example], expected: torch.Tensor
) -> str | None:
    """What is wrong with a kind of batch for this model, or None if its losses are the expected ones."""
    losses = batch_losses(model, batches, examples)
    if isinstance(losses, str):
        return losses
    # A model with NaN is broken in every kind of batch; training and evaluation report it.
    is_equal = (losses == expected) | (losses.isnan() & expected.isnan())
    difference = float((losses - expected).abs().masked_fill(is_equal, 0).max())
    return None if difference <= TOLERANCE else f"losses differ by up to {difference:.2g} nats/token"


def find_kernel_problem(
    model: PreTrainedModel, batches: Batches, examples: Sequence[Example], expected: torch.Tensor, precision: str
) -> str | None:
    """What is wrong with a kernel that can't compute in fp32, or None.

    Its losses must be as close to the expected ones, on average, as those of the plain model in the same precision. In
    training, it must also support the model's dropout.
    """
    if model.training:
        with torch.no_grad(), fork_rng(model), autocast(precision, model.device, cache_enabled=False):
            if isinstance(problem := batch_losses(model, batches, examples), str):
                return problem
    with inference(model), autocast(precision, model.device, cache_enabled=False):
        plain = torch.cat([plain_losses(model, example) for example in examples])
        losses = batch_losses(model, batches, examples)
    if isinstance(losses, str):
        return losses
    difference, allowed = ((values - expected).abs().mean().item() for values in (losses, plain))
    if difference <= ROUNDING_FACTOR * allowed + TOLERANCE:
        return None
    return f"losses differ by {difference:.2g} nats/token on average, those of the plain model by {allowed:.2g}"


def has_varlen_kernel(model: PreTrainedModel, precision: str) -> bool:
    """Whether the variable-length kernel can be tried: it is for GPUs and bf16."""
    return model.device.type == "cuda" and uses_bf16(precision, model.device)


def batch_losses(model: PreTrainedModel, batches: Batches, examples: Sequence[Example]) -> torch.Tensor | str:
    """The loss at each supervised token of the examples, or why the model can't compute these batches."""
    try:
        results = losses_by_example(model, batches.micro_batches(examples))
        losses = {example.example_id: result.losses for example, result in results}
    except Exception as error:  # a model can raise anything for arguments that it does not know
        if is_out_of_memory(error):
            raise
        if reset := getattr(model, "reset_iter_state", None):  # FSDP2 still expects the interrupted call
            reset()
        return f"not supported ({type(error).__name__})"
    return torch.cat([losses[example.example_id] for example in examples])


def has_dropout(model: PreTrainedModel, examples: Sequence[Example]) -> bool:
    """Whether the model has dropout or another random operation in training."""
    # New adapters add 0, so dropout of their inputs does not change the logits.
    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()):
        return True
    batch = PaddedBatches(NO_LIMITS).collate(examples)
    with probing(model), fork_rng(model):
        model.train()
        first, second = (forward(model, batch.to(model.device)) for _ in range(2))
    return bool((first - second).abs().max() > TOLERANCE)


def fork_rng(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Inside the block random numbers are drawn that do not change those after it."""
    return torch.random.fork_rng([model.device] if model.device.type == "cuda" else [])
