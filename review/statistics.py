"""The difference of a metric between two configurations, with its uncertainty over test prompts and training runs.

The test split is a sample of prompts, and a run is a sample of training seeds; others would give other values.
docs/verdicts.md explains and validates the method. Sources: Bouthillier et al. 2021, Accounting for Variance in Machine
Learning Benchmarks (https://arxiv.org/abs/2103.03098); Miller 2024, Adding Error Bars to Evals
(https://arxiv.org/abs/2411.00640).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

SIGNIFICANCE, POWER = 0.05, 0.8
MIN_P_VALUE = 1e-9  # smaller ones are not computed
PERMUTATIONS = 9_999
MAX_CHANGED = 50  # prompts; if more differ, the permutation test is skipped
DECIMALS = 12  # of metrics; smaller differences are rounding errors of sums
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
        sums = np.stack([np.bincount(prompts, run) for run in self.sums])
        counts = np.stack([np.bincount(prompts, run) for run in self.counts])
        total = counts.sum(1, keepdims=True)
        ratios = sums.sum(1, keepdims=True) / total
        linear: Array = ratios + sums.shape[1] * (sums - ratios * counts) / total
        return linear

    def of_seeds(self, seeds: Sequence[int]) -> "Runs":
        rows = [self.seeds.index(seed) for seed in seeds]
        return Runs(seeds, self.sums[rows], self.counts[rows])

    def of_examples(self, chosen: npt.NDArray[np.bool_]) -> "Runs":
        return Runs(self.seeds, self.sums[:, chosen], self.counts[:, chosen])


@dataclass(frozen=True)
class Variances:
    """Components of the variance of a difference, from runs that are crossed with prompts.

    per_prompt: variance of the run-averaged difference over prompts.
    per_run: variance of the mean of one run over runs. It includes residual ÷ num_prompts.
    residual: variance of one run and one prompt that neither explains.
    run_weight: 1 ÷ runs if the runs are paired by seed, otherwise the sum of 1 ÷ runs of both sides.
    freedom: degrees of freedom of `per_run`; 0 if run noise is not known.
    is_paired: whether runs are paired by seed.
    """

    num_prompts: int
    per_prompt: float
    per_run: float
    residual: float
    run_weight: float
    freedom: int
    is_paired: bool

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
        """The smallest significance level at which the interval of a mean difference excludes 0."""
        if not value:
            return 1.0
        if self.half_width(MIN_P_VALUE) <= abs(value):
            return MIN_P_VALUE
        return float(optimize.brentq(lambda p: self.half_width(p) - abs(value), MIN_P_VALUE, 1.0))

    @property
    def detectable(self) -> float:
        """The smallest true difference that is significant with a probability of 80%."""
        return self.half_width() + float(stats.norm.ppf(POWER)) * math.sqrt(self.of_prompts + self.of_runs)

    def with_prompts(self, num_prompts: int) -> "Variances":
        """The same variances with another number of prompts."""
        per_run = max(0.0, self.per_run - self.residual / self.num_prompts) + self.residual / num_prompts
        return replace(self, num_prompts=num_prompts, per_run=per_run)

    def with_runs(self, num_runs: int) -> "Variances":
        """The same variances with another number of runs of each side."""
        num_groups = 1 if self.is_paired else 2
        return replace(self, run_weight=num_groups / num_runs, freedom=num_groups * (num_runs - 1))


@dataclass(frozen=True)
class Difference:
    """after − before, averaged over runs, with its 95% interval.

    p_value: the probability of a difference at least as large if the configurations are equal.
    by_seed: the difference between the runs of each seed that both sides have.
    """

    before: float
    after: float
    low: float
    high: float
    p_value: float
    by_seed: dict[int, float]
    variances: Variances

    @property
    def value(self) -> float:
        return self.after - self.before

    @property
    def run_noise(self) -> Literal["paired", "pooled"] | None:
        """How run noise is known: from runs paired by seed, or pooled over both sides.

        If None, it is not known, so the interval covers the choice of prompts alone, and the difference is one between
        two models.
        """
        if not self.variances.freedom:
            return None
        return "paired" if self.variances.is_paired else "pooled"

    @cached_property
    def prompts_needed(self) -> int | None:
        """How many prompts it takes to detect the observed difference; None if prompts alone do not suffice."""
        current = self.variances.num_prompts
        numbers = (math.ceil(current * 1.1**power) for power in range(100))  # up to 12,500 times as many
        return next((n for n in numbers if self.variances.with_prompts(n).detectable <= abs(self.value)), None)

    @cached_property
    def runs_needed(self) -> int | None:
        """How many runs per side it takes to detect the observed difference; None if runs alone do not suffice."""
        if not self.variances.freedom:
            return None
        return next((n for n in range(2, 100) if self.variances.with_runs(n).detectable <= abs(self.value)), None)


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
        before, after = before.of_seeds(common), after.of_seeds(common)
    first, second = before.by_prompt(prompts), after.by_prompt(prompts)
    groups = [second - first] if is_paired else [first, second]
    difference = np.round(second.mean(0) - first.mean(0), DECIMALS)  # of each prompt
    variances, value = components(groups, difference, is_paired), float(difference.mean())
    before_mean, half_width, p_value = float(first.mean()), variances.half_width(), variances.p_value(value)
    if p_value < SIGNIFICANCE:
        p_value = max(p_value, permutation_p_value(difference))
    return Difference(
        before=before_mean,
        after=before_mean + value,
        low=value - half_width,
        high=value + half_width,
        p_value=p_value,
        by_seed={
            seed: float(second[after.seeds.index(seed)].mean() - first[before.seeds.index(seed)].mean())
            for seed in common
        },
        variances=variances,
    )


def components(groups: Sequence[Array], difference: Array, is_paired: bool) -> Variances:
    """The variance components of a difference.

    Args:
        groups: the differences of paired runs, or the values of the runs of both sides, each (runs, prompts).
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
    run_weight = sum(1 / len(group) for group in groups)
    return Variances(num_prompts, float(difference.var(ddof=1)), per_run, residual, run_weight, freedom, is_paired)


def permutation_p_value(difference: Array) -> float:
    """The p-value of a paired permutation test over prompts, which needs no assumption about their distribution.

    It prevents errors with few or discrete values: if four answers of a hundred became correct, an interval excludes 0,
    although four coin flips are equal one time in eight. It is skipped (0) if more than `MAX_CHANGED` prompts differ.
    """
    changed = difference[difference != 0]  # only these matter, because swapping equal values has no effect
    if len(changed) < 2 or len(changed) > MAX_CHANGED:
        return float(len(changed) < 2)
    # Of one sample, it swaps `before` and `after` of a prompt by changing the sign of their difference.
    test = stats.permutation_test(
        (changed,), np.mean, permutation_type="samples", n_resamples=PERMUTATIONS, vectorized=True, rng=SEED
    )
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, so that 5% is the probability of any false alarm (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    multiplied = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(np.minimum(multiplied, 1.0))
    return adjusted.tolist()
