"""Runs of tokens, masked and supervised in turn → `input_ids`, `labels`: what the model sees, and what is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stages.shared.errors import reading
from stages.shared.examples import NOT_SUPERVISED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Examples end to end.

    input_ids: int32 (tokens,).
    labels: int32 (tokens,), -100 where masked, the id itself where supervised.
    lengths: int64 (examples,), tokens of each; 0 where no supervised token has room.
    responses: int64 (examples,), supervised runs that have room, the last maybe for its beginning alone.
    truncated: bool (examples,), whether supervised tokens were cut.
    """

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    responses: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]


def mask(examples: Sequence[Sequence[list[int]]], max_length: int) -> Encoded:
    """Join the runs of each example. Its first run is masked, its second supervised, and so on, in turn.

    Labels come from where a run lies, never from token ids: so the end token is trained even where the tokenizer pads
    with it. What is longer than `max_length` is cut; what then follows the last supervised token is no use and goes.

    Example:
        >>> mask([[[5, 6], [7, 2]]], max_length=3).labels
        array([-100, -100,    7], dtype=int32)
    """
    kept: list[list[int]] = []  # tokens of each run
    for runs in examples:
        room = max_length
        lengths = []
        for run in runs:
            lengths.append(min(len(run), room))
            room -= lengths[-1]
        kept.append(lengths[: 2 * sum(length > 0 for length in lengths[1::2])])
    pairs = list(zip(examples, kept, strict=True))
    joined = (run[:length] for runs, lengths in pairs for run, length in zip(runs, lengths, strict=False))
    num_tokens = np.fromiter(map(sum, kept), np.int64, len(kept))
    input_ids = np.fromiter(chain.from_iterable(joined), np.int32, num_tokens.sum())
    run_lengths = np.fromiter(chain.from_iterable(kept), np.int64)
    supervised = np.repeat(np.tile([False, True], len(run_lengths) // 2), run_lengths)
    labels = np.where(supervised, input_ids, np.int32(NOT_SUPERVISED))
    responses = np.fromiter((len(lengths) // 2 for lengths in kept), np.int64, len(kept))
    truncated = [sum(lengths[1::2]) < sum(map(len, runs[1::2])) for runs, lengths in pairs]
    return Encoded(input_ids, labels, num_tokens, responses, np.array(truncated, bool))


def tokenize(tokenizer: "PreTrainedTokenizerBase", texts: list[str], special: bool) -> list[list[int]]:
    """Token ids of texts, without what a tokenizer would put around them.

    Args:
        special: whether what looks like a special token is one. In text from the data it must not be.
    """
    if tokenizer.is_fast:
        # What a call of the tokenizer comes to, without the text positions that nobody asks for: 1.6 times as fast.
        backend = tokenizer.backend_tokenizer
        if backend.padding or backend.truncation or backend.encode_special_tokens is special:
            backend.no_padding()
            backend.no_truncation()
            backend.encode_special_tokens = not special
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, split_special_tokens=not special)["input_ids"]
    return ids


def load_tokenizer(folder: Path = Path("models/tokenizer")) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    with reading(folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer
