"""Attention over a flat stream equals attention over each example alone."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from stages.shared import attention
from stages.shared.attention import StreamLayout, flat_attention


def test_a_layout_says_where_the_examples_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "EXAMPLES_PER_BLOCK", 2)
    layout = StreamLayout.of([(2, [3, 1, 2]), (0, [1])])
    prefix, short, long, other = layout.blocks
    assert prefix.rows.tolist() == [[0, 1]]
    assert prefix.mask.exp().int().tolist() == [[1, 0], [1, 1]]
    assert short.prefix == slice(0, 2)
    assert short.rows.tolist() == [[5, 0], [6, 7]]
    assert short.mask.exp().int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert long.rows.tolist() == [[2, 3, 4]]
    assert long.mask.exp().int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert other.prefix == slice(8, 8)
    assert other.rows.tolist() == [[8]]
    # The stream's tokens 2, 3, 4 lie in the third block, behind the two places of the first and four of the second.
    assert layout.places.tolist() == [0, 1, 6, 7, 8, 2, 4, 5, 9]


@pytest.mark.parametrize("examples_per_block", [1, 2, 8])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("matmul_up_to", [0, 512])
def test_each_example_sees_its_groups_prefix_and_itself(
    prefix: int, key_heads: int, examples_per_block: int, matmul_up_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "EXAMPLES_PER_BLOCK", examples_per_block)
    monkeypatch.setattr(attention, "MATMUL_UP_TO", matmul_up_to)
    torch.manual_seed(0)
    groups = [(prefix, [3, 1, 6]), (2, [2, 5])]
    tokens = prefix + 10 + 2 + 7
    query = torch.randn(1, 4, tokens, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, key_heads, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    layout = StreamLayout.of(groups)
    out, _ = flat_attention(torch.nn.Module(), query, key, value, None, layout=layout, scaling=0.3)

    expected = torch.empty(1, tokens, 4, 8, dtype=torch.float64)
    start = 0
    for prefix_length, rests in groups:
        shared = range(start, start + prefix_length)
        start += prefix_length
        for rest in rests:
            seen = [*shared, *range(start, start + rest)]
            q, k, v = (x[:, :, seen].repeat_interleave(4 // x.shape[1], 1) for x in (query, key, value))
            expected[:, seen] = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(1, 2)
            start += rest
    torch.testing.assert_close(out, expected)

    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), [query, key, value], retain_graph=True)
    wanted = torch.autograd.grad((expected * weights).sum(), [query, key, value])
    torch.testing.assert_close(found, wanted)
