"""Packed batches, padded batches and a textbook loop give the same losses and gradients."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from stages.data.examples import Example
from stages.engine import loss
from stages.engine.batches import PackedBatches, PaddedBatches
from stages.engine.loss import accumulate_gradient, choose_batches, token_losses
from stages.engine.models import autocast
from tests.conftest import example

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


def make(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def textbook_losses(model: Any, examples: list[Example]) -> dict[str, list[float]]:
    """One example at a time, all logits, plain cross entropy with `ignore_index` -100."""
    losses = {}
    for item in examples:
        logits = model(input_ids=torch.tensor(item.input_ids[None].astype(int))).logits[0, :-1]
        labels = torch.tensor(item.labels[1:].astype(int))
        all_losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        losses[item.example_id] = all_losses[labels != -100].tolist()
    return losses


def losses_by_example(model: Any, batches: Any) -> dict[str, list[float]]:
    found = {}
    for batch in batches.micro_batches(EXAMPLES):
        parts = token_losses(model, batch).losses.split([item.num_supervised for item in batch.examples])
        found |= {item.example_id: part.tolist() for item, part in zip(batch.examples, parts, strict=True)}
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_code_path_gives_the_textbook_losses(name: str) -> None:
    model = make(CONFIGS[name]).eval()
    expected = textbook_losses(model, EXAMPLES)
    assert list(map(len, expected.values())) == [3, 2, 6, 2, 1]
    padded = losses_by_example(model, PaddedBatches(30))
    batches, reason = choose_batches(model, EXAMPLES, 30)
    assert reason == "packed batches with shared prefixes"
    packed = losses_by_example(model, batches)
    unshared = losses_by_example(model, PackedBatches(30, share_prefix=False))
    for key in expected:
        assert padded[key] == pytest.approx(expected[key], rel=1e-5)
        assert packed[key] == pytest.approx(expected[key], rel=1e-5)
        assert unshared[key] == pytest.approx(expected[key], rel=1e-5)


def gradient(model: Any, batches: Any, precision: str = "fp32") -> torch.Tensor:
    model.zero_grad()
    for batch in batches.micro_batches(EXAMPLES):
        with autocast(precision, model.device):
            accumulate_gradient(model, batch, 14)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batches", [PackedBatches, PaddedBatches])
def test_gradient_does_not_depend_on_the_size_of_micro_batches(name: str, batches: Any) -> None:
    model = make(CONFIGS[name])
    one, some, all_examples = (gradient(model, batches(max_tokens)) for max_tokens in (1, 12, 1000))
    torch.testing.assert_close(some, one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(all_examples, one, rtol=1e-5, atol=1e-6)


def test_logits_are_computed_in_chunks_and_only_at_supervised_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(CONFIGS["llama"])
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _, inputs, logits: shapes.append(tuple(logits.shape)))
    expected = gradient(model, PackedBatches(1000))
    assert shapes == [(1, 14, 50)]
    shapes.clear()
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 50 * 6 + 49)
    torch.testing.assert_close(gradient(model, PackedBatches(1000)), expected, rtol=1e-5, atol=1e-6)
    assert shapes == [(1, 6, 50), (1, 6, 50), (1, 2, 50)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bf16_gradient_equals_fp32_up_to_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(CONFIGS[name])
    expected = gradient(model, PackedBatches(1000))
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 50 * 6)
    found = gradient(model, PackedBatches(1000), "bf16")
    assert found.dtype == torch.float32
    assert 1e-5 < (found - expected).norm() / expected.norm() < 2e-2


def test_window_shorter_than_an_example_uses_padded_batches() -> None:
    model = make(SLIDING_WINDOW).eval()
    expected = textbook_losses(model, EXAMPLES)
    batches, reason = choose_batches(model, EXAMPLES, 30)
    assert reason.startswith("padded batches: packed batches differ by up to ")
    assert reason.endswith(" nats/token")
    found = losses_by_example(model, batches)
    for key in expected:
        assert found[key] == pytest.approx(expected[key], rel=1e-5)


def test_dropout_prevents_shared_prefixes_in_training_only() -> None:
    model = make(GPT2Config(**GPT2))
    assert choose_batches(model.train(), EXAMPLES, 30)[1] == "packed batches; no shared prefixes because of dropout"
    assert choose_batches(model.eval(), EXAMPLES, 30)[1] == "packed batches with shared prefixes"


def test_token_is_correct_if_the_most_likely_one_is_the_target() -> None:
    model = make(CONFIGS["llama"]).eval()
    (batch,) = PaddedBatches(1000).micro_batches(EXAMPLES[:1])
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])).logits[0, 3:]
    expected = (logits.argmax(-1) == torch.tensor([9, 10, 2])).tolist()
    assert token_losses(model, batch).correct.tolist() == expected
