"""Attention over packed examples by one kernel for sequences of different lengths, on GPUs in half precision.

The kernel is FlashAttention, as `torch.nn.attention.varlen`. Each prefix and each suffix of the packed row (see
`attention`) is a sequence of queries. The keys of a suffix are those of its prefix and its own, so the keys of a shared
prefix are copied for each of its suffixes.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch.nn.attention.varlen import varlen_attn


class VarlenLayout(NamedTuple):
    """The sequences of a packed row, in the order of their queries.

    query_offsets, key_offsets: int32 (sequences + 1,), where the queries and the keys of each sequence begin.
    key_positions: int64 (keys,), the position of each key in the packed row.
    max_queries, max_keys: those of the longest sequence.
    """

    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    key_positions: torch.Tensor
    max_queries: int
    max_keys: int

    @classmethod
    def build(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> Self:
        """Lay out consecutive groups, each given by the length of its prefix and the lengths of its suffixes."""
        num_queries, keys, start = [], [], 0
        for prefix_length, suffix_lengths in groups:
            prefix = torch.arange(start, start + prefix_length)
            if prefix_length:
                num_queries.append(prefix_length)
                keys.append(prefix)
                start += prefix_length
            for length in suffix_lengths:
                num_queries.append(length)
                keys.append(torch.cat([prefix, torch.arange(start, start + length)]))
                start += length
        num_keys = [len(positions) for positions in keys]
        return cls(_offsets(num_queries), _offsets(num_keys), torch.cat(keys), max(num_queries), max(num_keys))

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, dropout: float
    ) -> torch.Tensor:
        """Attention of one layer: query (tokens, heads, head size), key and value (tokens, key heads, head size).

        Raises:
            ValueError: the kernel has no dropout.
            RuntimeError: it does not support this dtype, head size or device.
        """
        if dropout:
            raise ValueError("varlen_attn has no dropout")
        device = query.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
        keys, values = (x.to(dtype).index_select(0, self.key_positions) for x in (key, value))
        # With fewer queries than keys, "causal" (-1, 0) aligns the last query with the last key.
        out: torch.Tensor = varlen_attn(  # type: ignore[assignment]
            query.to(dtype),
            keys,
            values,
            self.query_offsets,
            self.key_offsets,
            self.max_queries,
            self.max_keys,
            scale=scaling,
            window_size=(-1, 0),
            enable_gqa=True,
        )
        return out


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()
