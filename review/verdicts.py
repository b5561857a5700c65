"""A verdict for each metric, from the predictions of both revisions on their common test examples."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from review.revisions import Revision
from review.statistics import Array, Difference, compare

PREDICTIONS, METRICS = "data/predictions/tuned.parquet", "metrics/evaluate/tuned.json"
BEFORE, AFTER = "_before", "_after"  # suffixes of the columns of joined predictions


@dataclass(frozen=True)
class Metric:
    """A metric of the test split: a sum over examples ÷ a count.

    Attributes:
        direction: -1 if lower is better, 1 if higher is better, 0 if neither.
        sums: the sum of each example, from its predictions.
        per_token: True if the count is supervised tokens, False if it is examples.
    """

    name: str
    direction: int
    sums: Callable[[pd.DataFrame], "pd.Series[float]"]
    per_token: bool = False


MEASURED = (
    Metric("loss", -1, lambda rows: rows["loss"] * rows["tokens"], per_token=True),
    Metric("token_accuracy", 1, lambda rows: rows["correct_tokens"], per_token=True),
    Metric("exact_match", 1, lambda rows: rows["exact_match"]),
    Metric("rouge_l", 1, lambda rows: rows["rouge_l"]),
    Metric("stop_rate", 1, lambda rows: rows["stopped"]),
    Metric("mean_response_tokens", 0, lambda rows: rows["answer_tokens"]),
)


@dataclass(frozen=True)
class MetricResult:
    """One metric of both revisions. `difference` is None if it can't be computed; then `verdict` gives the reason."""

    metric: Metric
    before: float | None
    after: float | None
    difference: Difference | None
    verdict: str


@dataclass(frozen=True)
class Results:
    """The result of each metric, notes for the reader, and the joined predictions of both revisions, if available."""

    metrics: list[MetricResult]
    notes: list[str]
    joined: pd.DataFrame | None = None


def compare_predictions(before: Revision, after: Revision, same_test_set: bool, same_predictions: bool) -> Results:
    """Compare all metrics.

    Args:
        same_test_set, same_predictions: according to the hashes in `dvc.lock`, so that equal data is not fetched.
    """
    known = [side.read_json(METRICS) for side in (before, after)]

    def without_difference(verdict: str, *notes: str) -> Results:
        first, second = known
        results = [
            MetricResult(metric, first.get(metric.name), second.get(metric.name), None, verdict) for metric in MEASURED
        ]
        return Results(results, list(notes))

    if not all(known):
        which = " and ".join(side.name for side, metrics in zip((before, after), known, strict=True) if not metrics)
        return without_difference("not known", f"{which} has no {METRICS}; `dvc repro` writes it.")
    if same_predictions and known[0] == known[1]:
        return without_difference("the same", "Both revisions have bit-identical predictions on the test split.")
    tables = [side.read_table(PREDICTIONS) for side in (before, after)]
    if tables[0] is None or tables[1] is None:
        return without_difference("not known: no predictions", *([] if same_test_set else ["The test sets differ."]))

    joined = tables[0].merge(tables[1], on="example_id", suffixes=(BEFORE, AFTER), validate="one_to_one")
    notes = []
    if not len(joined) == len(tables[0]) == len(tables[1]):
        notes.append(
            f"The test sets differ: {before.name} has {len(tables[0]):,} examples, {after.name} {len(tables[1]):,}. "
            f"Only the {len(joined):,} common ones are compared, so the values differ from those in {METRICS}."
        )
    if len(joined) < 2:
        return without_difference("not known: no common examples", *notes)
    num_changed = int((joined["tokens" + BEFORE] != joined["tokens" + AFTER]).sum())
    if num_changed:
        notes.append(
            f"{num_changed:,} of {len(joined):,} examples differ in their number of supervised tokens (another "
            "tokenizer, template or max_length), so loss and token accuracy can't be compared."
        )
    differences = compare(sums_and_counts(joined, BEFORE), sums_and_counts(joined, AFTER))
    results = []
    for metric, difference in zip(MEASURED, differences, strict=True):
        comparable = not (num_changed and metric.per_token)
        verdict = verdict_of(metric, difference) if comparable else "can't be compared"
        found = difference if comparable else None
        results.append(MetricResult(metric, difference.before, difference.after, found, verdict))
    return Results(results, notes, joined)


def sums_and_counts(joined: pd.DataFrame, side: str) -> tuple[Array, Array]:
    """The sums and the counts of all metrics for one side of joined predictions, each (metrics, examples)."""
    rows = joined.filter(like=side).rename(columns=lambda name: name.removesuffix(side))
    counts = [rows["tokens"] if metric.per_token else pd.Series(1, rows.index) for metric in MEASURED]
    return np.array([metric.sums(rows) for metric in MEASURED], float), np.array(counts, float)


def verdict_of(metric: Metric, difference: Difference) -> str:
    if difference.value == 0 and difference.low == difference.high:
        return "the same"
    if not difference.is_significant:
        return "within noise"
    if not metric.direction:
        return "higher" if difference.value > 0 else "lower"
    return "better" if difference.value * metric.direction > 0 else "worse"
