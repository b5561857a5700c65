"""Generation: answers in order, up to the EOS token, the same alone and in a batch."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig

from stages.data.tokenizer import load_tokenizer
from stages.engine import decoding
from stages.engine.decoding import (
    METHODS,
    Answer,
    Method,
    NewTokens,
    batches_of_prompts,
    choose_method,
    generate,
    generate_alone,
    generate_answers,
    generation_settings,
)
from stages.engine.models import load_model
from stages.templates.answer_parts import AnswerParser, AnswerParts
from tests.test_loss import CONFIGS, SLIDING_WINDOW, SMALL
from tests.textbook import textbook_answer
from tests.tiny_models import random_model


def test_answer_ends_before_the_eos_token(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tiny_model)
    a, b = tokenizer.encode("ab")
    monkeypatch.setattr(decoding, "generate", lambda *_: [[a, 0], [a, b, b]])
    parser = AnswerParser(tokenizer)
    answers = generate_answers(None, parser, [[7], [8, 9]], generation_settings([0], 3), 1000, "")  # type: ignore[arg-type]
    assert answers == [Answer(AnswerParts("a"), 1, stopped=True), Answer(AnswerParts("abb"), 3, stopped=False)]


def test_answers_are_in_the_order_of_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Batches are sorted by length, which saves padding.
    monkeypatch.setitem(METHODS, "lengths", lambda _, prompts, __: [NewTokens([len(ids)], []) for ids in prompts])
    prompts = [[1, 2], [3], [4, 5, 6]]
    model: Any = SimpleNamespace(device=torch.device("cpu"))
    assert generate(model, prompts, generation_settings([0], 1), 1, "lengths") == [[2], [1], [3]]


def test_batches_of_prompts_have_similar_lengths_and_are_limited_by_tokens() -> None:
    prompts = [[1] * length for length in (3, 1, 9, 2)]
    assert list(batches_of_prompts(prompts, 2, max_tokens=100)) == [[1, 3, 0, 2]]
    assert list(batches_of_prompts(prompts, 2, max_tokens=15)) == [[1, 3, 0], [2]]
    assert list(batches_of_prompts(prompts, 2, max_tokens=9)) == [[1, 3], [0], [2]]  # the last is longer by itself


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(LlamaConfig(**(SMALL | {"vocab_size": 400}))).eval()


PACKED = "packed prompts"
PROMPTS = [[300, 301, 302, 303, 304, 305], [310], [320, 321, 322]]
# With a common prefix; the first prompt is the prefix alone.
SHARED = [[300, 301], [300, 301, 303, 304, 305, 306], [300, 301, 320, 321]]


def new_ids(method: Method, *args: Any) -> list[list[int]]:
    return [row.ids for row in method(*args)]


@pytest.mark.parametrize("prompts", [PROMPTS, SHARED, SHARED[:1]])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("eos_token_id", [0, 17, 250])
def test_greedy_answers_equal_those_of_transformers(
    model: Any, eos_token_id: int, method: Method, prompts: list[list[int]]
) -> None:
    settings = generation_settings([eos_token_id], 12, temperature=0, top_p=0.5)
    found = new_ids(method, model, prompts, settings)
    assert found == [textbook_answer(model, prompt, eos_token_id) for prompt in prompts]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_rows_that_stop_at_different_times_do_not_change_the_others(model: Any, method: Method) -> None:
    prompts = [[300 + number, *range(310, 310 + number % 4)] for number in range(16)]
    full_rows = [textbook_answer(model, prompt, None) for prompt in prompts]
    eos = [row[column] for row, column in zip(full_rows, [0, 3, 7, 5] * 4, strict=True)]
    rows = new_ids(method, model, prompts, generation_settings(eos, 12))
    assert rows == [NewTokens(full, []).until(eos).ids for full in full_rows]
    assert len({len(row) for row in rows}) > 3


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_prompts_give_the_answers_of_transformers(name: str) -> None:
    model = random_model(CONFIGS[name]).eval()
    prompts = [[5, 6, 7, 8], [5, 6, 9, 10, 11, 12, 13], [5, 6, 14]]
    expected = [textbook_answer(model, prompt, 2, 20) for prompt in prompts]
    assert choose_method(model, prompts, 12) == PACKED
    assert generate(model, prompts, generation_settings([2], 20), 1000, PACKED) == expected
    assert len({tuple(answer) for answer in expected}) == 3


def test_answers_beyond_a_sliding_window_equal_those_of_transformers() -> None:
    prompts = [[5, 6, 7, 8], [5, 6, 9, 10, 11, 12, 13], [9]]
    for window, method in ((4, "padded prompts"), (8, "padded prompts"), (64, "packed prompts")):
        model = random_model(Gemma3TextConfig(**SLIDING_WINDOW.to_dict() | {"sliding_window": window})).eval()
        assert choose_method(model, prompts, 12) == method
        found = generate(model, prompts, generation_settings([2], 12), 1000, method)
        assert found == [textbook_answer(model, prompt, 2) for prompt in prompts]
        # `evaluate` calls it inside autocast, where bf16 rounding would hide the difference.
        with torch.autocast("cpu", torch.bfloat16):
            assert choose_method(model, prompts, 12) == method


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_answer_ends_when_the_context_is_full(name: str, method: Method) -> None:
    model = random_model(CONFIGS[name]).eval()  # 128 positions
    prompts = [[5 + n % 40 for n in range(length)] for length in (126, 100, 128)]
    found = new_ids(method, model, prompts, generation_settings([50], 40))
    assert [len(ids) for ids in found] == [3, 29, 1]  # the last new token needs no position
    assert found == [textbook_answer(model, prompt, None, len(ids)) for prompt, ids in zip(prompts, found, strict=True)]


def test_samples_depend_on_the_seed(model: Any, tiny_model: Path) -> None:
    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        settings = generation_settings([0], 8, temperature=1.0, top_p=0.9)
        answers = generate_answers(model, AnswerParser(load_tokenizer(tiny_model)), PROMPTS, settings, 1000, PACKED)
        return [answer.parts.text for answer in answers]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_settings_of_the_checkpoint_are_not_used(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"repetition_penalty": 10.0, "eos_token_id": [17]}')
    changed = load_model(tmp_path / "model").eval()
    assert new_ids(generate_alone, changed, PROMPTS, generation_settings([0], 12)) == [
        textbook_answer(load_model(tiny_model), prompt, 0) for prompt in PROMPTS
    ]
