"""The difference of a metric between two configurations, with its uncertainty over test prompts and training runs.

The test split is a sample of prompts, and a run is a sample of training seeds; others would give other values.
docs/verdicts.md explains and validates the method. Sources: Bouthillier et al. 2021, Accounting for Variance in Machine
Learning Benchmarks (https://arxiv.org/abs/2103.03098); Miller 2024, Adding Error Bars to Evals
(https://arxiv.org/abs/2411.00640).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

SIGNIFICANCE, POWER = 0.05, 0.8
MIN_P_VALUE = 1e-9  # smaller ones are not computed
PERMUTATIONS = 9_999
MAX_CHANGED = 50  # prompts; if more differ, a permutation test would not change the verdict
SEED = 0  # so that repeating a review gives the same result
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Runs:
    """A metric of one configuration: for each training run, sums and counts over examples. Their ratio is the metric.

    seeds: the training seed of each run.
    sums, counts: (runs, examples), such as loss and tokens; for a mean over examples the counts are 1.
    """

    seeds: Sequence[int]
    sums: Array
    counts: Array

    def by_prompt(self, prompts: npt.NDArray[np.int64]) -> Array:
        """Values for each run and prompt, (runs, prompts). Their mean over prompts is the metric of the run.

        They linearize the ratio (Cochran 1977, Sampling Techniques, ch. 6), so that their variance over prompts gives
        its standard error.
        """
        sums, counts = (np.stack([np.bincount(prompts, row) for row in cells]) for cells in (self.sums, self.counts))
        total = counts.sum(1, keepdims=True)
        ratios = sums.sum(1, keepdims=True) / total
        linear: Array = ratios + sums.shape[1] * (sums - ratios * counts) / total
        return linear

    def select(self, seeds: Sequence[int]) -> "Runs":
        rows = [self.seeds.index(seed) for seed in seeds]
        return Runs(seeds, self.sums[rows], self.counts[rows])


@dataclass(frozen=True)
class Variances:
    """Components of the variance of a difference, from runs that are crossed with prompts.

    per_prompt: variance of the run-averaged difference over prompts.
    per_run: variance of the mean of one run over runs. It includes residual ÷ num_prompts.
    residual: variance of one run and one prompt that neither explains.
    run_weight: 1 ÷ runs if the runs are paired by seed, otherwise the sum of 1 ÷ runs of both sides.
    freedom: degrees of freedom of `per_run`; 0 if run noise is not known.
    """

    num_prompts: int
    per_prompt: float
    per_run: float
    residual: float
    run_weight: float
    freedom: int

    @property
    def of_prompts(self) -> float:
        """Variance of the mean difference from the choice of prompts."""
        return self.per_prompt / self.num_prompts

    @property
    def of_runs(self) -> float:
        """Variance of the mean difference from the choice of training seeds."""
        return self.run_weight * max(0.0, self.per_run - self.residual / self.num_prompts)

    def half_width(self, significance: float = SIGNIFICANCE) -> float:
        """Half the width of the confidence interval of the mean difference.

        The squares of two t intervals are added, one for prompts and one for runs. The variance of the residual is in
        both. It is subtracted once, with the mean of both quantiles, because with few runs most of `per_run` may be
        residual, and its quantile is large. Simulations chose this (docs/verdicts.md).
        """
        of_prompts, of_runs = (
            float(stats.t.isf(significance / 2, freedom)) for freedom in (self.num_prompts - 1, self.freedom or np.inf)
        )
        residual = of_runs * of_prompts * self.residual / self.num_prompts
        runs = self.run_weight * max(0.0, of_runs**2 * self.per_run - residual)
        return math.sqrt(of_prompts**2 * self.of_prompts + runs)

    def p_value(self, value: float) -> float:
        """The significance at which the interval of a mean difference ends at 0."""
        if not value:
            return 1.0
        if self.half_width(MIN_P_VALUE) <= abs(value):
            return MIN_P_VALUE
        return float(optimize.brentq(lambda p: self.half_width(p) - abs(value), MIN_P_VALUE, 1.0))


@dataclass(frozen=True)
class Difference:
    """after − before, averaged over runs, with its 95% interval.

    p_value: the probability of a difference at least as large if the configurations are equal.
    by_seed: the difference between the runs of each seed that both sides have.
    run_noise: how it is known: "paired" by seed, or "pooled" over the runs of both sides. If None, it is not known, so
        the interval covers the choice of prompts alone, and the difference is one between two models.
    detectable: the smallest true difference that would be found significant with a probability of 80%.
    prompts_needed, runs_needed: about how many prompts, or runs per side, it takes to find the observed difference
        significant; None if more of these alone would not suffice.
    """

    before: float
    after: float
    low: float
    high: float
    p_value: float
    by_seed: dict[int, float]
    run_noise: Literal["paired", "pooled"] | None
    num_prompts: int
    detectable: float
    prompts_needed: int | None
    runs_needed: int | None

    @property
    def value(self) -> float:
        return self.after - self.before


def compare(before: Runs, after: Runs, prompts: npt.NDArray[np.int64]) -> Difference:
    """The difference of a metric between two configurations on the same test examples.

    Runs are paired by seed if both sides have at least two seeds in common; then the other runs are not used.

    Args:
        prompts: the number of each example's prompt, from 0. Prompts are the sampling unit, because answers to equal
            prompts are not independent. There are at least two.
    """
    common = [seed for seed in before.seeds if seed in after.seeds]
    is_paired = len(common) > 1
    if is_paired:
        before, after = before.select(common), after.select(common)
    first, second = before.by_prompt(prompts), after.by_prompt(prompts)
    if is_paired:
        variances = components([second - first], 1 / len(common), second.mean(0) - first.mean(0))
    else:
        weight = 1 / len(first) + 1 / len(second)
        variances = components([first, second], weight, second.mean(0) - first.mean(0))
    value = float(second.mean() - first.mean())
    half_width, p_value = variances.half_width(), variances.p_value(value)
    if p_value < SIGNIFICANCE:  # otherwise a permutation test would not change the verdict
        p_value = max(p_value, permutation_p_value(first.mean(0), second.mean(0)))
    return Difference(
        before=float(first.mean()),
        after=float(second.mean()),
        low=value - half_width,
        high=value + half_width,
        p_value=p_value,
        by_seed={
            seed: float(second[after.seeds.index(seed)].mean() - first[before.seeds.index(seed)].mean())
            for seed in common
        },
        run_noise=("paired" if is_paired else "pooled") if variances.freedom else None,
        num_prompts=variances.num_prompts,
        detectable=half_width + float(stats.norm.ppf(POWER)) * math.sqrt(variances.of_prompts + variances.of_runs),
        **sample_sizes(value, variances, 1 if is_paired else 2),
    )


def components(groups: Sequence[Array], run_weight: float, difference: Array) -> Variances:
    """The variance components of runs in one or two groups, each (runs, prompts). Runs differ only within a group.

    Args:
        difference: the run-averaged difference of each prompt.
    """
    num_prompts = len(difference)
    freedom = sum(len(group) - 1 for group in groups)
    per_run = residual = 0.0
    if freedom:
        # The sums of squares of a two-way analysis of variance without replication.
        means = [group.mean(1, keepdims=True) for group in groups]
        per_run = sum(float(((mean - mean.mean()) ** 2).sum()) for mean in means) / freedom
        rest = [group - mean - group.mean(0) + group.mean() for group, mean in zip(groups, means, strict=True)]
        residual = sum(float((part**2).sum()) for part in rest) / (freedom * (num_prompts - 1))
    return Variances(num_prompts, float(difference.var(ddof=1)), per_run, residual, run_weight, freedom)


def permutation_p_value(first: Array, second: Array) -> float:
    """The p-value of a paired permutation test over prompts, which needs no assumption about their distribution.

    It prevents errors with few or discrete values: if four answers of a hundred became correct, an interval excludes 0,
    although four coin flips are equal one time in eight. Returns 0 if more than `MAX_CHANGED` prompts differ.
    """
    changed = first != second  # only these matter, because swapping equal values has no effect
    if changed.sum() < 2 or changed.sum() > MAX_CHANGED:
        return float(changed.sum() < 2)

    def difference(before: Array, after: Array, axis: int) -> Array:
        values: Array = after.mean(axis) - before.mean(axis)
        return values

    test = stats.permutation_test(
        (first[changed], second[changed]),
        difference,
        permutation_type="samples",
        n_resamples=PERMUTATIONS,
        vectorized=True,
        rng=SEED,
    )
    return float(test.pvalue)


def sample_sizes(value: float, variances: Variances, run_factor: int) -> dict[str, int | None]:
    """How many prompts, or runs per side, it takes to detect `value` with the power 80%, in a normal approximation.

    Args:
        run_factor: the run weight of one run per side.
    """
    quantiles = float(stats.norm.ppf(1 - SIGNIFICANCE / 2) + stats.norm.ppf(POWER))
    allowed = (value / quantiles) ** 2  # the variance of the mean difference at which `value` is detectable
    run_variance = variances.of_runs / variances.run_weight

    def needed(variance: float, fixed: float) -> int | None:
        return math.ceil(variance / (allowed - fixed)) if allowed > fixed else None

    return {
        "prompts_needed": needed(variances.per_prompt, variances.of_runs),
        "runs_needed": needed(run_factor * run_variance, variances.of_prompts) if variances.freedom else None,
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, so that 5% is the probability of any false alarm (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted
