"""Significance of a difference, in cases with known results."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from review import statistics
from review.statistics import Difference

Array = npt.NDArray[np.float64]


def compare_means(before: Array, after: Array) -> Difference:
    ones = np.ones((1, len(before)))
    (difference,) = statistics.compare((before[None], ones), (after[None], ones))
    return difference


# Losses from 0 to 10: with this spread no difference below would be significant if the examples were not paired.
LOSSES = np.linspace(0, 10, 100)
ALTERNATING = np.tile([1.0, -1.0], 50)


def test_interval_of_a_mean_agrees_with_the_normal_distribution() -> None:
    found = compare_means(LOSSES, LOSSES + 0.3 + ALTERNATING)
    assert (found.before, found.after) == (pytest.approx(5), pytest.approx(5.3))
    # 1.96 standard errors of 100 differences with a standard deviation of 1.
    assert (found.low, found.high) == (pytest.approx(0.3 - 0.196, abs=0.01), pytest.approx(0.3 + 0.196, abs=0.01))
    assert found.p_value == pytest.approx(0.004, abs=0.002)  # 0.3 is 2.87 standard errors under random swaps
    assert found.is_significant


def test_small_difference_is_not_significant() -> None:
    found = compare_means(LOSSES, LOSSES + 0.1 + ALTERNATING)
    assert found.value == pytest.approx(0.1)
    assert found.low < 0 < found.high
    assert found.p_value == pytest.approx(0.32, abs=0.05)  # one standard error
    assert not found.is_significant


def test_equal_difference_of_every_example_is_significant_however_small() -> None:
    found = compare_means(LOSSES, LOSSES - 0.001)
    assert (found.low, found.high) == (pytest.approx(-0.001), pytest.approx(-0.001))
    assert found.is_significant


def test_equal_models_have_no_difference() -> None:
    found = compare_means(LOSSES, LOSSES)
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert not found.is_significant


def test_four_newly_correct_answers_of_a_hundred_are_not_significant_but_eight_are() -> None:
    before, after = np.zeros(100), np.zeros(100)
    after[:4] = 1
    found = compare_means(before, after)
    assert found.low > 0  # the bootstrap alone would call it significant
    assert found.p_value == pytest.approx(2 / 2**4, abs=0.02)  # four coin flips that agree
    assert not found.is_significant
    after[:8] = 1
    assert compare_means(before, after).is_significant  # eight coin flips that agree: 0.008


def test_loss_is_a_mean_over_tokens_not_over_examples() -> None:
    # One unchanged example of 98 tokens, and two changed examples of one token.
    tokens = np.array([[98.0, 1, 1]])
    before, after = np.array([[98.0, 2, 2]]), np.array([[98.0, 1, 1]])
    (found,) = statistics.compare((before, tokens), (after, tokens))
    assert (found.before, found.after) == (pytest.approx(1.02), pytest.approx(1))


def test_metrics_are_compared_independently() -> None:
    ones = np.ones((2, 100))
    before, after = np.stack([LOSSES, LOSSES]), np.stack([LOSSES, LOSSES + 0.3 + ALTERNATING])
    first, second = statistics.compare((before, ones), (after, ones))
    assert (first.value, first.low, first.high) == (0, 0, 0)
    assert second == compare_means(LOSSES, LOSSES + 0.3 + ALTERNATING)


def test_resampling_in_blocks_draws_all_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "CELLS_PER_BLOCK", 70_000)  # blocks of 700, the last of 200
    found = compare_means(LOSSES, LOSSES + 0.3 + ALTERNATING)
    assert (found.low, found.high) == (pytest.approx(0.104, abs=0.01), pytest.approx(0.496, abs=0.01))
    assert 0 < found.p_value < 0.01


def test_chance_differences_are_called_significant_one_time_in_twenty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    random = np.random.default_rng(1)
    ones = np.ones((300, 60))
    before = random.gamma(2, size=(300, 60))
    after = before + random.standard_t(4, size=(300, 60)) / 3
    # 300 pairs of models, as 300 metrics: 15 are expected, 28 or more occur once in a thousand such tests.
    assert 4 <= sum(found.is_significant for found in statistics.compare((before, ones), (after, ones))) <= 28


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=2, max_size=40))
def test_swapping_before_and_after_only_changes_the_sign(pairs: list[tuple[float, float]]) -> None:
    before, after = np.array(pairs).T
    found, swapped = compare_means(before, after), compare_means(after, before)
    assert swapped.value == pytest.approx(-found.value, abs=1e-12)
    assert (swapped.low, swapped.high) == (pytest.approx(-found.high, abs=1e-9), pytest.approx(-found.low, abs=1e-9))
    assert swapped.p_value == pytest.approx(found.p_value, abs=0.02)
