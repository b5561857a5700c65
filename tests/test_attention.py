"""Attention over a flat stream equals attention over each example alone."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from stages.shared import attention
from stages.shared.attention import StreamLayout, flat_attention


def test_a_layout_says_where_the_examples_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "EXAMPLES_PER_BLOCK", 2)
    layout = StreamLayout.of(2, [3, 1, 2])
    short, long = layout.blocks
    assert short.rows.tolist() == [[5, 0], [6, 7]]
    assert short.mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert long.rows.tolist() == [[2, 3, 4]]
    assert long.mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    # The stream's tokens 2, 3, 4 lie in the second block, behind the four places of the first.
    assert layout.places.tolist() == [4, 5, 6, 0, 2, 3]


@pytest.mark.parametrize("examples_per_block", [1, 2, 8])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_each_example_sees_the_prefix_and_itself(
    prefix: int, key_heads: int, examples_per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "EXAMPLES_PER_BLOCK", examples_per_block)
    torch.manual_seed(0)
    rests = [3, 1, 6]
    query = torch.randn(1, 4, prefix + sum(rests), 8, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(1, key_heads, prefix + sum(rests), 8, dtype=torch.float64, requires_grad=True) for _ in "kv"
    )
    out, _ = flat_attention(
        torch.nn.Module(), query, key, value, None, layout=StreamLayout.of(prefix, rests), scaling=0.3
    )

    expected = torch.empty(1, prefix + sum(rests), 4, 8, dtype=torch.float64)
    start = prefix
    for rest in rests:
        tokens = [*range(prefix), *range(start, start + rest)]
        q, k, v = (x[:, :, tokens].repeat_interleave(4 // x.shape[1], 1) for x in (query, key, value))
        expected[:, tokens] = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(1, 2)
        start += rest
    torch.testing.assert_close(out, expected)

    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), [query, key, value], retain_graph=True)
    wanted = torch.autograd.grad((expected * weights).sum(), [query, key, value])
    torch.testing.assert_close(found, wanted)
