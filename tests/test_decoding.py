"""Generation: answers in order, cut at the stop token, the same alone and in a batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.shared import decoding
from stages.shared.decoding import Reading, generate_answers, read_flat, read_padded
from tests.test_loss import CONFIGS, SLIDING_WINDOW, make


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def test_an_answer_ends_before_the_stop_token(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tokenizer.encode("ab")
    monkeypatch.setattr(decoding, "choose_reading", lambda *_: read_padded)
    monkeypatch.setattr(decoding, "generate_batch", lambda *_: [[a, 0], [a, b, b]])
    answers = decoding.generate_answers(None, tokenizer, [[7], [8, 9]], 0, 3)  # type: ignore[arg-type]
    assert answers == [decoding.Answer("a", 1, stopped=True), decoding.Answer("abb", 3, stopped=False)]


def test_answers_come_in_the_order_of_the_prompts(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tokenizer.encode("ab")
    monkeypatch.setattr(decoding, "choose_reading", lambda *_: read_padded)
    # Prompts are asked by length, so that little is padded.
    monkeypatch.setattr(
        decoding, "generate_batch", lambda _, prompts, *__: [[a], [b]] if prompts == [[7], [8, 9]] else []
    )
    answers = decoding.generate_answers(None, tokenizer, [[8, 9], [7]], 0, 1)  # type: ignore[arg-type]
    assert [answer.text for answer in answers] == ["b", "a"]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from stages.shared.models import load_model

    return load_model(tiny_model).eval()


PROMPTS = [[300, 301, 302, 303, 304, 305], [310], [320, 321, 322]]


# The same with a common prefix, of which one prompt is nothing else.
SHARED = [[300, 301], [300, 301, 303, 304, 305, 306], [300, 301, 320, 321]]


def greedy(model: Any, prompt: list[int], stop: int) -> list[int]:
    """The new ids of `transformers` itself."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": stop, "pad_token_id": 0}
    new: list[int] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[
        0, len(prompt) :
    ].tolist()
    return new


@pytest.mark.parametrize("prompts", [PROMPTS, SHARED, SHARED[:1]])
@pytest.mark.parametrize("read", [read_padded, read_flat])
@pytest.mark.parametrize("stop", [0, 17, 250])
def test_greedy_ids_are_those_of_transformers(model: Any, stop: int, read: Reading, prompts: list[list[int]]) -> None:
    found = decoding.generate_batch(model, prompts, stop, 12, None, read)
    assert found == [greedy(model, prompt, stop) for prompt in prompts]


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_a_flat_stream_gives_the_answers_of_padded_prompts(name: str) -> None:
    model = make(CONFIGS[name]).eval()
    prompts = [[5, 6, 7, 8], [5, 6, 9, 10, 11, 12, 13], [5, 6, 14]]
    padded = decoding.generate_batch(model, prompts, 2, 20, None, read_padded)
    assert decoding.generate_batch(model, prompts, 2, 20, None, read_flat) == padded
    assert decoding.choose_reading(model, prompts) is read_flat
    assert len({tuple(answer) for answer in padded}) == 3


def test_a_model_with_a_sliding_window_reads_padded_prompts() -> None:
    model = make(SLIDING_WINDOW).eval()
    prompts = [[5, 6, 7, 8], [5, 6, 9, 10, 11, 12, 13]]
    assert decoding.choose_reading(model, prompts) is read_padded
    found = decoding.generate_batch(model, prompts, 2, 12, None, read_padded)
    assert found == [greedy(model, prompt, 2) for prompt in prompts]
    # As deep inside evaluate, where bf16 would hide what differs.
    with torch.autocast("cpu", torch.bfloat16):
        assert decoding.choose_reading(model, prompts) is read_padded
        assert decoding.choose_reading(make(CONFIGS["llama"]).eval(), prompts) is read_flat


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_answer_ends_where_the_context_is_full(name: str) -> None:
    model = make(CONFIGS[name]).eval()  # 128 positions
    prompts = [[5 + n % 40 for n in range(length)] for length in (126, 100, 128)]
    found = decoding.generate_batch(model, prompts, -1, 40, None, read_padded)
    assert [len(ids) for ids in found] == [3, 29, 1]  # the last new token is not read again
    assert found == decoding.generate_batch(model, prompts, -1, 40, None, read_flat)
    whole = decoding.generate_batch(model, prompts[:2], -1, 3, None, read_padded)
    assert [ids[:3] for ids in found[:2]] == whole


@pytest.mark.parametrize("read", [read_padded, read_flat])
def test_a_row_that_stops_leaves_the_others_as_they_were(model: Any, read: Reading) -> None:
    whole = decoding.generate_batch(model, PROMPTS, 399, 12, None, read)
    stop = whole[1][3]
    for full, cut in zip(whole, decoding.generate_batch(model, PROMPTS, stop, 12, None, read), strict=True):
        assert cut == (full[: full.index(stop) + 1] if stop in full else full)


def test_a_batch_gives_what_each_prompt_gives_alone(model: Any, tokenizer: Any) -> None:
    together = generate_answers(model, tokenizer, PROMPTS, 0, 8)
    alone = [generate_answers(model, tokenizer, [prompt], 0, 8)[0] for prompt in PROMPTS]
    assert together == alone
    assert all(answer.num_tokens == 8 or answer.stopped for answer in together)


def test_the_seed_decides_the_samples(model: Any, tokenizer: Any) -> None:
    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return [answer.text for answer in generate_answers(model, tokenizer, PROMPTS, 0, 8, temperature=1.0, top_p=0.9)]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_temperature_zero_is_greedy(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(1)
    first = generate_answers(model, tokenizer, PROMPTS, 0, 8, temperature=0, top_p=0.5)
    torch.manual_seed(2)
    assert generate_answers(model, tokenizer, PROMPTS, 0, 8) == first
