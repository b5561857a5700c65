"""Keys and values of prompts and their answers, without a copy of the whole cache at each new token."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from stages.data.examples import IGNORE_INDEX, Example
from stages.engine.attention import to_autocast_dtype
from stages.engine.batches import NO_LIMITS, MicroBatch, PackedBatches


class CachedRows:
    """One row of keys and values per prompt, padded on the left, with room for new tokens.

    A layout of `packed_attention`. The first call of the model computes the packed prompts, common prefixes once; each
    later call computes one new token per row.

    Args:
        room: how many keys of new tokens a row may get. The last new token needs none.

    order: the prompt of each row.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], room: int, device: torch.device):
        packed = pack_prompts(prompts)
        self.order = [int(example.example_id) for example in packed.examples]
        positions = list(packed_positions(packed))
        rows = pad_sequence(positions, batch_first=True, padding_value=-1, padding_side="left")
        self._prompts, self._rows = packed.to(device), rows.to(device)
        self._num_columns = rows.shape[1]
        self._mask = torch.zeros(len(prompts), rows.shape[1] + room, device=device)
        self._mask[:, : rows.shape[1]].masked_fill_(self._rows < 0, float("-inf"))
        # By the order of calls, because some models call a layer several times.
        self._cached: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._num_calls = 0

    def prompt_inputs(self) -> dict[str, Any]:
        """Arguments of the first call, whose logits are those after each prompt."""
        return {**self._prompts.inputs, "logits_to_keep": self._prompts.columns, "layout": self}

    def token_inputs(self, token_ids: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
        """Arguments of a call that adds a token to each row."""
        self._num_columns += 1
        self._num_calls = 0
        return {"input_ids": token_ids[None], "position_ids": positions[None], "layout": self}

    def keep(self, kept: torch.Tensor) -> torch.Tensor:
        """Drop the other rows. Rows from the end take their places, so that few rows are copied.

        Args:
            kept: bool (rows,)

        Returns:
            int64 (kept rows,), the row that is now in each place.
        """
        count = int(kept.sum())
        order = torch.arange(count, device=kept.device)
        free = (~kept[:count]).nonzero().squeeze(1)
        order[free] = kept[count:].nonzero().squeeze(1) + count
        for tensor in (self._mask, *(tensor for layer in self._cached for tensor in layer)):
            tensor[free] = tensor[order[free]]
        self._mask = self._mask[:count]
        return order

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, dropout: float
    ) -> torch.Tensor:
        """Attention of one layer: query (tokens, heads, head size), key and value (tokens, key heads, head size)."""
        key, value = to_autocast_dtype(key, value)
        if self._num_columns == self._rows.shape[1]:  # the prompts
            self._cached.append((self._unpack(key), self._unpack(value)))
            out: torch.Tensor = self._prompts.inputs["layout"].attend(query, key, value, scaling, dropout)
            return out
        num_rows, num_columns = len(query), self._num_columns
        keys, values = (cached[:num_rows, :, :num_columns] for cached in self._cached[self._num_calls])
        self._num_calls += 1
        keys[:, :, -1], values[:, :, -1] = key, value
        # Queries that share a key head are computed like several queries of one head.
        grouped = query.to(key.dtype).view(num_rows, key.shape[1], -1, query.shape[2])
        mask = self._mask[:, None, None, :num_columns].to(key.dtype)
        with torch.autocast(query.device.type, enabled=False):
            out = scaled_dot_product_attention(grouped, keys, values, mask, scale=scaling)
        return out.reshape(num_rows, query.shape[1], -1)

    def _unpack(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head size) → (rows, heads, columns with room, head size)."""
        cached = x.new_empty(len(self._rows), x.shape[1], self._mask.shape[1], x.shape[2])
        cached[:, :, : self._rows.shape[1]] = x[self._rows.clamp(min=0)].transpose(1, 2)
        return cached


def pack_prompts(prompts: Sequence[Sequence[int]]) -> MicroBatch:
    """All prompts in one row, as if the model were to predict one token after each."""
    examples = []
    for index, prompt in enumerate(prompts):
        labels = [IGNORE_INDEX] * len(prompt) + [0]
        examples.append(Example(str(index), np.array([*prompt, 0], np.int32), np.array(labels, np.int32)))
    return next(PackedBatches(NO_LIMITS).micro_batches(examples))


def packed_positions(packed: MicroBatch) -> Iterator[torch.Tensor]:
    """The packed positions of each prompt's tokens: those of its prefix, then those of its suffix."""
    positions = packed.inputs["position_ids"][0].tolist()
    group = start = 0  # where the group of the prompt begins, and its suffix, or prefix and suffix in one
    for end in (packed.columns + 1).tolist():
        prefix_length = positions[start]
        if prefix_length == 0:
            group = start
        yield torch.cat([torch.arange(group, group + prefix_length), torch.arange(start, end)])
        start = end
