"""Losses of examples by a model that is not trained."""

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from stages.data.examples import Example
from stages.engine.batches import Batches
from stages.engine.loss import TokenLosses, losses_by_example
from stages.engine.probe import choose_batches
from stages.runtime.params import InferenceParams
from stages.runtime.terminal import progress

SCORED_TOKENS = 2  # per token of a micro-batch in training; no activations are kept for a backward pass


def choose_scoring_batches(model: PreTrainedModel, examples: Iterable[Example], params: InferenceParams) -> Batches:
    """The kind of batch that is exact for a model; also prints it."""
    max_tokens = SCORED_TOKENS * params.batch_size * params.max_length
    batches, messages, _ = choose_batches(model, examples, max_tokens, params.precision)
    print(*messages, sep="\n", flush=True)
    return batches


def score(model: PreTrainedModel, batches: Batches, examples: Sequence[Example]) -> dict[str, TokenLosses]:
    """The result at the supervised tokens of each example, by its id, on the CPU."""
    micro_batches = progress(batches.micro_batches(examples), "score", "micro-batch")
    with torch.inference_mode():
        return {
            example.example_id: TokenLosses(result.losses.cpu().double(), result.correct.cpu())
            for example, result in losses_by_example(model, micro_batches)
        }
