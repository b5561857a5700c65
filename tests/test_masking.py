"""Masks: what is trained, to the token."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.shared.masking import mask, tokenize
from stages.shared.templates import AlpacaTemplate


@dataclass
class One:
    """One encoded example."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


class Words:
    """A tokenizer of white-space-separated numbers, so that the ids stand in the text."""

    is_fast = False
    eos_token_id = 2
    bos_token_id: int | None = None

    def __call__(self, texts: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        if isinstance(texts, str):
            return {"input_ids": start + [int(word) for word in texts.split()]}
        return {"input_ids": [start + [int(word) for word in text.split()] for text in texts]}


class WordsWithBos(Words):
    bos_token_id = 1


def encode(tokenizer: Any, prompt: str, response: str, max_length: int = 99) -> One | None:
    encoded = mask(AlpacaTemplate(tokenizer).encode([prompt], [response]), max_length)
    assert encoded.lengths.tolist() == [len(encoded.input_ids)] == [len(encoded.labels)]
    if not encoded.lengths[0]:
        return None
    return One(encoded.input_ids.tolist(), encoded.labels.tolist(), encoded.truncated.item())


def test_prompt_tokens_are_not_trained_and_the_end_token_is() -> None:
    assert encode(Words(), "5 6 7", "8 9") == One([5, 6, 7, 8, 9, 2], [-100, -100, -100, 8, 9, 2], truncated=False)


def test_labels_come_from_spans_not_from_ids() -> None:
    # The end token's id inside the prompt is masked, inside the response it is trained.
    assert encode(Words(), "2 5", "2 8") == One([2, 5, 2, 8, 2], [-100, -100, 2, 8, 2], truncated=False)


def test_one_bos_stands_before_the_prompt_and_is_not_trained() -> None:
    assert encode(WordsWithBos(), "5", "8") == One([1, 5, 8, 2], [-100, -100, 8, 2], truncated=False)


def test_truncation_cuts_the_responses_end() -> None:
    assert encode(Words(), "5 6", "7 8 9", 4) == One([5, 6, 7, 8], [-100, -100, 7, 8], truncated=True)


def test_losing_only_the_end_token_is_a_truncation() -> None:
    assert encode(Words(), "5 6", "7 8", 4) == One([5, 6, 7, 8], [-100, -100, 7, 8], truncated=True)
    assert encode(Words(), "5 6", "7 8", 5) == One([5, 6, 7, 8, 2], [-100, -100, 7, 8, 2], truncated=False)


def test_at_least_one_token_is_supervised_or_the_example_is_left_out() -> None:
    assert encode(Words(), "5 6 7", "8 9", 4) == One([5, 6, 7, 8], [-100, -100, -100, 8], truncated=True)
    assert encode(Words(), "5 6 7", "8 9", 3) is None
    assert encode(Words(), "5 6 7", "8 9", 2) is None


def test_examples_lie_end_to_end() -> None:
    encoded = mask([[[5, 6], [7, 2]], [[5, 6, 7, 8], [9, 2]], [[5], [8, 9, 3, 2]]], 4)
    assert encoded.input_ids.tolist() == [5, 6, 7, 2, 5, 8, 9, 3]
    assert encoded.labels.tolist() == [-100, -100, 7, 2, -100, 8, 9, 3]
    assert encoded.lengths.tolist() == [4, 0, 4]
    assert encoded.responses.tolist() == [1, 0, 1]
    assert encoded.truncated.tolist() == [False, True, True]


def test_each_response_of_a_conversation_is_supervised_and_what_follows_the_last_goes() -> None:
    conversation = [[5, 6], [7, 2], [5, 8], [9, 2]]
    for max_length, labels in [
        (9, [-100, -100, 7, 2, -100, -100, 9, 2]),
        (7, [-100, -100, 7, 2, -100, -100, 9]),
        (6, [-100, -100, 7, 2]),
        (3, [-100, -100, 7]),
        (2, []),
    ]:
        encoded = mask([conversation], max_length)
        assert encoded.labels.tolist() == labels
        assert encoded.input_ids.tolist() == [5, 6, 7, 2, 5, 8, 9, 2][: len(labels)]
        assert encoded.truncated.tolist() == [max_length < 8]
        assert encoded.responses.tolist() == [(len(labels) > 0) + (len(labels) > 6)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def test_text_can_not_become_a_special_token(tokenizer: Any) -> None:
    encoded = encode(tokenizer, "Say <|end|>", "No <|end|>")
    assert encoded is not None
    assert encoded.input_ids.count(0) == 1  # the end token that we put
    assert encoded.input_ids[-1] == 0
    assert tokenizer.decode(encoded.input_ids[:-1]) == "Say <|end|>No <|end|>"


def test_ids_are_those_of_a_call_of_the_tokenizer(tokenizer: Any) -> None:
    text = "Name a colour. <|end|> 🐎\u202e\x00 ### Response:"
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=2)  # leaves its settings behind
    expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(expected) > 10
    assert tokenize(tokenizer, [text, "a"], special=False)[0] == expected


unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=200, deadline=None)
@given(prompt=unicode_text, response=unicode_text, max_length=st.integers(2, 80))
def test_any_text_keeps_its_boundary(tokenizer: Any, prompt: str, response: str, max_length: int) -> None:
    whole = encode(tokenizer, prompt, response, 100_000)
    assert whole is not None
    (prompt_ids,) = tokenize(tokenizer, [prompt], special=False)
    supervised = [label for label in whole.labels if label != -100]
    assert whole.input_ids == prompt_ids + supervised
    assert supervised[-1] == 0
    assert tokenizer.decode(prompt_ids) == prompt
    assert tokenizer.decode(supervised[:-1]) == response
    cut = encode(tokenizer, prompt, response, max_length)
    if len(prompt_ids) >= max_length:
        assert cut is None
    else:
        assert cut is not None
        assert cut.input_ids == whole.input_ids[:max_length]
        assert cut.labels == whole.labels[:max_length]
        assert cut.truncated == (len(whole.input_ids) > max_length)
