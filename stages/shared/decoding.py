"""Batched generation: answers to prompts, cut at the stop token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from stages.shared.attention import StreamLayout, flat_is_exact, flat_stream, stream_rows
from stages.shared.models import context_length
from stages.shared.terminal import bar

PROMPTS_PER_BATCH = 128
Read = tuple[torch.Tensor, DynamicCache, torch.Tensor]
Reading = Callable[[PreTrainedModel, Sequence[Sequence[int]]], Read]


@dataclass(frozen=True)
class Answer:
    """text: without the stop token. num_tokens: without it, too. stopped: whether it came within max_new_tokens."""

    text: str
    num_tokens: int
    stopped: bool


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stop: int,
    max_new_tokens: int,
    temperature: float = 0,
    top_p: float = 1,
) -> list[Answer]:
    """Answers in the order of `prompts`, which are token ids.

    Args:
        stop: the id of the end token.
        temperature: 0 takes the likeliest token each time.
    """
    sampling = None
    if temperature:
        sampling = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
    read = choose_reading(model, prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    new_ids: dict[int, list[int]] = {}
    for start in range(0, len(order), PROMPTS_PER_BATCH):
        indices = order[start : start + PROMPTS_PER_BATCH]
        batch = [prompts[index] for index in indices]
        rows = generate_batch(model, batch, stop, max_new_tokens, sampling, read)
        new_ids |= dict(zip(indices, rows, strict=True))

    answers = []
    for index in range(len(prompts)):
        stopped = new_ids[index][-1] == stop
        kept = new_ids[index][:-1] if stopped else new_ids[index]
        text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        answers.append(Answer(str(text).strip(), len(kept), stopped))
    return answers


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stop: int,
    max_new_tokens: int,
    sampling: LogitsProcessorList | None,
    read: Reading,
) -> list[list[int]]:
    """The new token ids of each prompt, with `stop` as the last where it came.

    Unlike `model.generate`, rows that have stopped leave the batch: what goes on pays for nobody else (a fifth of the
    time where one answer in twenty never stops).
    """
    logits, cache, mask = read(model, prompts)
    context = context_length(model)
    new_ids: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for num_new in bar(range(1, max_new_tokens + 1), f"answer {len(prompts):,} prompts", "token"):
        if sampling is None:
            chosen = logits.argmax(-1)
        else:
            warped = sampling(torch.LongTensor(), logits.float())  # neither warper looks at the tokens so far
            chosen = torch.multinomial(warped.softmax(-1), 1).squeeze(1)
        for row, token in zip(going, chosen.tolist(), strict=True):
            new_ids[row].append(token)
        keep = (chosen != stop) & (mask.sum(1) < context)  # an answer that fills the context ends there
        going = [row for row, goes_on in zip(going, keep.tolist(), strict=True) if goes_on]
        if not going or num_new == max_new_tokens:
            break
        if not keep.all():
            cache.batch_select_indices(keep)
            mask = mask[keep]
        positions = mask.sum(1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(going), 1)], 1)
        logits = model(
            input_ids=chosen[keep, None], attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits[:, -1]
    return new_ids


def choose_reading(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Reading:
    """`read_flat` where it is exact for this model, else `read_padded`."""
    probe = [max(prompts, key=len), prompts[0]]
    exact, _ = flat_is_exact(
        model,
        lambda: read_padded(model, probe)[0].float().log_softmax(-1),
        lambda: read_flat(model, probe)[0].float().log_softmax(-1),
    )
    return read_flat if exact else read_padded


def read_padded(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Read:
    """Logits after the last prompt token (prompts, vocabulary), keys and values, attention mask (prompts, tokens)."""
    # Left padding puts the last prompt token of all rows into the last column.
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    output = model(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
    )
    return output.logits[:, -1], cache, mask


def read_flat(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Read:
    """The same from a flat stream (see `attention`): no padding, what all prompts begin with is computed once."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    prefix = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    lengths = [len(prompt) - prefix for prompt in prompts]
    stream = list(prompts[0][:prefix]) + [token for prompt in prompts for token in prompt[prefix:]]
    positions = [*range(prefix)] + [position for prompt in prompts for position in range(prefix, len(prompt))]
    cache = DynamicCache(config=model.config)
    with flat_stream(model):
        output = model(
            input_ids=torch.tensor([stream], device=model.device),
            position_ids=torch.tensor([positions], device=model.device),
            past_key_values=cache,
            logits_to_keep=(torch.tensor(lengths).cumsum(0) + prefix - 1).to(model.device),
            layout=StreamLayout.of([(prefix, lengths)]).to(model.device),
        )
    # From the stream to a row for each prompt: the prefix, its own tokens, and what is never looked at.
    rows = stream_rows(prefix, lengths)
    rows = torch.cat([torch.arange(prefix).expand(len(rows), -1), rows], 1).to(model.device)
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.keys, layer.values = (x[0][:, rows.clamp(min=0)].transpose(0, 1) for x in (layer.keys, layer.values))
    return output.logits[0], cache, (rows >= 0).long()
