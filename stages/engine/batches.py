"""An effective batch → micro-batches of tensors.

The loss is summed over supervised tokens and divided once by their number in the effective batch. So the division into
micro-batches never changes the gradient and can be chosen for speed.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.data.examples import IGNORE_INDEX, Example
from stages.engine.attention import PackedLayout


@dataclass(frozen=True)
class MicroBatch:
    """The inputs of one forward pass and its targets.

    inputs: arguments of the model's `forward`.
    target_positions: int64 (supervised tokens,), positions in the output with batch and time flattened.
    targets: int64 (supervised tokens,), the token ids to predict at these positions.
    """

    examples: Sequence[Example]
    inputs: dict[str, Any]
    target_positions: torch.Tensor
    targets: torch.Tensor


def shuffled_batches(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[list[Example]]:
    """The effective batches of an epoch; the last one may be smaller.

    The order is that of a seeded hash of each example's id. So adding or removing examples keeps the order of the
    others, and a review can pair two runs by their seed.
    """

    def position(example: Example) -> bytes:
        return hashlib.sha256(f"{seed}:{epoch}:{example.example_id}".encode()).digest()

    order = sorted(examples, key=position)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def partition_by_cost(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Distribute examples over ranks: the most expensive first, each to the rank with the lowest cost so far.

    Returns:
        The indices of the examples of each rank.

    Example:
        >>> partition_by_cost([3, 9, 4, 1], 2)
        [[1], [2, 0, 3]]
    """
    partition: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        rank = loads.index(min(loads))
        partition[rank].append(index)
        loads[rank] += costs[index]
    return partition


class PackedBatches:
    """Micro-batches of packed examples: no padding, and a common prefix is computed once (see `attention`).

    Args:
        max_tokens: tokens per micro-batch; a single longer example is a micro-batch of its own.
        share_prefix: False with dropout, because all examples would share one dropout mask.
    """

    def __init__(self, max_tokens: int, share_prefix: bool = True):
        self.max_tokens = max_tokens
        self.share_prefix = share_prefix

    def micro_batches(self, examples: Sequence[Example]) -> Iterator[MicroBatch]:
        groups: list[list[Example]] = []
        sizes: list[int] = []  # tokens of each group
        # In this order, examples with a common prefix are adjacent, and the first and the last example of a group have
        # the shortest common prefix.
        for example in sorted(examples, key=lambda example: example.input_ids.tobytes()):
            length = len(example.input_ids)
            # The tokens of the last group if the example joins it.
            joined_size = self._num_tokens([*groups[-1], example]) if groups else 0
            if groups and sum(sizes) + min(joined_size - sizes[-1], length) > self.max_tokens:
                yield self.collate(groups)
                groups, sizes = [], []
            if groups and joined_size - sizes[-1] <= length:
                groups[-1].append(example)
                sizes[-1] = joined_size
            else:
                groups.append([example])
                sizes.append(length)
        if groups:
            yield self.collate(groups)

    def collate(self, groups: Sequence[Sequence[Example]]) -> MicroBatch:
        """Pack groups of examples with a common prefix. The examples of a group are sorted by their token ids."""
        input_ids, position_ids, target_positions, layout = [], [], [], []
        num_tokens = 0
        for group in groups:
            prefix = self._prefix_length(group)
            # The last token of an example predicts nothing, so it is dropped.
            suffixes = [example.input_ids[prefix:-1] for example in group]
            input_ids += [group[0].input_ids[:prefix], *suffixes]
            position_ids += [np.arange(prefix), *(np.arange(prefix, prefix + len(suffix)) for suffix in suffixes)]
            layout.append((prefix, [len(suffix) for suffix in suffixes]))
            num_tokens += prefix
            for example, suffix in zip(group, suffixes, strict=True):
                target_positions.append(num_tokens + np.flatnonzero(example.labels[prefix + 1 :] != IGNORE_INDEX))
                num_tokens += len(suffix)
        inputs = {
            "input_ids": _concatenate(input_ids)[None],
            "position_ids": _concatenate(position_ids)[None],
            "layout": PackedLayout.build(layout),
        }
        members = [example for group in groups for example in group]
        return MicroBatch(members, inputs, _concatenate(target_positions), _targets(members))

    def costs(self, examples: Sequence[Example]) -> list[int]:
        """The tokens that each example adds to a packed batch; a prefix common to all is not counted."""
        shared = self._prefix_length(sorted(examples, key=lambda example: example.input_ids.tobytes()))
        return [len(example.input_ids) - shared for example in examples]

    def _num_tokens(self, group: Sequence[Example]) -> int:
        return sum(len(example.input_ids) for example in group) - (len(group) - 1) * self._prefix_length(group)

    def _prefix_length(self, group: Sequence[Example]) -> int:
        """Tokens of the common prefix of a sorted group.

        The last token of a prompt is not shared, because it predicts the first token of the response.
        """
        if len(group) < 2 or not self.share_prefix:
            return 0
        longest = min(example.prompt_length for example in group) - 1
        equal = group[0].input_ids[:longest] == group[-1].input_ids[:longest]
        return int(longest if equal.all() else equal.argmin())


class PaddedBatches:
    """Micro-batches padded on the right to their longest example: exact for every causal architecture.

    Args:
        max_tokens: tokens per micro-batch, including padding; a single longer example is a micro-batch of its own.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens

    def micro_batches(self, examples: Sequence[Example]) -> Iterator[MicroBatch]:
        group: list[Example] = []
        for example in sorted(examples, key=lambda example: len(example.input_ids)):
            if group and (len(group) + 1) * len(example.input_ids) > self.max_tokens:
                yield self.collate(group)
                group = []
            group.append(example)
        if group:
            yield self.collate(group)

    def costs(self, examples: Sequence[Example]) -> list[int]:
        """The tokens of each example, without padding, which depends on the other examples."""
        return [len(example.input_ids) for example in examples]

    def collate(self, group: Sequence[Example]) -> MicroBatch:
        """Pad a group on the right with zeros, which the attention mask excludes."""
        shape = len(group), max(len(example.input_ids) for example in group)
        input_ids, attention_mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        supervised = np.zeros(shape, bool)
        for row, example in enumerate(group):
            length = len(example.input_ids)
            input_ids[row, :length] = example.input_ids
            attention_mask[row, :length] = 1
            supervised[row, : length - 1] = example.labels[1:] != IGNORE_INDEX
        inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}
        return MicroBatch(group, inputs, torch.from_numpy(np.flatnonzero(supervised)), _targets(group))


Batches = PackedBatches | PaddedBatches


def _targets(group: Sequence[Example]) -> torch.Tensor:
    return _concatenate([example.labels[example.labels != IGNORE_INDEX] for example in group])


def _concatenate(parts: Sequence[np.ndarray[Any, Any]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
