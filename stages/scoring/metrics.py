"""The metrics of predictions: sums over examples ÷ counts, with standard errors over prompts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from operator import mul
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stages.scoring.scorers import PREFIX

if TYPE_CHECKING:
    import pandas as pd

LARGEST_LOSS = 100  # nats/token; of a higher one, no perplexity is computed, because it could overflow
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A sum over examples ÷ a count, such as loss ÷ supervised tokens.

    direction: 1 if higher is better, −1 if lower is better, 0 if neither.
    sums, counts: of each example.
    columns: those of the predictions that sums and counts are computed from.
    """

    name: str
    direction: int
    sums: Callable[["pd.DataFrame"], "pd.Series[Any]"]
    counts: Callable[["pd.DataFrame"], "pd.Series[Any]"]
    columns: tuple[str, ...]


def ratio_metric(name: str, direction: int, factors: list[str], divisors: list[str]) -> Metric:
    """The sum of a product of columns ÷ the sum of another product."""

    def product(columns: list[str], rows: "pd.DataFrame") -> "pd.Series[Any]":
        return reduce(mul, (rows[column] for column in columns))

    return Metric(name, direction, partial(product, factors), partial(product, divisors), (*factors, *divisors))


def per_example(name: str, direction: int, column: str) -> Metric:
    """The mean of a column over examples."""
    return Metric(name, direction, lambda rows: rows[column], lambda rows: rows[column] * 0 + 1, (column,))


def column_metric(name: str, direction: int, column: str) -> Metric:
    """The mean of a column over the examples that have a value."""
    return Metric(name, direction, lambda rows: rows[column].fillna(0), lambda rows: rows[column].notna(), (column,))


METRICS = (
    ratio_metric("loss", -1, ["loss", "tokens"], ["tokens"]),
    ratio_metric("token_accuracy", 1, ["correct_tokens"], ["tokens"]),
    ratio_metric("pass_rate", 1, ["passed"], ["checked", "num_answers"]),  # with several answers this is pass@1
    per_example("exact_match", 1, "exact_match"),
    per_example("rouge_l", 1, "rouge_l"),
    # An answer can't be as long as a reference that does not fit into max_new_tokens, so those are not counted.
    ratio_metric("stop_rate", 1, ["stopped", "reference_fits"], ["reference_fits"]),
    per_example("repetition", -1, "repetition"),
    per_example("mean_response_tokens", 0, "answer_tokens"),
)
OPEN_REASONING = per_example("open_reasoning", -1, "open_reasoning")  # only of predictions with reasoning


def all_metrics(rows: "pd.DataFrame") -> list[Metric]:
    """The metrics of predictions: `METRICS`, pass@k if there are several answers, and those of `scorers.py`."""
    num_answers = int(rows["num_answers"].max()) if "num_answers" in rows else 1
    powers = (2**exponent for exponent in range(1, num_answers.bit_length()))
    scorers = [column for column in rows if column.startswith(PREFIX)]
    has_reasoning = "reasoning" in rows and (rows["reasoning"].notna() | (rows["open_reasoning"].fillna(0) > 0)).any()
    return [
        *METRICS,
        *([OPEN_REASONING] if has_reasoning else []),
        *map(pass_at, powers),
        *(column_metric(column.removeprefix(PREFIX), 1, column) for column in scorers),
    ]


def pass_at(k: int) -> Metric:
    """The probability that one of k answers passes: 1 − C(n − passed, k) / C(n, k), averaged over examples.

    This is the unbiased estimator from n answers (Chen et al. 2021, Evaluating Large Language Models Trained on Code,
    https://arxiv.org/abs/2107.03374). It is not defined for fewer than k answers.
    """

    def probability(rows: "pd.DataFrame") -> "pd.Series[Any]":
        pairs = zip(rows["num_answers"], rows["passed"], strict=True)
        values = [1 - math.comb(n - passed, k) / math.comb(n, k) if n >= k else math.nan for n, passed in pairs]
        return rows["checked"] * np.array(values)

    return Metric(f"pass_at_{k}", 1, probability, lambda rows: rows["checked"], ("passed", "checked", "num_answers"))


def metrics_by_slice(rows: "pd.DataFrame") -> dict[str, Any]:
    """All metrics, and under `slices` those of each slice if there are several."""
    slices = {value: compute_metrics(part) for value, part in rows.groupby("slice")}
    return compute_metrics(rows) | ({"slices": slices} if len(slices) > 1 else {})


def compute_metrics(rows: "pd.DataFrame") -> dict[str, Any]:
    """All metrics with their standard errors; None if no example counts, or for the standard error of a single one."""
    metrics: dict[str, Any] = {"examples": len(rows), "supervised_tokens": int(rows["tokens"].sum())}
    for metric in all_metrics(rows):
        sums = metric.sums(rows).astype(float).groupby(rows["prompt_id"]).sum()
        counts = metric.counts(rows).astype(float).groupby(rows["prompt_id"]).sum()
        value, error = ratio(sums.to_numpy(), counts.to_numpy())
        metrics |= {metric.name: value, f"{metric.name}_se": error}
        if metric.name == "loss" and value is not None and value < LARGEST_LOSS:
            perplexity = math.exp(value)
            metrics |= {"perplexity": perplexity, "perplexity_se": error and perplexity * error}  # delta method
    return metrics


def ratio(sums: Array, counts: Array) -> tuple[float | None, float | None]:
    """sums / counts over all prompts, and its standard error with the prompt as the sampling unit.

    Tokens of the same prompt are not independent, so a standard error over tokens would be too small. This is the ratio
    estimator (Cochran, Sampling Techniques, 1977, ch. 6). sums and counts: (prompts,).
    """
    if not counts.any():
        return None, None
    value = float(sums.sum() / counts.sum())
    num_prompts = int(np.count_nonzero(counts))
    if num_prompts < 2:
        return value, None
    residuals = sums - value * counts
    return value, float(math.sqrt((residuals**2).sum() * num_prompts / (num_prompts - 1)) / counts.sum())
