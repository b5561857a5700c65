"""Is a difference real: cases with known answers."""

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


# Losses from 0 to 10: next to their spread any difference below would drown if the examples were not paired.
LOSSES = np.linspace(0, 10, 100)
ALTERNATING = np.tile([1.0, -1.0], 50)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    found = compare_means(LOSSES, LOSSES + 0.3 + ALTERNATING)
    assert (found.before, found.after) == (pytest.approx(5), pytest.approx(5.3))
    # 1.96 standard errors of 100 differences with a standard deviation of 1.
    assert (found.low, found.high) == (pytest.approx(0.3 - 0.196, abs=0.01), pytest.approx(0.3 + 0.196, abs=0.01))
    assert found.p_value == pytest.approx(0.004, abs=0.002)  # 0.3 is 2.87 standard errors of the sum of swapped ones
    assert found.is_real


def test_a_difference_smaller_than_chance_is_within_noise() -> None:
    found = compare_means(LOSSES, LOSSES + 0.1 + ALTERNATING)
    assert found.value == pytest.approx(0.1)
    assert found.low < 0 < found.high
    assert found.p_value == pytest.approx(0.32, abs=0.05)  # one standard error
    assert not found.is_real


def test_a_difference_that_every_example_has_is_real_however_small() -> None:
    found = compare_means(LOSSES, LOSSES - 0.001)
    assert (found.low, found.high) == (pytest.approx(-0.001), pytest.approx(-0.001))
    assert found.is_real


def test_equal_models_do_not_differ() -> None:
    found = compare_means(LOSSES, LOSSES)
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert not found.is_real


def test_four_answers_of_a_hundred_that_turn_right_are_not_enough() -> None:
    wrong, right = np.zeros(100), np.zeros(100)
    right[:4] = 1
    found = compare_means(wrong, right)
    assert found.low > 0  # the bootstrap alone would be sure
    assert found.p_value == pytest.approx(2 / 2**4, abs=0.02)  # four coins on the same side
    assert not found.is_real
    right[:8] = 1
    assert compare_means(wrong, right).is_real  # eight coins: 0.008


def test_loss_is_over_tokens_not_over_examples() -> None:
    # One example of 98 tokens that did not change, two of one token that did.
    tokens = np.array([[98.0, 1, 1]])
    before, after = np.array([[98.0, 2, 2]]), np.array([[98.0, 1, 1]])
    (found,) = statistics.compare((before, tokens), (after, tokens))
    assert (found.before, found.after) == (pytest.approx(1.02), pytest.approx(1))


def test_metrics_do_not_mix() -> None:
    ones = np.ones((2, 100))
    before, after = np.stack([LOSSES, LOSSES]), np.stack([LOSSES, LOSSES + 0.3 + ALTERNATING])
    first, second = statistics.compare((before, ones), (after, ones))
    assert (first.value, first.low, first.high) == (0, 0, 0)
    assert second == compare_means(LOSSES, LOSSES + 0.3 + ALTERNATING)


def test_blocks_of_resamples_give_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "CELLS_AT_ONCE", 70_000)  # blocks of 700, the last of 200
    found = compare_means(LOSSES, LOSSES + 0.3 + ALTERNATING)
    assert (found.low, found.high) == (pytest.approx(0.104, abs=0.01), pytest.approx(0.496, abs=0.01))
    assert 0 < found.p_value < 0.01


def test_models_that_differ_by_chance_alone_are_called_different_one_time_in_twenty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    random = np.random.default_rng(1)
    ones = np.ones((300, 60))
    before = random.gamma(2, size=(300, 60))
    after = before + random.standard_t(4, size=(300, 60)) / 3
    # Three hundred pairs of models, as so many metrics: 15 are expected, 28 or more happen once in a thousand.
    assert 4 <= sum(found.is_real for found in statistics.compare((before, ones), (after, ones))) <= 28


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=2, max_size=40))
def test_to_swap_before_and_after_turns_the_sign_and_nothing_else(pairs: list[tuple[float, float]]) -> None:
    before, after = np.array(pairs).T
    there, back = compare_means(before, after), compare_means(after, before)
    assert back.value == pytest.approx(-there.value, abs=1e-12)
    assert (back.low, back.high) == (pytest.approx(-there.high, abs=1e-9), pytest.approx(-there.low, abs=1e-9))
    assert back.p_value == pytest.approx(there.p_value, abs=0.02)
