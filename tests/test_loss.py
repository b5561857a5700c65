"""Packed batches, padded batches and a textbook loop give the same losses and gradients."""

import re
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from stages.engine.batches import MAX_LOGITS, Limits, PackedBatches, PaddedBatches
from stages.engine.loss import losses_by_example, summed_loss
from stages.engine.models import autocast
from stages.engine.probe import choose_batches
from stages.runtime.errors import UserError
from tests.conftest import example
from tests.textbook import textbook_losses
from tests.tiny_models import random_model

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "gpt2": GPT2Config(**GPT2, **NO_DROPOUT),
    "gpt_neox": GPTNeoXConfig(**{key: SMALL[key] for key in SMALL if key not in ("num_key_value_heads", "head_dim")}),
    "granite, which scales its logits": GraniteConfig(**SMALL, logits_scaling=4.0),
}
SLIDING_WINDOW = Gemma3TextConfig(
    **SMALL, sliding_window=4, query_pre_attn_scalar=8, layer_types=["sliding_attention"] * 2
)
# Uneven lengths; the first three have a common prefix.
EXAMPLES = [
    example([5, 6, 7, 8], [9, 10, 2], "a"),
    example([5, 6, 7, 11, 12, 13], [14, 2], "b"),
    example([5, 6, 15], [16, 17, 18, 19, 20, 2], "c"),
    example([30, 31, 32, 33, 34, 35, 36, 37, 38, 39], [40, 2], "d"),
    example([30], [2], "e"),
]


def values(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """The loss of each supervised token by its example and its number there."""
    return {f"{name} {n}": loss for name, part in losses.items() for n, loss in enumerate(part.tolist())}


def found_losses(model: Any, batches: Any) -> dict[str, float]:
    results = losses_by_example(model, batches.micro_batches(EXAMPLES))
    return values({item.example_id: result.losses for item, result in results})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_code_path_gives_the_textbook_losses(name: str) -> None:
    model = random_model(CONFIGS[name]).eval()
    expected = pytest.approx(values(textbook_losses(model, EXAMPLES)), rel=1e-5)
    batches, messages, _ = choose_batches(model, EXAMPLES, 30)
    assert messages == ["Engine: packed batches with shared prefixes"]
    assert found_losses(model, batches) == expected
    assert found_losses(model, PackedBatches(Limits(30, 30), share_prefix=False)) == expected
    assert found_losses(model, PaddedBatches(Limits(30, 30))) == expected


def gradient(model: Any, batches: Any, precision: str = "fp32") -> torch.Tensor:
    model.zero_grad()
    for batch in batches.micro_batches(EXAMPLES):
        with autocast(precision, model.device):
            (summed_loss(model, batch) / 14).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batches", [PackedBatches, PaddedBatches])
def test_gradient_does_not_depend_on_the_size_of_micro_batches(name: str, batches: Any) -> None:
    model = random_model(CONFIGS[name])
    one, some, all_examples = (gradient(model, batches(Limits(size, size))) for size in (1, 12, 1000))
    torch.testing.assert_close(some, one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(all_examples, one, rtol=1e-5, atol=1e-6)


def test_logits_are_computed_only_where_a_token_is_supervised() -> None:
    model = random_model(CONFIGS["llama"])
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _, inputs, logits: shapes.append(tuple(logits.shape)))
    gradient(model, PackedBatches(Limits(1000, 1000)))
    gradient(model, PackedBatches(Limits(1000, 6)))
    assert shapes == [(1, 14, 50), (1, 5, 50), (1, 6, 50), (1, 3, 50)]
    shapes.clear()
    gradient(model, PaddedBatches(Limits(1000, 1000)))
    assert shapes == [(5, 9, 50)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bf16_gradient_equals_fp32_up_to_rounding(name: str) -> None:
    model = random_model(CONFIGS[name])
    expected = gradient(model, PackedBatches(Limits(1000, 1000)))
    found = gradient(model, PackedBatches(Limits(1000, 6)), "bf16")
    assert found.dtype == torch.float32
    assert 1e-5 < (found - expected).norm() / expected.norm() < 2e-2


def test_examples_are_computed_alone_if_positions_depend_on_the_longest_one() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 16.0}
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8, **factors}
    model = random_model(Phi3Config(**SMALL, original_max_position_embeddings=8, rope_parameters=longrope)).eval()
    batches, (message,), _ = choose_batches(model, EXAMPLES, 60)
    assert message.startswith("Engine: one example at a time; packed batches with shared prefixes: losses differ by ")
    expected = values(textbook_losses(model, EXAMPLES))
    assert found_losses(model, batches) == pytest.approx(expected, rel=1e-5)


def test_a_prefix_that_only_later_examples_share_is_probed() -> None:
    model = random_model(
        GPTJConfig(**GPT2, rotary_dim=4, **NO_DROPOUT)
    ).eval()  # its attention does not receive the layout
    _, (message,), _ = choose_batches(model, EXAMPLES[3:] + EXAMPLES[:3], 13)
    assert message.startswith("Engine: padded batches; ")


def test_a_model_without_an_exact_kind_of_batch_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.engine.probe.TOLERANCE", -1)
    with pytest.raises(UserError) as error:
        choose_batches(random_model(CONFIGS["llama"]).eval(), EXAMPLES, 30)
    assert re.fullmatch(
        r"no kind of batch gives the losses of the plain model \(packed batches with shared prefixes: losses differ by "
        r"up to .*; one example at a time: losses differ by up to .* nats/token\); set model_name to another model",
        str(error.value),
    )


def test_examples_beyond_the_limits_are_reported_and_computed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAX_LOGITS, "cpu", 50 * 4)
    batches, messages, _ = choose_batches(random_model(CONFIGS["llama"]).eval(), EXAMPLES, 30)
    assert messages[1:] == [
        "Examples with more than 30 tokens or 4 supervised tokens, each a micro-batch of its own: 1"
    ]
    assert [[e.example_id for e in batch.examples] for batch in batches.micro_batches(EXAMPLES)] == [
        ["a"],
        ["b"],
        ["c"],
        ["e", "d"],
    ]


def test_dropout_prevents_shared_prefixes_in_training_only() -> None:
    model = random_model(GPT2Config(**GPT2))
    messages = ["Engine: packed batches; no shared prefixes because of dropout"]
    assert choose_batches(model.train(), EXAMPLES, 30)[1] == messages
    assert choose_batches(model.eval(), EXAMPLES, 30)[1] == ["Engine: packed batches with shared prefixes"]


def test_token_is_correct_if_the_most_likely_one_is_the_target() -> None:
    model = random_model(CONFIGS["llama"]).eval()
    batches = PaddedBatches(Limits(1000, 1000)).micro_batches(EXAMPLES[:1])
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])).logits[0, 3:]
    expected = (logits.argmax(-1) == torch.tensor([9, 10, 2])).tolist()
    ((_, result),) = losses_by_example(model, batches)
    assert result.correct.tolist() == expected
