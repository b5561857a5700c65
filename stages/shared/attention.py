"""Attention over a flat stream: examples laid end to end in one row, no padding, their common prefix only once.

Padding and repeated prompts are work that changes nothing. In the stream

    [prefix] [rest of example 0] [rest of example 1] ...

every token attends to the prefix and, causally, to its own example. The attention itself runs over a small padded
view of queries, keys and values, so that it stays two calls of a fused kernel a layer; all else sees the stream.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

NAME = "flat_stream"


EXAMPLES_PER_BLOCK = 8


@dataclass(frozen=True)
class Block:
    """A padded view of some examples of a stream.

    rows: int64 (examples, longest rest), the stream position of each token; padding repeats position 0.
    mask: bool (longest rest, prefix_length + longest rest), True where a query may look. One mask serves all examples:
        what pads the shorter ones stands behind all that their queries may see.
    """

    rows: torch.Tensor
    mask: torch.Tensor

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head size) → (examples, heads, longest rest, head size)."""
        # Not x[rows]: the gradient of that is several times slower on a CPU.
        return x.index_select(0, self.rows.flatten()).view(*self.rows.shape, *x.shape[1:]).transpose(1, 2)

    def view_after_prefix(self, x: torch.Tensor, prefix_length: int) -> torch.Tensor:
        """(tokens, heads, head size) → (examples, heads, prefix_length + longest rest, head size)."""
        prefix = x[:prefix_length].transpose(0, 1).expand(len(self.rows), -1, -1, -1)
        return torch.cat([prefix, self.view(x)], 2)


@dataclass(frozen=True)
class StreamLayout:
    """Where the examples lie in a stream of `prefix_length + sum(rest_lengths)` tokens.

    blocks: views of all examples, those of similar length together, so that little of a view is padding.
    places: int64 (sum of rests,), where each stream token after the prefix lies in the flattened rows of all blocks.
    """

    prefix_length: int
    blocks: list[Block]
    places: torch.Tensor

    @classmethod
    def of(cls, prefix_length: int, rest_lengths: list[int]) -> "StreamLayout":
        lengths = torch.tensor(rest_lengths)
        rows = stream_rows(prefix_length, rest_lengths)
        blocks, order = [], []
        for members in lengths.argsort(stable=True).split(EXAMPLES_PER_BLOCK):
            longest = int(lengths[members].max())
            mask = torch.ones(longest, prefix_length + longest, dtype=torch.bool).tril(prefix_length)
            blocks.append(Block(rows[members, :longest].clamp(min=0), mask))
            order.append(rows[members, :longest].flatten())
        tokens = torch.cat(order)
        real = (tokens >= 0).nonzero().squeeze(1)
        places = torch.empty(sum(rest_lengths), dtype=torch.int64)
        places[tokens[real] - prefix_length] = real
        return cls(prefix_length, blocks, places)

    def to(self, device: torch.device) -> "StreamLayout":
        blocks = [Block(block.rows.to(device), block.mask.to(device)) for block in self.blocks]
        return StreamLayout(self.prefix_length, blocks, self.places.to(device))


def stream_rows(prefix_length: int, rest_lengths: list[int]) -> torch.Tensor:
    """int64 (examples, longest rest), the stream position of each token, -1 where there is none."""
    lengths = torch.tensor(rest_lengths)
    starts = prefix_length + lengths.cumsum(0) - lengths
    steps = torch.arange(int(lengths.max()))
    return torch.where(steps < lengths[:, None], starts[:, None] + steps, -1)


def flat_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: StreamLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, with the signature that `transformers.AttentionInterface` asks for.

    query: (1, heads, tokens, head size); key and value: (1, key heads, tokens, head size).
    Returns (1, tokens, heads, head size).
    """
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, head size)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    outs = []
    for block in layout.blocks:
        keys, values = (block.view_after_prefix(x, layout.prefix_length) for x in (k, v))
        out = scaled_dot_product_attention(block.view(q), keys, values, block.mask, dropout, scale=scaling)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    out = torch.cat(outs).index_select(0, layout.places)
    if layout.prefix_length:
        prefix_q, prefix_k, prefix_v = (x[: layout.prefix_length].transpose(0, 1)[None] for x in (q, k, v))
        head = scaled_dot_product_attention(
            prefix_q, prefix_k, prefix_v, dropout_p=dropout, is_causal=True, scale=scaling
        )
        out = torch.cat([head[0].transpose(0, 1), out])
    return out[None], None


AttentionInterface.register(NAME, flat_attention)


@contextmanager
def flat_stream(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend over a stream; its calls need a `layout`. Afterwards it attends as before."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
