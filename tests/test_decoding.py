"""Generation: answers in order, cut at the stop token, the same alone and in a batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.shared import decoding
from stages.shared.decoding import generate_answers
from tests.test_loss import CONFIGS, make


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def test_an_answer_ends_before_the_stop_token(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tokenizer.encode("ab")
    monkeypatch.setattr(decoding, "generate_batch", lambda *_: [[a, 0], [a, b, b]])
    answers = decoding.generate_answers(None, tokenizer, [[7], [8, 9]], 3)  # type: ignore[arg-type]
    assert answers == [decoding.Answer("a", 1, stopped=True), decoding.Answer("abb", 3, stopped=False)]


def test_answers_come_in_the_order_of_the_prompts(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tokenizer.encode("ab")
    # Prompts are asked by length, so that little is padded.
    monkeypatch.setattr(
        decoding, "generate_batch", lambda _, prompts, *__: [[a], [b]] if prompts == [[7], [8, 9]] else []
    )
    answers = decoding.generate_answers(None, tokenizer, [[8, 9], [7]], 1)  # type: ignore[arg-type]
    assert [answer.text for answer in answers] == ["b", "a"]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from stages.shared.models import load_model

    return load_model(tiny_model).eval()


PROMPTS = [[300, 301, 302, 303, 304, 305], [310], [320, 321, 322]]


# The same with a common prefix, of which one prompt is nothing else.
SHARED = [[300, 301], [300, 301, 303, 304, 305, 306], [300, 301, 320, 321]]


@pytest.mark.parametrize("prompts", [PROMPTS, SHARED, SHARED[:1]])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("stop", [0, 17, 250])
def test_greedy_ids_are_those_of_transformers(model: Any, stop: int, flat: bool, prompts: list[list[int]]) -> None:
    for prompt, found in zip(prompts, decoding.generate_batch(model, prompts, stop, 12, None, flat), strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": stop, "pad_token_id": 0}
        expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert found == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_a_flat_stream_gives_the_answers_of_padded_prompts(name: str) -> None:
    model = make(CONFIGS[name]).eval()
    prompts = [[5, 6, 7, 8], [5, 6, 9, 10, 11, 12, 13], [5, 6, 14]]
    padded = decoding.generate_batch(model, prompts, 2, 20, None, flat=False)
    assert decoding.generate_batch(model, prompts, 2, 20, None, flat=True) == padded
    assert len({tuple(answer) for answer in padded}) == 3


@pytest.mark.parametrize("flat", [False, True])
def test_a_row_that_stops_leaves_the_others_as_they_were(model: Any, flat: bool) -> None:
    whole = decoding.generate_batch(model, PROMPTS, 399, 12, None, flat)
    stop = whole[1][3]
    for full, cut in zip(whole, decoding.generate_batch(model, PROMPTS, stop, 12, None, flat), strict=True):
        assert cut == (full[: full.index(stop) + 1] if stop in full else full)


def test_a_batch_gives_what_each_prompt_gives_alone(model: Any, tokenizer: Any) -> None:
    together = generate_answers(model, tokenizer, PROMPTS, 8)
    alone = [generate_answers(model, tokenizer, [prompt], 8)[0] for prompt in PROMPTS]
    assert together == alone
    assert all(answer.num_tokens == 8 or answer.stopped for answer in together)


def test_the_seed_decides_the_samples(model: Any, tokenizer: Any) -> None:
    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return [answer.text for answer in generate_answers(model, tokenizer, PROMPTS, 8, temperature=1.0, top_p=0.9)]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_temperature_zero_is_greedy(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(1)
    first = generate_answers(model, tokenizer, PROMPTS, 8, temperature=0, top_p=0.5)
    torch.manual_seed(2)
    assert generate_answers(model, tokenizer, PROMPTS, 8) == first
