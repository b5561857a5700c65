"""Is a difference real? Paired comparison of two models on the same test examples.

The test split is a sample: another one would have given other numbers. An example that is hard for one model is mostly
hard for the other, so pairs tell far smaller differences apart than two standard errors could.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
SIGNIFICANCE = 0.05
SEED = 0  # the same review twice says the same
CELLS_AT_ONCE = 10_000_000  # of a block of resamples: bounds memory
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """after - before, its 95 % interval, and how often chance alone makes one as large.

    The interval is the percentile interval of a paired bootstrap over examples (Efron and Tibshirani, 1993, ch. 13). It
    is too sure of itself where few examples differ at all: four answers of a hundred that turned right leave 0 out of
    it, though a coin falls on the same side four times in a row one time in eight. So `p_value` is asked as well: the
    share of random swaps of before and after, example by example, that make a difference at least as large (a
    permutation test, Good, 2005).
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
    def is_real(self) -> bool:
        return (self.low > 0 or self.high < 0) and self.p_value < SIGNIFICANCE


def compare(before: tuple[Array, Array], after: tuple[Array, Array]) -> list[Difference]:
    """The difference of each metric between two models.

    Args:
        before: sums and counts, each (metrics, examples). A metric is the sum of its sums ÷ the sum of its counts, as
            loss ÷ tokens; for a mean over examples the counts are 1.
        after: the same, of the same examples in the same order.
    """
    table = np.stack([np.stack(before, -1), np.stack(after, -1)])  # (sides, metrics, examples, sum and count)
    changes = table[0] - table[1]
    totals = table.sum(2)
    found_before, found_after = ratios(totals)
    found = found_after - found_before

    num_examples = table.shape[2]
    random = np.random.default_rng(SEED)
    resampled, at_least_as_large = [], np.zeros(len(found))
    block = max(1, CELLS_AT_ONCE // num_examples)
    for start in range(0, RESAMPLES, block):
        num = min(block, RESAMPLES - start)
        # How often each example was drawn; all metrics see the same draws.
        drawn = random.multinomial(num_examples, np.full(num_examples, 1 / num_examples), size=num)
        values = ratios(np.tensordot(drawn, table, (1, 2)))  # (resamples, sides, metrics)
        resampled.append(values[:, 1] - values[:, 0])

        swapped = np.tensordot(random.integers(2, size=(num, num_examples)), changes, (1, 1))
        by_chance = ratios(totals[1] + swapped) - ratios(totals[0] - swapped)
        at_least_as_large += (np.abs(by_chance) >= np.abs(found) * (1 - 1e-9)).sum(0)
    low, high = np.quantile(np.concatenate(resampled), [SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2], axis=0)
    p_values = (at_least_as_large + 1) / (RESAMPLES + 1)
    return [
        Difference(*(float(value) for value in values))
        for values in zip(found_before, found_after, low, high, p_values, strict=True)
    ]


def ratios(totals: Array) -> Array:
    """Sum ÷ count, the last axis of `totals`."""
    return totals[..., 0] / totals[..., 1]
