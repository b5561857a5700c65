"""Generation: answers in order, up to the EOS token, the same alone and in a batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.engine import decoding
from stages.engine.decoding import PrefillFunction, generate_answers, prefill_packed, prefill_padded
from tests.test_loss import CONFIGS, SLIDING_WINDOW, make


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def test_answer_ends_before_the_eos_token(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tokenizer.encode("ab")
    monkeypatch.setattr(decoding, "choose_prefill", lambda *_: prefill_padded)
    monkeypatch.setattr(decoding, "generate_batch", lambda *_: [[a, 0], [a, b, b]])
    answers = decoding.generate_answers(None, tokenizer, [[7], [8, 9]], 0, 3)  # type: ignore[arg-type]
    assert answers == [decoding.Answer("a", 1, stopped=True), decoding.Answer("abb", 3, stopped=False)]


def test_answers_are_in_the_order_of_the_prompts(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tokenizer.encode("ab")
    monkeypatch.setattr(decoding, "choose_prefill", lambda *_: prefill_padded)
    # Batches are sorted by length, which saves padding.
    monkeypatch.setattr(
        decoding, "generate_batch", lambda _, prompts, *__: [[a], [b]] if prompts == [[7], [8, 9]] else []
    )
    answers = decoding.generate_answers(None, tokenizer, [[8, 9], [7]], 0, 1)  # type: ignore[arg-type]
    assert [answer.text for answer in answers] == ["b", "a"]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from stages.engine.models import load_model

    return load_model(tiny_model).eval()


PROMPTS = [[300, 301, 302, 303, 304, 305], [310], [320, 321, 322]]
# With a common prefix; the first prompt is the prefix alone.
SHARED = [[300, 301], [300, 301, 303, 304, 305, 306], [300, 301, 320, 321]]


def greedy(model: Any, prompt: list[int], eos_token_id: int) -> list[int]:
    """The new token ids that `generate` of transformers returns."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": eos_token_id, "pad_token_id": 0}
    new: list[int] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[
        0, len(prompt) :
    ].tolist()
    return new


@pytest.mark.parametrize("prompts", [PROMPTS, SHARED, SHARED[:1]])
@pytest.mark.parametrize("prefill", [prefill_padded, prefill_packed])
@pytest.mark.parametrize("eos_token_id", [0, 17, 250])
def test_greedy_answers_equal_those_of_transformers(
    model: Any, eos_token_id: int, prefill: PrefillFunction, prompts: list[list[int]]
) -> None:
    found = decoding.generate_batch(model, prompts, eos_token_id, 12, None, prefill)
    assert found == [greedy(model, prompt, eos_token_id) for prompt in prompts]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_prefill_gives_the_answers_of_padded_prefill(name: str) -> None:
    model = make(CONFIGS[name]).eval()
    prompts = [[5, 6, 7, 8], [5, 6, 9, 10, 11, 12, 13], [5, 6, 14]]
    padded = decoding.generate_batch(model, prompts, 2, 20, None, prefill_padded)
    assert decoding.generate_batch(model, prompts, 2, 20, None, prefill_packed) == padded
    assert decoding.choose_prefill(model, prompts) is prefill_packed
    assert len({tuple(answer) for answer in padded}) == 3


def test_sliding_window_model_uses_padded_prefill() -> None:
    model = make(SLIDING_WINDOW).eval()
    prompts = [[5, 6, 7, 8], [5, 6, 9, 10, 11, 12, 13]]
    assert decoding.choose_prefill(model, prompts) is prefill_padded
    found = decoding.generate_batch(model, prompts, 2, 12, None, prefill_padded)
    assert found == [greedy(model, prompt, 2) for prompt in prompts]
    # `evaluate` calls it inside autocast, where bf16 rounding would hide the difference.
    with torch.autocast("cpu", torch.bfloat16):
        assert decoding.choose_prefill(model, prompts) is prefill_padded
        assert decoding.choose_prefill(make(CONFIGS["llama"]).eval(), prompts) is prefill_packed


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_answer_ends_when_the_context_is_full(name: str) -> None:
    model = make(CONFIGS[name]).eval()  # 128 positions
    prompts = [[5 + n % 40 for n in range(length)] for length in (126, 100, 128)]
    found = decoding.generate_batch(model, prompts, -1, 40, None, prefill_padded)
    assert [len(ids) for ids in found] == [3, 29, 1]  # the last new token needs no position
    assert found == decoding.generate_batch(model, prompts, -1, 40, None, prefill_packed)
    shorter = decoding.generate_batch(model, prompts[:2], -1, 3, None, prefill_padded)
    assert [ids[:3] for ids in found[:2]] == shorter


@pytest.mark.parametrize("prefill", [prefill_padded, prefill_packed])
def test_stopped_row_does_not_change_the_other_rows(model: Any, prefill: PrefillFunction) -> None:
    full_rows = decoding.generate_batch(model, PROMPTS, 399, 12, None, prefill)
    eos = full_rows[1][3]
    rows = decoding.generate_batch(model, PROMPTS, eos, 12, None, prefill)
    for full, row in zip(full_rows, rows, strict=True):
        assert row == (full[: full.index(eos) + 1] if eos in full else full)


def test_batch_gives_the_same_answers_as_single_prompts(model: Any, tokenizer: Any) -> None:
    together = generate_answers(model, tokenizer, PROMPTS, 0, 8)
    alone = [generate_answers(model, tokenizer, [prompt], 0, 8)[0] for prompt in PROMPTS]
    assert together == alone
    assert all(answer.num_tokens == 8 or answer.stopped for answer in together)


def test_samples_depend_on_the_seed(model: Any, tokenizer: Any) -> None:
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
