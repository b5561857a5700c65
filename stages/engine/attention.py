"""Attention over packed examples: one row, no padding, shared prefixes computed once.

A group is a prefix and the examples that begin with it. In the packed row

    [prefix] [suffix of example 0] [suffix of example 1] ... [another prefix] [suffix of example 7] ...

every token attends, causally, to its own example and to the prefix of its group. All other layers see the packed row.
Attention itself runs on small padded blocks of queries, keys and values, on any device and in any precision; `varlen`
has a faster kernel for GPUs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel

NAME = "packed"
EXAMPLES_PER_BLOCK = 8
# On a CPU two plain matrix multiplications take a third of the fused kernel's time, but the score matrices of longer
# examples would need too much memory.
MAX_MATMUL_LENGTH = 512  # tokens


class Layout(Protocol):
    """Which tokens of a packed row attend to which."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, dropout: float
    ) -> torch.Tensor:
        """Attention of one layer: query (tokens, heads, head size), key and value (tokens, key heads, head size)."""


class Block(NamedTuple):
    """A padded view of some packed examples that have a common prefix.

    prefix: its positions in the packed row.
    rows: int64 (examples, longest suffix), the position of each token in the packed row; padding repeats position 0.
    mask: float32 (longest suffix, prefix + longest suffix), added to the scores: 0 where a query may attend, else -inf.
        All examples share it, because padding comes after all the keys that the shorter ones may attend to.
    """

    prefix: slice
    rows: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def build(cls, prefix: slice, rows: torch.Tensor) -> "Block":
        """Add the mask: each token of a suffix attends to the whole prefix and, causally, to its suffix."""
        prefix_length, longest = prefix.stop - prefix.start, rows.shape[1]
        mask = torch.full((longest, prefix_length + longest), float("-inf")).triu(prefix_length + 1)
        return cls(prefix, rows, mask)

    def gather_padded(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head size) → (examples, heads, longest suffix, head size)."""
        # Not x[rows], whose gradient is several times slower on a CPU.
        return x.index_select(0, self.rows.flatten()).view(*self.rows.shape, *x.shape[1:]).transpose(1, 2)

    def gather_with_prefix(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head size) → (examples, heads, prefix + longest suffix, head size)."""
        prefix = x[self.prefix].transpose(0, 1).expand(len(self.rows), -1, -1, -1)
        return torch.cat([prefix, self.gather_padded(x)], 2)


class PackedLayout(NamedTuple):
    """The positions of examples in a packed row.

    blocks: padded views of all prefixes and suffixes; suffixes of similar length are together, to save padding.
    unpad_indices: int64 (tokens,), the position of each packed token in the flattened rows of all blocks.
    """

    blocks: list[Block]
    unpad_indices: torch.Tensor

    @classmethod
    def build(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> "PackedLayout":
        """Lay out consecutive groups, each given by the length of its prefix and the lengths of its suffixes."""
        blocks, order, start = [], [], 0  # order: the packed position of each position in the blocks
        for prefix_length, suffix_lengths in groups:
            prefix = slice(start, start + prefix_length)
            if prefix_length:
                rows = torch.arange(prefix.start, prefix.stop)[None]
                blocks.append(Block.build(slice(start, start), rows))
                order.append(rows.flatten())
            end = prefix.stop + sum(suffix_lengths)
            suffixes = torch.arange(prefix.stop, end).split(suffix_lengths)
            rows, lengths = pad_sequence(suffixes, batch_first=True, padding_value=-1), torch.tensor(suffix_lengths)
            for members in lengths.argsort(stable=True).split(EXAMPLES_PER_BLOCK):
                block_rows = rows[members, : int(lengths[members].max())]
                blocks.append(Block.build(prefix, block_rows.clamp(min=0)))
                order.append(block_rows.flatten())
            start = end
        # Invert the order: from the position in the packed row to the position in the blocks, without padding (-1).
        tokens = torch.cat(order)
        real = (tokens >= 0).nonzero().squeeze(1)
        unpad_indices = torch.empty(start, dtype=torch.int64)
        unpad_indices[tokens[real]] = real
        return cls(blocks, unpad_indices)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, dropout: float
    ) -> torch.Tensor:
        """Attention of one layer: query (tokens, heads, head size), key and value (tokens, key heads, head size)."""
        query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        query, key, value = to_autocast_dtype(query, key, value)  # before the copies below
        device, outs = query.device.type, []
        with torch.autocast(device, enabled=False):  # softmax returns its input's dtype, and computes in fp32
            for block in self.blocks:
                q, k, v = block.gather_padded(query), block.gather_with_prefix(key), block.gather_with_prefix(value)
                if device == "cpu" and k.shape[2] <= MAX_MATMUL_LENGTH:
                    out = matmul_attention(q, k, v, block.mask.to(query.dtype), dropout)
                else:
                    # Not enable_gqa: no fused CUDA kernel supports it with a mask (huggingface/transformers#39412).
                    k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (k, v))
                    out = scaled_dot_product_attention(q, k, v, block.mask.to(query.dtype), dropout, scale=1.0)
                outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs).index_select(0, self.unpad_indices)


def to_autocast_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast tensors as autocast would for a matrix multiplication."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, with the signature that `transformers.AttentionInterface` requires.

    query: (1, heads, tokens, head size); key and value: (1, key heads, tokens, head size).
    Returns (1, tokens, heads, head size).

    Raises:
        ValueError: the model has made a mask of its own, which can have learned values.
    """
    if attention_mask is not None:
        raise ValueError("packed attention supports no other mask")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, head size)
    return layout.attend(q, k, v, scaling, dropout)[None], None


def matmul_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, dropout: float
) -> torch.Tensor:
    """`scaled_dot_product_attention` with a scale of 1; queries that share a key head are multiplied together.

    query: (examples, heads, queries, head size); key and value: (examples, key heads, keys, head size). In multi-head
    latent attention (https://arxiv.org/abs/2405.04434), the head size of values is another one.
    """
    examples, heads, num_queries, size = query.shape
    grouped = examples, key.shape[1], heads // key.shape[1] * num_queries
    scores = (query.reshape(*grouped, size) @ key.transpose(2, 3)).view(examples, heads, num_queries, -1)
    weights = torch.nn.functional.dropout((scores + mask).softmax(-1), dropout)
    return (weights.view(*grouped, -1) @ value).view(examples, heads, num_queries, -1)


AttentionInterface.register(NAME, packed_attention)


@contextmanager
def use_packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model attends to packed rows, and its calls need the argument `layout`.

    Raises:
        TypeError: the model does not call its attention through `transformers.AttentionInterface`.
    """
    if not model._can_set_attn_implementation():
        raise TypeError(f"{type(model).__name__} has attention of its own")
    before = model.config._attn_implementation
    if before == NAME:  # setting it takes a millisecond
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
