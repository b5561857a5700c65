"""One loss, whatever path computes it: the flat stream, padded micro-batches, a textbook loop."""

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

from stages.shared import loss
from stages.shared.batches import FlatBatches, PaddedBatches
from stages.shared.examples import Example
from stages.shared.loss import accumulate_gradient, choose_batches, token_losses
from stages.shared.models import autocast
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
# Uneven lengths; the first three begin alike.
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
    """One example at a time, all logits, cross entropy with its own -100: no trick at all."""
    losses = {}
    for item in examples:
        logits = model(input_ids=torch.tensor(item.input_ids[None].astype(int))).logits[0, :-1]
        labels = torch.tensor(item.labels[1:].astype(int))
        all_losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        losses[item.example_id] = all_losses[labels != -100].tolist()
    return losses


def losses_by_example(model: Any, batches: Any) -> dict[str, list[float]]:
    found = {}
    for batch in batches.cut(EXAMPLES):
        parts = token_losses(model, batch).losses.split([item.num_supervised for item in batch.examples])
        found |= {item.example_id: part.tolist() for item, part in zip(batch.examples, parts, strict=True)}
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_path_gives_the_textbook_losses(name: str) -> None:
    model = make(CONFIGS[name]).eval()
    expected = textbook_losses(model, EXAMPLES)
    assert list(map(len, expected.values())) == [3, 2, 6, 2, 1]
    padded = losses_by_example(model, PaddedBatches(30))
    batches, reason = choose_batches(model, EXAMPLES, 30)
    assert reason == "flat stream with a shared prefix"
    flat = losses_by_example(model, batches)
    unshared = losses_by_example(model, FlatBatches(30, share_prefix=False))
    for key in expected:
        assert padded[key] == pytest.approx(expected[key], rel=1e-5)
        assert flat[key] == pytest.approx(expected[key], rel=1e-5)
        assert unshared[key] == pytest.approx(expected[key], rel=1e-5)


def gradient(model: Any, batches: Any, precision: str = "fp32") -> torch.Tensor:
    model.zero_grad()
    for batch in batches.cut(EXAMPLES):
        with autocast(precision, model.device):
            accumulate_gradient(model, batch, 14)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batches", [FlatBatches, PaddedBatches])
def test_eight_by_one_four_by_two_and_one_by_eight_have_the_same_gradient(name: str, batches: Any) -> None:
    model = make(CONFIGS[name])
    one, two, all_at_once = (gradient(model, batches(max_tokens)) for max_tokens in (1, 12, 1000))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(all_at_once, one, rtol=1e-5, atol=1e-6)


def test_logits_exist_only_where_supervised_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(CONFIGS["llama"])
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _, inputs, logits: shapes.append(tuple(logits.shape)))
    whole = gradient(model, FlatBatches(1000))
    assert shapes == [(1, 14, 50)]
    shapes.clear()
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 50 * 6 + 49)
    torch.testing.assert_close(gradient(model, FlatBatches(1000)), whole, rtol=1e-5, atol=1e-6)
    assert shapes == [(1, 6, 50), (1, 6, 50), (1, 2, 50)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bf16_has_the_gradient_of_fp32_to_its_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(CONFIGS[name])
    expected = gradient(model, FlatBatches(1000))
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 50 * 6)
    found = gradient(model, FlatBatches(1000), "bf16")
    assert found.dtype == torch.float32
    assert 1e-5 < (found - expected).norm() / expected.norm() < 2e-2


def test_a_window_shorter_than_an_example_takes_the_padded_path() -> None:
    model = make(SLIDING_WINDOW).eval()
    expected = textbook_losses(model, EXAMPLES)
    batches, reason = choose_batches(model, EXAMPLES, 30)
    assert reason.startswith("padded micro-batches: a flat stream differs by up to ")
    found = losses_by_example(model, batches)
    for key in expected:
        assert found[key] == pytest.approx(expected[key], rel=1e-5)


def test_dropout_keeps_the_prefix_from_being_shared_in_training_only() -> None:
    model = make(GPT2Config(**GPT2))
    assert choose_batches(model.train(), EXAMPLES, 30)[1] == "flat stream, prefix not shared: dropout is on"
    assert choose_batches(model.eval(), EXAMPLES, 30)[1] == "flat stream with a shared prefix"


def test_a_token_is_correct_where_the_likeliest_is_the_target() -> None:
    model = make(CONFIGS["llama"]).eval()
    (batch,) = PaddedBatches(1000).cut(EXAMPLES[:1])
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])).logits[0, 3:]
    expected = (logits.argmax(-1) == torch.tensor([9, 10, 2])).tolist()
    assert token_losses(model, batch).correct.tolist() == expected
