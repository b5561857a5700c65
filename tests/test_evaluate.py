"""Metrics of literal predictions."""

import math
from typing import Any

import numpy as np
import pytest

from stages.evaluate import compute_metrics, distinct_2, ratio, rouge_l


def test_loss_and_accuracy_are_means_over_all_tokens() -> None:
    def row(loss: float, tokens: int, correct: int, **scores: Any) -> dict[str, Any]:
        return {"loss": loss, "tokens": tokens, "correct_tokens": correct, **scores}

    rows = [
        row(1.0, 1, 1, answer="a b c", answer_tokens=3, stopped=True, exact_match=True, rouge_l=1.0),
        row(3.0, 3, 1, answer="a b", answer_tokens=5, stopped=False, exact_match=False, rouge_l=0.5),
    ]
    assert compute_metrics(rows) == {
        "examples": 2,
        "supervised_tokens": 4,
        "loss": 2.5,  # (1·1 + 3·3) / 4
        "loss_se": 0.75,  # residuals −1.5 and 1.5: √(4.5 · 2) / 4
        "perplexity": pytest.approx(12.182494),
        "perplexity_se": pytest.approx(9.136870),
        "token_accuracy": 0.5,
        "token_accuracy_se": 0.25,  # residuals 0.5 and −0.5: √(0.5 · 2) / 4
        "exact_match": 0.5,
        "rouge_l": 0.75,
        "stop_rate": 0.5,
        "mean_response_tokens": 4.0,
        "distinct_2": pytest.approx(2 / 3),  # {a b, b c} among a b, b c, a b
    }


def test_standard_error_with_equal_counts_is_that_of_a_mean() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    assert ratio(values, np.ones(4)) == (4.0, pytest.approx(np.std(values, ddof=1) / 2))


def test_standard_error_agrees_with_resampling_of_examples() -> None:
    random = np.random.default_rng(0)
    counts = random.integers(1, 40, 300).astype(float)
    sums = counts * random.gamma(2, 1, 300)
    draws = random.integers(0, 300, (4000, 300))
    resampled = sums[draws].sum(1) / counts[draws].sum(1)
    assert ratio(sums, counts)[1] == pytest.approx(resampled.std(), rel=0.06)


def test_standard_error_of_one_example_is_zero() -> None:
    assert ratio(np.array([3.0]), np.array([2.0])) == (1.5, 0.0)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("a dog", "the cat", 0.0),
        ("", "the cat", 0.0),
        ("the cat sat", "the sat cat", 2 / 3),  # a common subsequence of two words of three
        ("the cat", "the cat sat down", 2 / 3),  # precision 1, recall 1/2
        ("Кот, здесь!", "кот здесь", 1.0),
        ("it's café_au", "It s café au", 1.0),
    ],
)
def test_rouge_l_is_an_f_measure_of_words_in_any_alphabet(answer: str, reference: str, score: float) -> None:
    assert math.isclose(rouge_l(answer, reference), score, rel_tol=1e-6)


def test_distinct_2_is_zero_without_pairs() -> None:
    assert distinct_2(["one", ""]) == 0.0
    assert distinct_2(["a b a b"]) == pytest.approx(2 / 3)
