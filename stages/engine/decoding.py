"""Batched generation: prompts → answers, up to the EOS token."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from stages.engine.attention import use_packed_attention
from stages.engine.kv_cache import CachedRows
from stages.engine.models import context_length, probing
from stages.runtime.errors import UserError, is_out_of_memory
from stages.runtime.terminal import progress

if TYPE_CHECKING:
    from stages.templates.answer_parts import AnswerParser, AnswerParts

# Per token of a micro-batch in training. The keys and values of a token take a twentieth of the memory of all its
# activations, or less with grouped heads. A CPU has room for more, and large batches are faster.
CACHED_TOKENS = {"cpu": 40, "mps": 20, "cuda": 20}
PROBE_TOKENS = 4  # decoded to find out whether a method is exact
TOLERANCE = 1e-4  # of a logit, absolute and relative; fp32 rounding gives a tenth of this
TokenIds = Sequence[int]


@dataclass(frozen=True)
class NewTokens:
    """The new token ids of a prompt, ending with an EOS token if one was generated, and the highest logits."""

    ids: list[int]
    top_logits: list[float]

    def until(self, stop_ids: Sequence[int]) -> "NewTokens":
        """The tokens up to and including the first one with one of these ids; all of them if none has."""
        length = next((at + 1 for at, token in enumerate(self.ids) if token in stop_ids), len(self.ids))
        return NewTokens(self.ids[:length], self.top_logits[:length])

    def agrees_with(self, other: "NewTokens") -> bool:
        return self.ids == other.ids and np.allclose(self.top_logits, other.top_logits, TOLERANCE, TOLERANCE)


# Model, prompts and settings → the new tokens of each prompt.
Method = Callable[[PreTrainedModel, Sequence[TokenIds], GenerationConfig], list[NewTokens]]


@dataclass(frozen=True)
class Answer:
    """One answer.

    num_tokens: without the EOS token.
    stopped: whether EOS was generated within `max_new_tokens`.
    """

    parts: "AnswerParts"
    num_tokens: int
    stopped: bool


def generation_settings(
    eos_token_ids: Sequence[int], max_new_tokens: int, temperature: float = 0, top_p: float = 1
) -> GenerationConfig:
    """Settings for the library's `generate`. A temperature of 0 always takes the most likely token.

    Args:
        eos_token_ids: the tokens that end an answer; none: an answer has `max_new_tokens`.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=next(iter(eos_token_ids), 0),
        **(sampling if temperature else {"do_sample": False}),
    )


def within_context(settings: GenerationConfig, model: PreTrainedModel, prompt: TokenIds) -> GenerationConfig:
    """The settings, with fewer new tokens if the context would be full. The last new token needs no position."""
    limited = copy(settings)
    limited.max_new_tokens = min(settings.max_new_tokens, context_length(model) - len(prompt) + 1)
    return limited


def generate_answers(
    model: PreTrainedModel,
    parser: "AnswerParser",
    prompts: Sequence[TokenIds],
    settings: GenerationConfig,
    tokens_per_batch: int,
    method: str,
) -> list[Answer]:
    """Generate answers, in the order of `prompts`, which are token ids; see `generate`."""
    answers = []
    for prompt, new_ids in zip(prompts, generate(model, prompts, settings, tokens_per_batch, method), strict=True):
        stopped = new_ids[-1] in (settings.eos_token_id or [])
        kept = new_ids[:-1] if stopped else new_ids
        answers.append(Answer(parser.read(prompt, kept, new_ids[len(kept) :]), len(kept), stopped))
    if parser.num_unmatched:
        print(
            f"{parser.num_unmatched:,} of {len(answers):,} answers do not match the tokenizer's response_template; "
            "their whole text is the final text"
        )
    return answers


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    settings: GenerationConfig,
    tokens_per_batch: int,
    method: str,
) -> list[list[int]]:
    """The new token ids of each prompt, ending with EOS if it was generated.

    An answer also ends when the model's context is full.

    Args:
        tokens_per_batch: tokens of the largest micro-batch in training, from which the size of batches is derived.
        method: see `choose_method`.
    """
    new_ids: dict[int, list[int]] = {}
    for indices in batches_of_prompts(
        prompts, settings.max_new_tokens, CACHED_TOKENS[model.device.type] * tokens_per_batch
    ):
        rows = METHODS[method](model, [prompts[index] for index in indices], settings)
        new_ids |= {index: row.ids for index, row in zip(indices, rows, strict=True)}
    return [new_ids[index] for index in range(len(prompts))]


def batches_of_prompts(prompts: Sequence[TokenIds], max_new_tokens: int, max_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts, the shortest first, in batches of at most `max_tokens` with padding and new tokens."""
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        if batch and (len(batch) + 1) * (len(prompts[index]) + max_new_tokens) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def choose_method(model: PreTrainedModel, prompts: Sequence[TokenIds], max_new_tokens: int) -> str:
    """The fastest of `METHODS` that decodes as the library's `generate` does for single prompts.

    A few tokens are decoded in fp32, and tokens and logits are compared. One answer ends before the others if possible,
    because some caches can't drop a row. The longest prompt is extended by `max_new_tokens`, because attention can
    change with the length, as with a sliding window.

    Returns:
        Its name, which is also printed.
    """
    length = min(max(map(len, prompts)) + max_new_tokens, context_length(model) - PROBE_TOKENS)
    shortest, *_, longest = sorted([prompts[0], *prompts], key=len)
    probe = [list(islice(cycle(longest), length)), shortest[:length]]
    with probing(model):
        endless = generate_alone(model, probe, generation_settings([], PROBE_TOKENS))
        tokens = (token for row in endless for token in row.ids[1:-1])
        early = next(([token] for token in tokens if len({len(row.until([token]).ids) for row in endless}) > 1), [])
        for name, method in METHODS.items():
            try:
                rows = method(model, probe, generation_settings(early, PROBE_TOKENS))
            except Exception as error:  # a model can raise anything for arguments that it does not know
                if is_out_of_memory(error):
                    raise
                continue
            if all(row.agrees_with(other.until(early)) for row, other in zip(rows, endless, strict=True)):
                print(f"Generation: {name}", flush=True)
                return name
    raise UserError("this model's answers differ from call to call; set model_name to another model")


def generate_packed(model: PreTrainedModel, prompts: Sequence[TokenIds], settings: GenerationConfig) -> list[NewTokens]:
    """Prefill packed prompts (see `attention`), then decode; an answer that has ended is dropped from the batch.

    If one answer in twenty never stops, this takes a fifth of the time of `generate_padded`.
    """
    warpers = LogitsProcessorList()
    if settings.do_sample:
        warpers += [TemperatureLogitsWarper(settings.temperature), TopPLogitsWarper(settings.top_p)]
    context = context_length(model)
    room = min(settings.max_new_tokens - 1, context - min(map(len, prompts)))
    cache = CachedRows(prompts, room, model.device)
    with use_packed_attention(model):
        logits = model(**cache.prompt_inputs(), use_cache=False).logits[0]
        lengths = torch.tensor([len(prompts[index]) for index in cache.order], device=model.device)
        eos_token_ids = torch.tensor(settings.eos_token_id or [], device=model.device)
        rows = [NewTokens([], []) for _ in prompts]
        active = [rows[index] for index in cache.order]
        for num_new in progress(range(1, settings.max_new_tokens + 1), f"answer {len(prompts):,} prompts", "token"):
            top_logits, chosen = logits.max(-1)
            if settings.do_sample:
                warped = warpers(torch.LongTensor(), logits.float())  # neither warper looks at the previous tokens
                chosen = torch.multinomial(warped.softmax(-1), 1).squeeze(1)
            for row, token, logit in zip(active, chosen.tolist(), top_logits.tolist(), strict=True):
                row.ids.append(token)
                row.top_logits.append(logit)
            kept = ~torch.isin(chosen, eos_token_ids) & (lengths < context)
            if not kept.any() or num_new == settings.max_new_tokens:
                break
            if not kept.all():
                order = cache.keep(kept)
                chosen, lengths = chosen[order], lengths[order]
                active = [active[index] for index in order.tolist()]
            logits = model(**cache.token_inputs(chosen, lengths), use_cache=False).logits[0]
            lengths = lengths + 1
    return rows


def generate_padded(model: PreTrainedModel, prompts: Sequence[TokenIds], settings: GenerationConfig) -> list[NewTokens]:
    """The library's `generate` for prompts padded on the left."""
    width = max(map(len, prompts))
    if width + settings.max_new_tokens - 1 > context_length(model):
        return generate_alone(model, prompts, settings)  # a full context would end all rows
    rows = [[settings.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    masks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return _generate(model, rows, masks, settings)


def generate_alone(model: PreTrainedModel, prompts: Sequence[TokenIds], settings: GenerationConfig) -> list[NewTokens]:
    """The library's `generate` for one prompt at a time."""
    rows = []
    for prompt in progress(prompts, f"answer {len(prompts):,} prompts", "prompt"):
        rows += _generate(model, [prompt], [[1] * len(prompt)], within_context(settings, model, prompt))
    return rows


METHODS: dict[str, Method] = {  # the fastest first
    "packed prompts": generate_packed,
    "padded prompts": generate_padded,
    "one prompt at a time": generate_alone,
}


def _generate(
    model: PreTrainedModel, rows: Sequence[TokenIds], masks: Sequence[Sequence[int]], settings: GenerationConfig
) -> list[NewTokens]:
    input_ids, attention_mask = torch.tensor([rows, masks], device=model.device)
    top_logits: list[torch.Tensor] = []

    def record(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        top_logits.append(logits.max(-1).values)
        return logits

    output: torch.Tensor = model.generate(  # type: ignore[operator]
        input_ids=input_ids, attention_mask=attention_mask, generation_config=settings, logits_processor=[record]
    )
    new_ids = output[:, input_ids.shape[1] :].tolist()
    columns = torch.stack(top_logits, 1).tolist()
    return [NewTokens(*row).until(settings.eos_token_id or []) for row in zip(new_ids, columns, strict=True)]
