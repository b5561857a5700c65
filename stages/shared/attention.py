"""Attention over a flat stream: examples laid end to end in one row, no padding, their common prefix only once.

Padding and repeated prompts are work that changes nothing. In the stream

    [prefix] [rest of example 0] [rest of example 1] ... [another prefix] [rest of example 7] ...

every token attends, causally, to its own example and to the prefix of its group, the examples that begin alike. The
attention itself runs over small padded views of queries, keys and values; all else sees the stream.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from stages.shared.errors import is_out_of_memory

NAME = "flat_stream"
TOLERANCE = 1e-4  # nats a token; fp32 rounding is a hundredth of it, another attention pattern far above
EXAMPLES_PER_BLOCK = 8
# On a CPU two plain matrix multiplications take a third of the fused kernel's time, up to lengths whose score matrices
# would cost more memory than the time is worth.
MATMUL_UP_TO = 512  # tokens


@dataclass(frozen=True)
class Block:
    """A padded view of some examples of a stream that have one prefix.

    prefix: where it lies in the stream.
    rows: int64 (examples, longest rest), the stream position of each token; padding repeats position 0.
    mask: float32 (longest rest, prefix + longest rest), 0 where a query may look and -inf where not, to be added to the
        scores. One mask serves all examples: what pads the shorter ones stands behind all that their queries may see.
    """

    prefix: slice
    rows: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, prefix: slice, rows: torch.Tensor) -> "Block":
        length, longest = prefix.stop - prefix.start, rows.shape[1]
        return cls(prefix, rows, torch.full((longest, length + longest), float("-inf")).triu(length + 1))

    def to(self, device: torch.device) -> "Block":
        return Block(self.prefix, self.rows.to(device), self.mask.to(device))

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head size) → (examples, heads, longest rest, head size)."""
        # Not x[rows]: the gradient of that is several times slower on a CPU.
        return x.index_select(0, self.rows.flatten()).view(*self.rows.shape, *x.shape[1:]).transpose(1, 2)

    def view_after_prefix(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head size) → (examples, heads, prefix + longest rest, head size)."""
        prefix = x[self.prefix].transpose(0, 1).expand(len(self.rows), -1, -1, -1)
        return torch.cat([prefix, self.view(x)], 2)


@dataclass(frozen=True)
class StreamLayout:
    """Where the examples lie in a stream.

    blocks: views of all prefixes and examples, those of similar length together, so that little of them is padding.
    places: int64 (tokens,), where each stream token lies in the flattened rows of all blocks.
    """

    blocks: list[Block]
    places: torch.Tensor

    @classmethod
    def of(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> "StreamLayout":
        """The layout of groups that follow each other: of each the prefix's length and the lengths of its rests."""
        blocks, order, start = [], [], 0
        for prefix_length, rest_lengths in groups:
            prefix = slice(start, start + prefix_length)
            if prefix_length:
                rows = torch.arange(prefix.start, prefix.stop)[None]
                blocks.append(Block.of(slice(start, start), rows))
                order.append(rows.flatten())
            lengths, rows = torch.tensor(rest_lengths), stream_rows(prefix.stop, rest_lengths)
            for members in lengths.argsort(stable=True).split(EXAMPLES_PER_BLOCK):
                block_rows = rows[members, : int(lengths[members].max())]
                blocks.append(Block.of(prefix, block_rows.clamp(min=0)))
                order.append(block_rows.flatten())
            start = prefix.stop + sum(rest_lengths)
        tokens = torch.cat(order)
        real = (tokens >= 0).nonzero().squeeze(1)
        places = torch.empty(start, dtype=torch.int64)
        places[tokens[real]] = real
        return cls(blocks, places)

    def to(self, device: torch.device) -> "StreamLayout":
        return StreamLayout([block.to(device) for block in self.blocks], self.places.to(device))


def stream_rows(start: int, rest_lengths: Sequence[int]) -> torch.Tensor:
    """int64 (examples, longest rest), the stream position of each token from `start` on, -1 where there is none."""
    lengths = torch.tensor(rest_lengths)
    starts = start + lengths.cumsum(0) - lengths
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
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, head size)
    outs = []
    for block in layout.blocks:
        queries, keys, values = block.view(q), block.view_after_prefix(k), block.view_after_prefix(v)
        if query.device.type == "cpu" and keys.shape[2] <= MATMUL_UP_TO:
            out = matmul_attention(queries, keys, values, block.mask, scaling, dropout)
        else:
            # Not enable_gqa: with a mask, no fused kernel of CUDA takes it (huggingface/transformers#39412).
            keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
            mask = block.mask.to(queries.dtype)
            out = scaled_dot_product_attention(queries, keys, values, mask, dropout, scale=scaling)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, layout.places)[None], None


def matmul_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """`scaled_dot_product_attention` with grouped key heads. Queries that share a key head are multiplied at once.

    query: (examples, heads, queries, head size); key and value: (examples, key heads, keys, head size).
    """
    examples, heads, num_queries, size = query.shape
    grouped = examples, key.shape[1], heads // key.shape[1] * num_queries
    scaled = (query * (size**-0.5 if scaling is None else scaling)).reshape(*grouped, size)
    scores = (scaled @ key.transpose(2, 3)).view(examples, heads, num_queries, -1)
    weights = torch.nn.functional.dropout((scores + mask.to(scores.dtype)).softmax(-1), dropout)
    return (weights.to(value.dtype).view(*grouped, -1) @ value).view(query.shape)


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


def flat_is_exact(
    model: PreTrainedModel, padded: Callable[[], torch.Tensor], flat: Callable[[], torch.Tensor]
) -> tuple[bool, str]:
    """Whether a flat stream gives this model the log-probabilities that padding gives, and why not.

    Nothing is taken on trust from the architecture's name: the same is computed both ways, in fp32 and without dropout.
    An attention window that is shorter than an example, or attention of the model's own, shows there.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            expected = padded()
            try:
                difference = float((flat() - expected).abs().max())
            except Exception as error:  # whatever a model does with arguments that it does not know
                if is_out_of_memory(error):
                    raise
                if reset := getattr(model, "reset_iter_state", None):  # sharded: it is still amid the call
                    reset()
                return False, f"this model can't take a flat stream ({type(error).__name__})"
    finally:
        model.train(training)
    return difference <= TOLERANCE, f"a flat stream differs by up to {difference:.2g} nats a token"
