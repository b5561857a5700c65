"""Attention over packed examples equals attention over each example alone."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from stages.engine import attention
from stages.engine.attention import PackedLayout, packed_attention


@pytest.mark.parametrize("examples_per_block", [1, 2, 8])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("max_matmul_length", [0, 512])
def test_each_example_attends_to_its_groups_prefix_and_to_itself(
    prefix: int, key_heads: int, examples_per_block: int, max_matmul_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "EXAMPLES_PER_BLOCK", examples_per_block)
    monkeypatch.setattr(attention, "MAX_MATMUL_LENGTH", max_matmul_length)
    torch.manual_seed(0)
    groups = [(prefix, [3, 1, 6]), (2, [2, 5])]
    tokens = prefix + 10 + 2 + 7
    query = torch.randn(1, 4, tokens, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, key_heads, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    layout = PackedLayout.build(groups)
    out, _ = packed_attention(torch.nn.Module(), query, key, value, None, layout=layout, scaling=0.3)

    expected = torch.empty(1, tokens, 4, 8, dtype=torch.float64)
    start = 0
    for prefix_length, suffix_lengths in groups:
        shared = range(start, start + prefix_length)
        start += prefix_length
        for suffix_length in suffix_lengths:
            own = [*shared, *range(start, start + suffix_length)]
            q, k, v = (x[:, :, own].repeat_interleave(4 // x.shape[1], 1) for x in (query, key, value))
            expected[:, own] = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(1, 2)
            start += suffix_length
    torch.testing.assert_close(out, expected)

    weights = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weights).sum(), [query, key, value], retain_graph=True)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), [query, key, value])
    torch.testing.assert_close(gradients, expected_gradients)
