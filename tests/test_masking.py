"""Labels: exactly which tokens are supervised."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.tokenizer import load_tokenizer
from stages.templates.alpaca import AlpacaTemplate
from stages.templates.masking import mask_spans, tokenize
from tests.clone import ROOT


@dataclass
class One:
    """One encoded example."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


class Words:
    """A tokenizer of whitespace-separated numbers, so that the text shows the token ids."""

    is_fast = False
    eos_token_id = 2
    bos_token_id: int | None = None
    added_tokens_decoder: ClassVar[dict[int, str]] = {}
    all_special_tokens: ClassVar[list[str]] = ["</s>"]

    def __call__(self, texts: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        if isinstance(texts, str):
            return {"input_ids": start + [int(word) for word in texts.split()]}
        return {"input_ids": [start + [int(word) for word in text.split()] for text in texts]}


class WordsWithBos(Words):
    bos_token_id = 1


def encode(tokenizer: Any, prompt: str, response: str, max_length: int = 99) -> One | None:
    """Encode one example with the Alpaca template; None if no supervised token fits."""
    encoded = mask_spans(AlpacaTemplate(tokenizer).encode([prompt], [response]), max_length)
    assert encoded.lengths.tolist() == [len(encoded.input_ids)] == [len(encoded.labels)]
    if not encoded.lengths[0]:
        return None
    return One(encoded.input_ids.tolist(), encoded.labels.tolist(), encoded.truncated.item())


def test_prompt_tokens_are_not_trained_and_the_eos_token_is() -> None:
    assert encode(Words(), "5 6 7", "8 9") == One([5, 6, 7, 8, 9, 2], [-100, -100, -100, 8, 9, 2], truncated=False)


def test_labels_depend_on_spans_and_not_on_token_ids() -> None:
    # The EOS token is masked inside the prompt and trained inside the response.
    assert encode(Words(), "2 5", "2 8") == One([2, 5, 2, 8, 2], [-100, -100, 2, 8, 2], truncated=False)


def test_there_is_one_bos_token_before_the_prompt_and_it_is_not_trained() -> None:
    assert encode(WordsWithBos(), "5", "8") == One([1, 5, 8, 2], [-100, -100, 8, 2], truncated=False)


class WordsWithEosAsBos(Words):
    bos_token_id = Words.eos_token_id


class WordsThatEndWithEos(Words):
    def __call__(self, texts: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        ids = super().__call__(texts)["input_ids"]
        end = [self.eos_token_id] if add_special_tokens else []
        return {"input_ids": ids + end if isinstance(texts, str) else [one + end for one in ids]}


@pytest.mark.parametrize("tokenizer", [WordsWithEosAsBos(), WordsThatEndWithEos()])
def test_no_eos_token_is_before_the_prompt(tokenizer: Words) -> None:
    assert encode(tokenizer, "5", "8") == One([5, 8, 2], [-100, 8, 2], truncated=False)


def test_truncation_cuts_the_end_of_the_response() -> None:
    assert encode(Words(), "5 6", "7 8 9", 4) == One([5, 6, 7, 8], [-100, -100, 7, 8], truncated=True)


def test_losing_only_the_eos_token_counts_as_truncation() -> None:
    assert encode(Words(), "5 6", "7 8", 4) == One([5, 6, 7, 8], [-100, -100, 7, 8], truncated=True)
    assert encode(Words(), "5 6", "7 8", 5) == One([5, 6, 7, 8, 2], [-100, -100, 7, 8, 2], truncated=False)


def test_an_example_without_room_for_a_supervised_token_is_empty() -> None:
    assert encode(Words(), "5 6 7", "8 9", 4) == One([5, 6, 7, 8], [-100, -100, -100, 8], truncated=True)
    assert encode(Words(), "5 6 7", "8 9", 3) is None
    assert encode(Words(), "5 6 7", "8 9", 2) is None


def test_examples_are_concatenated() -> None:
    encoded = mask_spans([[[5, 6], [7, 2]], [[5, 6, 7, 8], [9, 2]], [[5], [8, 9, 3, 2]]], 4)
    assert encoded.input_ids.tolist() == [5, 6, 7, 2, 5, 8, 9, 3]
    assert encoded.labels.tolist() == [-100, -100, 7, 2, -100, 8, 9, 3]
    assert encoded.lengths.tolist() == [4, 0, 4]
    assert encoded.responses.tolist() == [1, 0, 1]
    assert encoded.truncated.tolist() == [False, True, True]


def test_each_response_of_a_conversation_is_supervised_and_tokens_after_the_last_one_are_dropped() -> None:
    conversation = [[5, 6], [7, 2], [5, 8], [9, 2]]
    for max_length, labels in [
        (9, [-100, -100, 7, 2, -100, -100, 9, 2]),
        (7, [-100, -100, 7, 2, -100, -100, 9]),
        (6, [-100, -100, 7, 2]),
        (3, [-100, -100, 7]),
        (2, []),
    ]:
        encoded = mask_spans([conversation], max_length)
        assert encoded.labels.tolist() == labels
        assert encoded.input_ids.tolist() == [5, 6, 7, 2, 5, 8, 9, 2][: len(labels)]
        assert encoded.truncated.tolist() == [max_length < 8]
        assert encoded.responses.tolist() == [(len(labels) > 0) + (len(labels) > 6)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def test_text_cannot_become_a_special_token(tokenizer: Any) -> None:
    encoded = encode(tokenizer, "Say <|end|>", "No <|end|>")
    assert encoded is not None
    assert encoded.input_ids.count(0) == 1  # the EOS token that the template adds
    assert encoded.input_ids[-1] == 0
    assert tokenizer.decode(encoded.input_ids[:-1]) == "Say <|end|>No <|end|>"


def test_token_ids_equal_those_of_calling_the_tokenizer(tokenizer: Any) -> None:
    text = "Name a color. <|end|> 🐎\u202e\x00 ### Response:"
    # These settings stay in the tokenizer, and must not affect later calls.
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=2)
    expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(expected) > 10
    assert tokenize(tokenizer, [text, "a"], allow_special_tokens=False)[0] == expected


def test_threads_that_allow_special_tokens_and_threads_that_do_not_can_share_a_tokenizer(tokenizer: Any) -> None:
    texts = ["Red.<|end|>" * 50] * 20
    expected = {allowed: tokenize(tokenizer, texts, allowed) for allowed in (True, False)}
    assert len(expected[True][0]) < len(expected[False][0])
    with ThreadPoolExecutor(4) as pool:
        flags = [True, False] * 50
        for allowed, ids in zip(flags, pool.map(partial(tokenize, tokenizer, texts), flags), strict=True):
            assert ids == expected[allowed]


def test_a_tokenizer_without_a_fast_version_separates_special_tokens_from_text() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    assert tokenize(tokenizer, [], allow_special_tokens=False) == []
    assert tokenize(tokenizer, ["a</s>"], allow_special_tokens=True) == [[100, 1]]
    assert tokenize(tokenizer, ["a</s>"], allow_special_tokens=False) == [[100, 63, 50, 118, 65]]


unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=200)
@given(prompt=unicode_text, response=unicode_text, max_length=st.integers(2, 80))
def test_any_text_has_an_exact_boundary_between_prompt_and_response(
    tokenizer: Any, prompt: str, response: str, max_length: int
) -> None:
    full = encode(tokenizer, prompt, response, 100_000)
    assert full is not None
    (prompt_ids,) = tokenize(tokenizer, [prompt], allow_special_tokens=False)
    supervised = [label for label in full.labels if label != -100]
    assert full.input_ids == prompt_ids + supervised
    assert supervised[-1] == 0
    assert tokenizer.decode(prompt_ids) == prompt
    assert tokenizer.decode(supervised[:-1]) == response
    cut = encode(tokenizer, prompt, response, max_length)
    if len(prompt_ids) >= max_length:
        assert cut is None
    else:
        assert cut is not None
        assert cut.input_ids == full.input_ids[:max_length]
        assert cut.labels == full.labels[:max_length]
        assert cut.truncated == (len(full.input_ids) > max_length)


@pytest.mark.parametrize("name", ["TokenizersBackend", "GPT2Tokenizer"])
def test_a_tokenizer_has_the_class_of_its_config(name: str, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "tokenizer")
    config = tmp_path / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": name}))
    assert type(load_tokenizer(tmp_path / "tokenizer")).__name__ == name


@pytest.mark.subprocess
def test_a_tokenizer_is_loaded_without_the_import_of_torch(tiny_model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from stages.data.tokenizer import load_tokenizer; "
        f"load_tokenizer(Path({str(tiny_model)!r})); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"
