"""The layout for the variable-length kernel, with a plain version of the kernel; test_gpu.py runs the real one."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2Config

from stages.engine import probe, varlen
from stages.engine.attention import PackedLayout
from stages.engine.batches import Limits, PackedBatches
from stages.engine.loss import summed_loss
from stages.engine.probe import choose_batches
from stages.engine.varlen import VarlenLayout
from tests.test_loss import CONFIGS, EXAMPLES, GPT2, gradient
from tests.tiny_models import random_model


def plain_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    max_queries: int,
    max_keys: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """`varlen_attn` for causal attention, one sequence at a time: the last query can attend to all keys."""
    assert (window_size, enable_gqa) == ((-1, 0), True)
    assert (max_queries, max_keys) == (query_offsets.diff().max(), key_offsets.diff().max())
    outs = []
    for queries, keys in zip(query_offsets.unfold(0, 2, 1).tolist(), key_offsets.unfold(0, 2, 1).tolist(), strict=True):
        q, k, v = (x[slice(*span)].transpose(0, 1) for x, span in ((query, queries), (key, keys), (value, keys)))
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        outs.append(scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(outs)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", plain_kernel)
    monkeypatch.setattr(probe, "has_varlen_kernel", lambda *_: True)


def test_layout_positions_of_packed_examples() -> None:
    layout = VarlenLayout.build([(2, [3, 1]), (0, [2])])
    assert layout.query_offsets.tolist() == [0, 2, 5, 6, 8]
    assert layout.key_offsets.tolist() == [0, 2, 7, 10, 12]
    assert layout.key_positions.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6, 7]
    assert (layout.query_offsets.dtype, layout.key_offsets.dtype) == (torch.int32, torch.int32)
    assert (layout.max_queries, layout.max_keys) == (3, 5)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.usefixtures("kernel")
def test_attention_and_its_gradients_equal_those_of_blocks(prefix: int, key_heads: int) -> None:
    torch.manual_seed(0)
    groups = [(prefix, [3, 1, 6]), (2, [2, 5])]
    tokens = prefix + 10 + 2 + 7
    query = torch.randn(tokens, 4, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(tokens, key_heads, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    weights = torch.randn_like(query)
    results = []
    for layout in (PackedLayout, VarlenLayout):
        out = layout.build(groups).attend(query, key, value, 0.3, 0.0)
        results.append([out, *torch.autograd.grad((out * weights).sum(), [query, key, value])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("kernel")
def test_the_kernel_is_chosen_and_its_gradient_equals_that_of_blocks(name: str) -> None:
    model = random_model(CONFIGS[name])
    batches, messages, _ = choose_batches(model.eval(), EXAMPLES, 30, "bf16")
    assert messages == ["Engine: packed batches with shared prefixes, variable-length kernel"]
    assert batches == PackedBatches(batches.limits, layout=VarlenLayout)
    limits = Limits(1000, 1000)
    expected, found = (gradient(model, PackedBatches(limits, layout=layout)) for layout in (PackedLayout, VarlenLayout))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("kernel")
def test_the_attention_inputs_have_the_precision_of_autocast() -> None:
    model = random_model(CONFIGS["qwen3"])  # its norms return queries and keys in fp32
    dtypes: set[torch.dtype] = set()

    def record(*args: Any, **options: Any) -> torch.Tensor:
        dtypes.update(x.dtype for x in args[:3])
        return plain_kernel(*args, **options)

    with pytest.MonkeyPatch.context() as context, torch.autocast("cpu", torch.bfloat16):
        context.setattr(varlen, "varlen_attn", record)
        for batch in PackedBatches(Limits(1000, 1000), layout=VarlenLayout).micro_batches(EXAMPLES):
            summed_loss(model, batch)
    assert dtypes == {torch.bfloat16}


@pytest.mark.usefixtures("kernel")
def test_a_kernel_with_wrong_results_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        return scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", without_mask)
    batches, (message,), _ = choose_batches(random_model(CONFIGS["llama"]).eval(), EXAMPLES, 30, "bf16")
    assert message.startswith(
        "Engine: packed batches with shared prefixes; variable-length kernel: losses differ by 0."
    )
    assert batches == PackedBatches(batches.limits)


def test_a_kernel_that_does_not_support_the_device_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "has_varlen_kernel", lambda *_: True)
    _, messages, _ = choose_batches(random_model(CONFIGS["llama"]).eval(), EXAMPLES, 30, "bf16")
    assert messages == [
        "Engine: packed batches with shared prefixes; variable-length kernel: not supported (NotImplementedError)"
    ]


@pytest.mark.usefixtures("kernel")
def test_the_kernel_is_not_used_to_train_a_model_with_dropout_of_attention() -> None:
    model = random_model(GPT2Config(**GPT2))
    state = torch.get_rng_state()
    batches, messages, _ = choose_batches(model.train(), EXAMPLES, 30, "bf16")
    assert messages == [
        "Engine: packed batches; no shared prefixes because of dropout; variable-length kernel: not supported "
        "(ValueError)"
    ]
    assert batches == PackedBatches(batches.limits, share_prefix=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert choose_batches(model.eval(), EXAMPLES, 30, "bf16")[1] == [
        "Engine: packed batches with shared prefixes, variable-length kernel"
    ]
