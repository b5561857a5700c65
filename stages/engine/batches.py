"""An effective batch → micro-batches of tensors.

The loss is summed over supervised tokens and divided once by their number in the effective batch. So the division into
micro-batches never changes the gradient and can be chosen for speed.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import recursively_apply, send_to_device
from torch.nn.utils.rnn import pad_sequence

from stages.data.examples import IGNORE_INDEX, Example
from stages.engine.attention import PackedLayout
from stages.engine.varlen import VarlenLayout

# Logits of a micro-batch, supervised tokens × vocabulary, by device. An fp32 copy takes 128 MiB, or 1 GiB on a GPU,
# which is only busy with large micro-batches.
MAX_LOGITS = {"cpu": 2**25, "mps": 2**25, "cuda": 2**28}
# Each example of a micro-batch has its own copy of the keys of a shared prefix. Keys take far less memory than the
# other activations, but without a limit many short examples with a long prefix would not fit.
KEYS_PER_TOKEN = 4


class MicroBatch(NamedTuple):
    """The inputs of one forward pass, and its targets.

    inputs: arguments of the model's `forward`; the tensors are (rows, time).
    columns: int64 (columns,), the positions in a row whose logits are needed.
    labels: int64 (rows, columns), the token ids to predict; -100 where not supervised.
    """

    examples: Sequence[Example]
    inputs: dict[str, Any]
    columns: torch.Tensor
    labels: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Computed tokens, without padding."""
        mask = self.inputs.get("attention_mask")
        return int(self.inputs["input_ids"].numel() if mask is None else mask.sum())

    def pin_memory(self) -> "MicroBatch":
        """The same in page-locked memory, from which a GPU copies while it computes."""
        return MicroBatch(*recursively_apply(torch.Tensor.pin_memory, tuple(self)))

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(*send_to_device(tuple(self), device, non_blocking=device.type == "cuda"))


def shuffled_batches(
    examples: Sequence[Example], batch_size: int, seed: int, epoch: int, first: int = 0
) -> Iterator[list[Example]]:
    """The effective batches of an epoch from number `first` on; the last one may be smaller.

    The order is that of a seeded hash of each example's id. So adding or removing examples keeps the order of the
    others, and a review can pair two runs by their seed. Memory: 16 bytes per example.
    """
    texts = (f"{seed}:{epoch}:{example.example_id}".encode() for example in examples)
    positions = (int.from_bytes(hashlib.sha256(text).digest()[:8]) for text in texts)
    order = np.fromiter(positions, np.uint64, len(examples)).argsort(kind="stable")
    for start in range(first * batch_size, len(examples), batch_size):
        yield [examples[index] for index in order[start : start + batch_size]]


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


@dataclass(frozen=True)
class Limits:
    """The limits of a micro-batch. An example that exceeds one by itself is a micro-batch of its own.

    tokens: computed tokens, including padding.
    supervised: supervised tokens, because their logits take most of the memory.
    """

    tokens: int
    supervised: int


NO_LIMITS = Limits(sys.maxsize, sys.maxsize)


@dataclass(frozen=True)
class PackedBatches:
    """Micro-batches of packed examples: no padding, and a common prefix is computed once (see `attention`).

    share_prefix: False with dropout, because all examples would share one dropout mask.
    layout: how attention is computed; `VarlenLayout` is faster, but only for GPUs in half precision.
    """

    limits: Limits
    share_prefix: bool = True
    layout: type[PackedLayout] | type[VarlenLayout] = PackedLayout

    def micro_batches(self, examples: Sequence[Example]) -> Iterator[MicroBatch]:
        groups: list[list[Example]] = []
        prefix = 0  # tokens of the common prefix of the last group; one example is its own prefix
        tokens = keys = supervised = 0  # of the micro-batch
        # In this order, examples with a common prefix are adjacent, and the first and the last example of a group have
        # the shortest common prefix.
        for example in sorted(examples, key=lambda example: example.input_ids.tobytes()):
            length = len(example.input_ids)
            shared = added = length
            if groups:
                shared = min(prefix, self._prefix_length([groups[-1][0], example]))
                # More than its own tokens if the common prefix gets shorter.
                added = length - shared + (len(groups[-1]) - 1) * (prefix - shared)
            joins = bool(groups) and added <= length
            if groups and (
                tokens + min(added, length) > self.limits.tokens
                or keys + length > KEYS_PER_TOKEN * self.limits.tokens
                or supervised + example.num_supervised > self.limits.supervised
            ):
                yield self.collate(groups)
                groups, joins, tokens, keys, supervised = [], False, 0, 0, 0
            if joins:
                groups[-1].append(example)
            else:
                groups.append([example])
                shared = added = length
            prefix = shared
            tokens += added
            keys += length
            supervised += example.num_supervised
        if groups:
            yield self.collate(groups)

    def collate(self, groups: Sequence[Sequence[Example]]) -> MicroBatch:
        """Pack groups of examples with a common prefix. The examples of a group are sorted by their token ids."""
        input_ids, position_ids, target_positions, lengths = [], [], [], []
        num_tokens = 0
        for group in groups:
            prefix = self._prefix_length(group)
            # The last token of an example predicts nothing, so it is dropped.
            suffixes = [example.input_ids[prefix:-1] for example in group]
            input_ids += [group[0].input_ids[:prefix], *suffixes]
            position_ids += [np.arange(prefix), *(np.arange(prefix, prefix + len(suffix)) for suffix in suffixes)]
            lengths.append((prefix, [len(suffix) for suffix in suffixes]))
            num_tokens += prefix
            for example, suffix in zip(group, suffixes, strict=True):
                target_positions.append(num_tokens + np.flatnonzero(example.labels[prefix + 1 :] != IGNORE_INDEX))
                num_tokens += len(suffix)
        inputs = {
            "input_ids": _concatenate(input_ids)[None],
            "position_ids": _concatenate(position_ids)[None],
            "layout": self.layout.build(lengths),
        }
        members = [example for group in groups for example in group]
        labels = [example.labels[example.labels != IGNORE_INDEX] for example in members]
        return MicroBatch(members, inputs, _concatenate(target_positions), _concatenate(labels)[None])

    def costs(self, examples: Sequence[Example]) -> list[int]:
        """The tokens that each example adds to a packed batch; a prefix common to all is not counted."""
        shared = self._prefix_length(sorted(examples, key=lambda example: example.input_ids.tobytes()))
        return [len(example.input_ids) - shared for example in examples]

    def _prefix_length(self, group: Sequence[Example]) -> int:
        """Tokens of the common prefix of a sorted group.

        The last token of a prompt is not shared, because it predicts the first token of the response.
        """
        if len(group) < 2 or not self.share_prefix:
            return 0
        longest = min(example.prompt_length for example in group) - 1
        equal = group[0].input_ids[:longest] == group[-1].input_ids[:longest]
        return int(longest if equal.all() else equal.argmin())


@dataclass(frozen=True)
class PaddedBatches:
    """Micro-batches padded on the right to their longest example: exact for almost every causal architecture."""

    limits: Limits

    def micro_batches(self, examples: Sequence[Example]) -> Iterator[MicroBatch]:
        group: list[Example] = []
        for example in sorted(examples, key=lambda example: len(example.input_ids)):
            if group and self._exceeds_limits([*group, example]):
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
        rows = [torch.tensor(example.input_ids, dtype=torch.int64) for example in group]
        shifted = [torch.tensor(example.labels[1:], dtype=torch.int64) for example in group]  # of the token before
        labels = pad_sequence(shifted, batch_first=True, padding_value=IGNORE_INDEX)
        columns = (labels != IGNORE_INDEX).any(0).nonzero().squeeze(1)
        inputs = {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        }
        return MicroBatch(group, inputs, columns, labels[:, columns])

    def _exceeds_limits(self, group: Sequence[Example]) -> bool:
        """Whether a group, sorted by length, exceeds a limit."""
        longest = len(group[-1].input_ids)
        num_columns = longest - min(example.prompt_length for example in group)
        return len(group) * longest > self.limits.tokens or len(group) * num_columns > self.limits.supervised


Batches = PackedBatches | PaddedBatches


def _concatenate(parts: Sequence[np.ndarray[Any, Any]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
