"""Some of the architectures of `make architectures`, and the table of all in docs/models.md."""

import pytest

from tests.architectures import Outcome, try_architecture

PACKED, PADDED = "packed batches with shared prefixes", "padded batches"
PACKED_PROMPTS, PADDED_PROMPTS, SINGLE_PROMPTS = "packed prompts", "padded prompts", "one prompt at a time"
# Training for examples shorter and longer than a sliding window; the method of generation.
EXPECTED = {
    "gpt2": (PACKED, PACKED, PACKED_PROMPTS),
    "llama": (PACKED, PACKED, PACKED_PROMPTS),
    "opt": (PACKED, PACKED, PACKED_PROMPTS),
    "deepseek_v2": (PACKED, PACKED, PACKED_PROMPTS),  # multi-head latent attention
    "qwen3": (PACKED, PADDED, PADDED_PROMPTS),  # this and the next ones have a sliding window
    "gemma3_text": (PACKED, PADDED, PADDED_PROMPTS),
    "mistral": (PACKED, PADDED, PADDED_PROMPTS),
    "starcoder2": (PACKED, PADDED, PADDED_PROMPTS),
    "gptj": (PADDED, PADDED, PADDED_PROMPTS),  # attention of its own
    "lfm2": (PADDED, PADDED, PADDED_PROMPTS),  # this and the next ones have states besides keys and values
    "jamba": (PADDED, PADDED, PADDED_PROMPTS),
    "mamba": (PADDED, PADDED, PADDED_PROMPTS),
    "mamba2": (PADDED, PADDED, PADDED_PROMPTS),
    "bart": (PADDED, PADDED, SINGLE_PROMPTS),  # positions of its own
    "llama4_text": (PADDED, PADDED, SINGLE_PROMPTS),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_losses_gradients_and_answers_are_those_of_the_plain_model(name: str) -> None:
    *training, answers = EXPECTED[name]
    assert try_architecture(name) == Outcome(training, [answers, answers])


def test_a_model_that_attends_to_later_tokens_is_rejected() -> None:
    assert "attends to later tokens" in try_architecture("xlnet").problem
