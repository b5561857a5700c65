"""An effective batch → micro-batches of tensors.

The loss is a sum over supervised tokens, divided once by their number in the effective batch. So how a batch is cut
never changes the gradient, and it is cut for speed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.shared.attention import StreamLayout
from stages.shared.examples import NOT_SUPERVISED, Example


@dataclass(frozen=True)
class MicroBatch:
    """What the model is called with, and where its output is supervised.

    inputs: arguments of the model's `forward`.
    select: int64 (supervised tokens,), places in the output with batch and time flattened.
    targets: int64 (supervised tokens,), the token ids to predict there.
    """

    examples: Sequence[Example]
    inputs: dict[str, Any]
    select: torch.Tensor
    targets: torch.Tensor


def shuffle(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[list[Example]]:
    """The effective batches of an epoch: a seeded shuffle, cut every `batch_size` examples; the last may be smaller."""
    order = np.random.default_rng([seed, epoch]).permutation(len(examples))
    return [[examples[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]


def deal(costs: Sequence[int], num_hands: int) -> list[list[int]]:
    """Share out examples: the costliest first, each to whoever has the least. Returns the examples' places by hand.

    Example:
        >>> deal([3, 9, 4, 1], 2)
        [[1], [2, 0, 3]]
    """
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    loads = [0] * num_hands
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        least = loads.index(min(loads))
        hands[least].append(place)
        loads[least] += costs[place]
    return hands


class FlatBatches:
    """Micro-batches without padding: examples end to end, what a group of them begins with once (see `attention`).

    Args:
        max_tokens: what a micro-batch may compute, unless one example alone is longer.
        share_prefix: False where dropout is on, which would drop the same in all examples.
    """

    def __init__(self, max_tokens: int, share_prefix: bool = True):
        self.max_tokens = max_tokens
        self.share_prefix = share_prefix

    def cut(self, examples: Sequence[Example]) -> Iterator[MicroBatch]:
        groups: list[list[Example]] = []
        sizes: list[int] = []  # tokens of each group
        # In this order those that begin alike are neighbours, and the first and the last of a group differ the most.
        for example in sorted(examples, key=lambda example: example.input_ids.tobytes()):
            alone = len(example.input_ids)
            joined = self._num_tokens([*groups[-1], example]) if groups else 0
            if groups and sum(sizes) + min(joined - sizes[-1], alone) > self.max_tokens:
                yield self.collate(groups)
                groups, sizes = [], []
            if groups and joined - sizes[-1] <= alone:
                groups[-1].append(example)
                sizes[-1] = joined
            else:
                groups.append([example])
                sizes.append(alone)
        if groups:
            yield self.collate(groups)

    def collate(self, groups: Sequence[Sequence[Example]]) -> MicroBatch:
        """A stream of groups, the examples of each sorted by their token ids."""
        input_ids, position_ids, select, layout = [], [], [], []
        num_tokens = 0
        for group in groups:
            prefix = self._prefix_length(group)
            # The last token of an example predicts nothing: it is not computed.
            rests = [example.input_ids[prefix:-1] for example in group]
            input_ids += [group[0].input_ids[:prefix], *rests]
            position_ids += [np.arange(prefix), *(np.arange(prefix, prefix + len(rest)) for rest in rests)]
            layout.append((prefix, [len(rest) for rest in rests]))
            num_tokens += prefix
            for example, rest in zip(group, rests, strict=True):
                select.append(num_tokens + np.flatnonzero(example.labels[prefix + 1 :] != NOT_SUPERVISED))
                num_tokens += len(rest)
        inputs = {
            "input_ids": _row(input_ids)[None],
            "position_ids": _row(position_ids)[None],
            "layout": StreamLayout.of(layout),
        }
        members = [example for group in groups for example in group]
        return MicroBatch(members, inputs, _row(select), _targets(members))

    def costs(self, examples: Sequence[Example]) -> list[int]:
        """The tokens that each example adds to a stream: those that all begin with are computed once."""
        shared = self._prefix_length(sorted(examples, key=lambda example: example.input_ids.tobytes()))
        return [len(example.input_ids) - shared for example in examples]

    def _num_tokens(self, group: Sequence[Example]) -> int:
        return sum(len(example.input_ids) for example in group) - (len(group) - 1) * self._prefix_length(group)

    def _prefix_length(self, group: Sequence[Example]) -> int:
        """Prompt tokens that all begin with. The last prompt token predicts the first of the response: never shared."""
        if len(group) < 2 or not self.share_prefix:
            return 0
        longest = min(example.prompt_length for example in group) - 1
        equal = group[0].input_ids[:longest] == group[-1].input_ids[:longest]
        return int(longest if equal.all() else equal.argmin())


class PaddedBatches:
    """Micro-batches padded on the right to their longest example: exact for every causal architecture.

    Args:
        max_tokens: what a micro-batch may compute, padding included, unless one example alone is longer.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens

    def cut(self, examples: Sequence[Example]) -> Iterator[MicroBatch]:
        group: list[Example] = []
        for example in sorted(examples, key=lambda example: len(example.input_ids)):
            if group and (len(group) + 1) * len(example.input_ids) > self.max_tokens:
                yield self.collate(group)
                group = []
            group.append(example)
        if group:
            yield self.collate(group)

    def costs(self, examples: Sequence[Example]) -> list[int]:
        """The tokens of each example; how much padding it takes depends on its neighbours."""
        return [len(example.input_ids) for example in examples]

    def collate(self, group: Sequence[Example]) -> MicroBatch:
        shape = len(group), max(len(example.input_ids) for example in group)
        input_ids, attention_mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        supervised = np.zeros(shape, bool)
        for row, example in enumerate(group):
            length = len(example.input_ids)
            input_ids[row, :length] = example.input_ids
            attention_mask[row, :length] = 1
            supervised[row, : length - 1] = example.labels[1:] != NOT_SUPERVISED
        inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}
        return MicroBatch(group, inputs, torch.from_numpy(np.flatnonzero(supervised)), _targets(group))


Batches = FlatBatches | PaddedBatches


def _targets(group: Sequence[Example]) -> torch.Tensor:
    return _row([example.labels[example.labels != NOT_SUPERVISED] for example in group])


def _row(parts: Sequence[np.ndarray[Any, Any]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
