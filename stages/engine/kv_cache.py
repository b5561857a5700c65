"""Keys and values of prompts and their answers, without a copy of the whole cache at each new token."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from stages.engine.attention import PackedLayout, to_autocast_dtype


class CachedRows:
    """One row of keys and values per prompt, padded on the left, with room for new tokens.

    A layout of `packed_attention`. The first call of the model computes the packed prompts, their common prefix once;
    each later call computes one new token per row.

    Args:
        room: the number of new tokens, at most, without the last one, which needs no keys.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], room: int, device: torch.device):
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
        prefix = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
        lengths = [len(prompt) - prefix for prompt in prompts]
        self._device = device
        ends = torch.tensor(lengths).cumsum(0) + prefix - 1
        self._ends = ends.to(device)
        self._input_ids = list(prompts[0][:prefix]) + [token for prompt in prompts for token in prompt[prefix:]]
        self._position_ids = [*range(prefix)]
        for prompt in prompts:
            self._position_ids += range(prefix, len(prompt))
        self._packed = PackedLayout.build([(prefix, lengths)]).map(lambda tensor: tensor.to(device))
        # The packed position of each token of a row, -1 for padding.
        rows = torch.full((len(prompts), max(map(len, prompts))), -1)
        for row, end, length in zip(rows, ends.tolist(), lengths, strict=True):
            row[-prefix - length :] = torch.cat([torch.arange(prefix), torch.arange(end + 1 - length, end + 1)])
        self._rows = rows.to(device)
        self._num_columns = rows.shape[1]
        self._mask = torch.zeros(len(prompts), rows.shape[1] + room, device=device)
        self._mask[:, : rows.shape[1]].masked_fill_(self._rows < 0, float("-inf"))
        self._layers: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def prompt_inputs(self) -> dict[str, Any]:
        """Arguments of the first call, whose logits are those after each prompt."""
        ids, positions = torch.tensor([self._input_ids, self._position_ids], device=self._device)
        return {"input_ids": ids[None], "position_ids": positions[None], "logits_to_keep": self._ends, "layout": self}

    def token_inputs(self, token_ids: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
        """Arguments of a call that adds a token to each row."""
        self._num_columns += 1
        return {"input_ids": token_ids[None], "position_ids": positions[None], "layout": self}

    def keep(self, kept: torch.Tensor) -> torch.Tensor:
        """Drop the other rows. Rows from the end take their places, so that few rows are copied.

        Args:
            kept: bool (rows,)

        Returns:
            int64 (kept rows,), the row that is now in each place.
        """
        count = int(kept.sum())
        order = torch.arange(count, device=self._device)
        free = (~kept[:count]).nonzero().squeeze(1)
        order[free] = kept[count:].nonzero().squeeze(1) + count
        for tensor in (self._mask, *(tensor for layer in self._layers.values() for tensor in layer)):
            tensor[free] = tensor[order[free]]
        self._mask = self._mask[:count]
        return order

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """Attention of one layer: query (tokens, heads, head size), key and value (tokens, key heads, head size)."""
        query, key, value = to_autocast_dtype(query, key, value)
        if module not in self._layers:
            self._layers[module] = self._unpack(key), self._unpack(value)
            return self._packed.attend(module, query, key, value, scaling, dropout)
        num_rows, num_columns = len(query), self._num_columns
        keys, values = (cached[:num_rows, :, :num_columns] for cached in self._layers[module])
        keys[:, :, -1], values[:, :, -1] = key, value
        # Queries that share a key head take the place of queries at different times.
        grouped = query.view(num_rows, key.shape[1], -1, query.shape[2])
        mask = self._mask[:, None, None, :num_columns].to(query.dtype)
        with torch.autocast(query.device.type, enabled=False):
            out = scaled_dot_product_attention(grouped, keys, values, mask, scale=scaling)
        return out.reshape(num_rows, query.shape[1], -1)

    def _unpack(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head size) → (rows, heads, columns with room, head size)."""
        cached = x.new_empty(len(self._rows), x.shape[1], self._mask.shape[1], x.shape[2])
        cached[:, :, : self._rows.shape[1]] = x[self._rows.clamp(min=0)].transpose(1, 2)
        return cached
