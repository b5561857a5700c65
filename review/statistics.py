"""Paired comparison of two models on the same test examples.

The test split is a sample, so another one would give other values. An example that is hard for one model is usually
hard for the other. So a paired comparison detects far smaller differences than a comparison of two standard errors.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
SIGNIFICANCE = 0.05
SEED = 0  # so that repeating a review gives the same result
CELLS_PER_BLOCK = 10_000_000  # resamples × examples that are computed at once; limits memory
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """after − before, its 95% interval, and the probability of a difference at least as large by chance.

    The interval is the percentile interval of a paired bootstrap over examples (Efron and Tibshirani, 1993, ch. 13). It
    is too narrow if few examples differ: if four answers of a hundred became correct, it excludes 0, although four coin
    flips are equal one time in eight. So a permutation test (Good, 2005) must agree: `p_value` is the share of random
    swaps of before and after, example by example, with a difference at least as large.
    """

    before: float
    after: float
    low: float
    high: float
    p_value: float

    @property
    def value(self) -> float:
        return self.after - self.before

    @property
    def is_significant(self) -> bool:
        return (self.low > 0 or self.high < 0) and self.p_value < SIGNIFICANCE


def compare(before: tuple[Array, Array], after: tuple[Array, Array]) -> list[Difference]:
    """The difference of each metric between two models.

    Args:
        before: sums and counts, each (metrics, examples). A metric is the total of its sums ÷ the total of its counts,
            such as loss ÷ tokens; for a mean over examples the counts are 1.
        after: the same for the other model, with the same examples in the same order.
    """
    table = np.stack([np.stack(before, -1), np.stack(after, -1)])  # (sides, metrics, examples, sum and count)
    swap_effect = table[0] - table[1]  # of swapping an example, on the totals of `after`
    totals = table.sum(2)
    found_before, found_after = ratios(totals)
    found = found_after - found_before

    num_examples = table.shape[2]
    random = np.random.default_rng(SEED)
    resampled, at_least_as_large = [], np.zeros(len(found))
    block = max(1, CELLS_PER_BLOCK // num_examples)
    for start in range(0, RESAMPLES, block):
        num = min(block, RESAMPLES - start)
        # How often each example is drawn; all metrics use the same draws.
        drawn = random.multinomial(num_examples, np.full(num_examples, 1 / num_examples), size=num)
        values = ratios(np.tensordot(drawn, table, (1, 2)))  # (resamples, sides, metrics)
        resampled.append(values[:, 1] - values[:, 0])

        swapped = np.tensordot(random.integers(2, size=(num, num_examples)), swap_effect, (1, 1))
        by_chance = ratios(totals[1] + swapped) - ratios(totals[0] - swapped)
        at_least_as_large += (np.abs(by_chance) >= np.abs(found) * (1 - 1e-9)).sum(0)
    low, high = np.quantile(np.concatenate(resampled), [SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2], axis=0)
    p_values = (at_least_as_large + 1) / (RESAMPLES + 1)
    return [
        Difference(*(float(value) for value in values))
        for values in zip(found_before, found_after, low, high, p_values, strict=True)
    ]


def ratios(totals: Array) -> Array:
    """Sum ÷ count, which are the last axis of `totals`."""
    return totals[..., 0] / totals[..., 1]
