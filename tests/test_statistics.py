"""Differences and their uncertainty, in cases with known results."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from review.statistics import Difference, Runs, compare, components, holm

Array = npt.NDArray[np.float64]

# Losses from 0 to 10: with this spread no difference below would be significant if the examples were not paired.
LOSSES = np.linspace(0, 10, 100)
ALTERNATING = np.tile([1.0, -1.0], 50)


def runs(*losses: Array, seeds: list[int] | None = None) -> Runs:
    """Runs whose metric is the mean over examples."""
    return Runs(seeds or [*range(len(losses))], np.stack(losses), np.ones((len(losses), len(losses[0]))))


def compare_means(before: Runs, after: Runs, prompts: Array | None = None) -> Difference:
    return compare(before, after, np.arange(before.sums.shape[1]) if prompts is None else prompts.astype(np.int64))


def test_with_one_run_each_the_interval_is_that_of_a_paired_t_test() -> None:
    found = compare_means(runs(LOSSES), runs(LOSSES + 0.3 + ALTERNATING))
    assert (found.before, found.after) == (pytest.approx(5), pytest.approx(5.3))
    # 1.984 (t with 99 degrees of freedom) standard errors of 100 differences with a standard deviation of 1.
    assert (found.low, found.high) == (pytest.approx(0.3 - 0.199, abs=0.004), pytest.approx(0.3 + 0.199, abs=0.004))
    assert found.p_value == pytest.approx(0.004, abs=0.002)
    assert found.run_noise is None
    assert found.runs_needed is None


def test_equal_difference_of_every_example_is_significant_however_small() -> None:
    found = compare_means(runs(LOSSES), runs(LOSSES - 0.001))
    assert (found.low, found.high) == (pytest.approx(-0.001), pytest.approx(-0.001))
    assert found.p_value < 0.001


def test_equal_models_have_no_difference() -> None:
    found = compare_means(runs(LOSSES), runs(LOSSES))
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_four_newly_correct_answers_of_a_hundred_are_not_significant_but_eight_are() -> None:
    before, after = np.zeros(100), np.zeros(100)
    after[:4] = 1
    found = compare_means(runs(before), runs(after))
    assert found.low > 0  # the interval alone would call it significant
    assert found.p_value == pytest.approx(2 / 2**4, abs=0.02)  # four coin flips that agree
    after[:8] = 1
    assert compare_means(runs(before), runs(after)).p_value == pytest.approx(2 / 2**8, abs=0.005)


def test_five_examples_do_not_suffice_even_if_all_are_much_worse() -> None:
    assert compare_means(runs(LOSSES[:5]), runs(LOSSES[:5] + 5)).p_value == pytest.approx(2 / 2**5)


def test_loss_is_a_mean_over_tokens_not_over_examples() -> None:
    # One unchanged example of 98 tokens, and two changed examples of one token.
    tokens = np.array([[98.0, 1, 1]])
    found = compare(Runs([0], np.array([[98.0, 2, 2]]), tokens), Runs([0], tokens, tokens), np.arange(3))
    assert (found.before, found.after) == (pytest.approx(1.02), pytest.approx(1))


def test_examples_of_one_prompt_count_once() -> None:
    # Each prompt four times: as certain as 25 examples, not as 100.
    difference = np.repeat(np.tile([1.0, -1.0], 13)[:25], 4) + 0.3
    once = compare_means(runs(LOSSES[::4]), runs(LOSSES[::4] + difference[::4]))
    found = compare_means(runs(LOSSES), runs(LOSSES + difference), np.repeat(np.arange(25), 4))
    assert found.variances.num_prompts == 25
    assert found.high - found.low == pytest.approx(once.high - once.low)


NOISE = [0.02, -0.01, 0.03]  # of the runs of three seeds, on all examples


def test_runs_with_equal_seeds_are_paired() -> None:
    before = runs(*(LOSSES + noise for noise in NOISE), seeds=[42, 1, 2])
    after = runs(*(LOSSES + noise - 0.02 + 0.001 * n for n, noise in enumerate(NOISE)), seeds=[42, 1, 2])
    found = compare_means(before, after)
    assert found.run_noise == "paired"
    assert found.by_seed == pytest.approx({42: -0.02, 1: -0.019, 2: -0.018})
    assert found.value == pytest.approx(-0.019)
    # 4.303 (t with 2 degrees of freedom) standard errors of three differences with a standard deviation of 0.001.
    assert found.high - found.value == pytest.approx(4.303 * 0.001 / 3**0.5, rel=0.001)
    assert found.p_value < 0.01


def test_runs_with_other_seeds_are_not_paired() -> None:
    before = runs(*(LOSSES + noise for noise in NOISE), seeds=[42, 1, 2])
    after = runs(*(LOSSES + noise - 0.019 for noise in NOISE), seeds=[42, 3, 4])
    found = compare_means(before, after)
    assert found.run_noise == "pooled"
    assert found.by_seed == pytest.approx({42: -0.019})
    # 2.776 (t with 4 degrees of freedom); the standard deviation of the runs is 0.0208.
    assert found.high - found.value == pytest.approx(2.776 * 0.0208 * (2 / 3) ** 0.5, rel=0.05)
    assert found.p_value > 0.2


def test_run_noise_of_one_side_serves_for_both() -> None:
    found = compare_means(runs(*(LOSSES + noise for noise in NOISE), seeds=[42, 1, 2]), runs(LOSSES, seeds=[42]))
    assert found.run_noise == "pooled"
    # 4.303 (t with 2 degrees of freedom).
    assert found.high - found.value == pytest.approx(4.303 * 0.0208 * (1 / 3 + 1) ** 0.5, rel=0.05)


def test_variance_components_of_a_known_table() -> None:
    # Two runs whose means differ by 2, four prompts, and a residual of ±0.5.
    table = np.array([[0.0, 1, 2, 3], [2, 3, 4, 5]]) + 0.5 * np.array([[1, -1, 1, -1], [-1, 1, -1, 1]])
    found = components([table], table.mean(0), is_paired=True)
    assert found.per_run == pytest.approx(2)  # (0.5 − 2.5)² ÷ 2
    assert found.residual == pytest.approx(2 * 4 * 0.25 / 3)
    assert found.per_prompt == pytest.approx(5 / 3)  # of 1, 2, 3, 4
    assert found.freedom == 1
    assert found.of_runs == pytest.approx((2 - found.residual / 4) / 2)


def test_needed_numbers_make_the_observed_difference_detectable() -> None:
    found = compare_means(runs(LOSSES), runs(LOSSES + 0.1 + ALTERNATING))
    # (1.96 + 0.84)² × variance ÷ difference² = 785; numbers are tried in steps of 10%.
    assert found.prompts_needed == 815
    assert found.runs_needed is None  # run noise is not known
    before = runs(LOSSES + 1, LOSSES - 1, LOSSES)
    noisy = compare_means(before, runs(LOSSES + 1.6 + ALTERNATING * 0.1, LOSSES - 0.8, LOSSES + 0.4))
    assert noisy.by_seed == pytest.approx({0: 0.6, 1: 0.2, 2: 0.4})
    assert noisy.prompts_needed is None  # run noise alone is larger
    # (2.776 + 0.842) × 0.2 ÷ √5 = 0.32, but with four runs (3.182 + 0.842) × 0.2 ÷ √4 = 0.402.
    assert noisy.runs_needed == 5


def test_two_paired_runs_are_rarely_enough() -> None:
    before = runs(LOSSES + 0.02, LOSSES)
    found = compare_means(before, runs(LOSSES - 0.2, LOSSES - 0.26))
    assert found.p_value > 0.05
    assert found.runs_needed == 3


def test_rounding_errors_are_no_difference() -> None:
    third = np.full(100, 0.1)
    found = compare_means(runs(third, third, third), runs(third))
    assert (found.value, found.p_value) == (pytest.approx(0, abs=1e-15), 1)


def test_minimum_detectable_difference_is_that_of_80_percent_power() -> None:
    found = compare_means(runs(LOSSES), runs(LOSSES + ALTERNATING))
    assert found.variances.detectable == pytest.approx((1.984 + 0.842) * 0.1005, rel=0.03)


def test_holm_multiplies_the_smallest_by_their_number_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=2, max_size=40),
    st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=3),
)
def test_swapping_before_and_after_only_changes_the_sign(
    pairs: list[tuple[float, float]], noise: list[tuple[float, float]]
) -> None:
    first, second = np.array(pairs).T
    before, after = (runs(*(side + own[at] for own in noise)) for at, side in enumerate((first, second)))
    found, swapped = compare_means(before, after), compare_means(after, before)
    assert swapped.value == pytest.approx(-found.value, abs=1e-9)
    assert (swapped.low, swapped.high) == (pytest.approx(-found.high, abs=1e-6), pytest.approx(-found.low, abs=1e-6))
    assert swapped.p_value == pytest.approx(found.p_value, abs=0.02)
