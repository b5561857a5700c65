"""Prompt and response → `input_ids`, `labels`: what the model sees, and which of it is trained."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.shared.examples import NOT_SUPERVISED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """input_ids and labels have one length; labels are -100 on the prompt, the id itself on response and end token."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


def encode_prompts(tokenizer: "PreTrainedTokenizerBase", prompts: list[str]) -> list[list[int]]:
    """Token ids of prompts as they stand before a response, in training and in generation alike.

    One BOS, where the tokenizer itself puts one. Text can't become special tokens.
    """
    return [_bos(tokenizer) + ids for ids in _tokenize(tokenizer, prompts)]


def encode_examples(
    tokenizer: "PreTrainedTokenizerBase", prompts: list[str], responses: list[str], max_length: int
) -> list[Encoded | None]:
    """Tokenise prompts and responses apart and join them, so that the boundary is exact and that of inference.

    Labels come from where the response lies, never from token ids: so the end token is trained even where the
    tokenizer pads with it. What is longer than `max_length` loses the end of its response, end token included.

    Returns:
        None where the prompt leaves no room for a supervised token.
    """
    encoded: list[Encoded | None] = []
    for prompt, response in zip(encode_prompts(tokenizer, prompts), _tokenize(tokenizer, responses), strict=True):
        target = [*response, tokenizer.eos_token_id]
        kept = target[: max(max_length - len(prompt), 0)]
        labels = [NOT_SUPERVISED] * len(prompt) + kept
        encoded.append(Encoded(prompt + kept, labels, truncated=len(kept) < len(target)) if kept else None)
    return encoded


def _tokenize(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    ids: list[list[int]] = tokenizer(texts, verbose=False, **options)["input_ids"]
    return ids


def _bos(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    start: list[int] = tokenizer("")["input_ids"][:1]
    return start if tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id] else []
