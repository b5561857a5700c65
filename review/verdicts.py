"""A verdict for each metric and slice, from the predictions of all runs of both revisions on their common examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from review.rescoring import Rescoring
from review.revisions import Revision
from review.runs import METRICS_FILE, RevisionRuns, find_runs, metrics_of_split, read_runs
from review.statistics import SIGNIFICANCE, Difference, Runs, compare, holm
from stages.scoring.metrics import METRICS, OPEN_REASONING, Metric, all_metrics, column_metric

MIN_EXAMPLES, MIN_SHARE = 30, 0.5  # of the test examples; with fewer in common, every verdict is "undecided"
MEASURE_NOISE = "dvc exp run -S 'replicate_seeds=[1,2]'"  # with other numbers if one is the seed of train
PREFIXES = {"test": "", "retention": "retention."}  # of the names of metrics, by split
RUN_NOISE_UNKNOWN = "run noise is not known"


@dataclass(frozen=True)
class MetricResult:
    """One metric of both revisions, over all common examples or those of one slice.

    before, after: averages over the runs.
    difference: None if it can't be computed; then `verdict` gives the reason.
    p_value: adjusted for the number of metrics (or slices and metrics) that were tested.
    verdict: better, worse, higher, lower, equivalent, undecided, the same, unknown, or why there is no difference.
    is_small: whether too few examples are common for a verdict.
    """

    metric: Metric
    before: float | None = None
    after: float | None = None
    difference: Difference | None = None
    p_value: float = 1.0
    verdict: str = "undecided"
    slice: str | None = None
    is_small: bool = False

    @property
    def is_significant(self) -> bool:
        return self.p_value < SIGNIFICANCE


@dataclass(frozen=True)
class Results:
    """The result of each metric and of each slice, on one split.

    notes: sentences about the limits of the comparison.
    joined: `example_id`, and loss and answer of both sides, for one run of each, with the same seed if possible.
    """

    metrics: list[MetricResult]
    notes: list[str]
    slices: list[MetricResult]
    joined: pd.DataFrame | None = None

    def metric(self, name: str) -> MetricResult | None:
        return next((result for result in self.metrics if result.metric.name == name), None)


def compare_predictions(
    before: Revision, after: Revision, margins: Mapping[str, float], rescoring: Rescoring
) -> dict[str, Results]:
    """Compare all metrics on the test split, and on the retention set if both revisions have one.

    Args:
        margins: the difference that a gate tolerates, by metric; those on the retention set as `retention.loss`.
        rescoring: how answers are scored again before they are compared.
    """
    metrics_files = [side.read_json(METRICS_FILE) for side in (before, after)]
    runs = [find_runs(side) for side in (before, after)]
    splits = ["test", *(["retention"] if all("retention" in metrics for metrics in metrics_files) else [])]

    def without_difference(verdict: str, *notes: str) -> dict[str, Results]:
        results = {}
        for split in splits:
            first, second = (metrics_of_split(metrics, split) for metrics in metrics_files)
            metrics = [
                MetricResult(metric, first.get(metric.name), second.get(metric.name), verdict=verdict)
                for metric in metrics_of_files(first, second)
            ]
            results[split] = Results(metrics, [*runs[0].notes, *runs[1].notes, *notes] if split == "test" else [], [])
        return results

    if not all(metrics_files):
        missing = " and ".join(
            side.name for side, metrics in zip((before, after), metrics_files, strict=True) if not metrics
        )
        return without_difference("not measured", f"{missing} has no {METRICS_FILE}; `dvc repro` writes it.")
    common_seeds = runs[0].hashes.keys() & runs[1].hashes.keys()
    if common_seeds and all(runs[0].hashes[seed] == runs[1].hashes[seed] != "" for seed in common_seeds):
        return without_difference("the same", "Both revisions have bit-identical predictions.")
    read_runs(before, runs[0], rescoring)
    read_runs(after, runs[1], rescoring)
    if not runs[0].tables or not runs[1].tables:
        return without_difference("not measured: no predictions")
    results = {}
    for split in splits:
        first, second = (side.of_split(split) for side in runs)
        prefix = PREFIXES[split]
        of_split = {name.removeprefix(prefix): margin for name, margin in margins.items() if name.startswith(prefix)}
        results[split] = compare_runs(first, second, (before.name, after.name), of_split, split)
    results["test"].notes[:0] = [*runs[0].notes, *runs[1].notes, *rescoring.notes]
    return results


def metrics_of_files(*files: Mapping[str, Any]) -> list[Metric]:
    """The metrics that have a standard error in metrics files; those of `scorers.py` and pass@k follow `METRICS`."""
    built_in = {metric.name: metric for metric in (*METRICS, OPEN_REASONING)}
    names = [name.removesuffix("_se") for file in files for name in file if name.endswith("_se")]
    others = {name: column_metric(name, 1, name) for name in names if name not in built_in and name != "perplexity"}
    return [*(built_in | others).values()]


def compare_runs(
    before: RevisionRuns,
    after: RevisionRuns,
    names: tuple[str, str],
    margins: Mapping[str, float],
    split: str = "test",
    metrics: Sequence[Metric] | None = None,
) -> Results:
    """Compare the tables of both sides, which have at least one each.

    Args:
        metrics: those of tables that are not predictions.
    """
    notes: list[str] = []
    first, second = (next(iter(side.tables.values())) for side in (before, after))
    common = first.index[first.index.isin(second.index)]
    is_small = len(common) < max(MIN_EXAMPLES, MIN_SHARE * max(len(first), len(second)))
    if not len(common) == len(first) == len(second):
        notes.append(
            f"The {split} sets differ: {names[0]} has {len(first):,} examples, {names[1]} {len(second):,}. Only the "
            f"{len(common):,} common ones are compared, so the values differ from those of all examples."
        )
    if is_small:
        notes.append(
            f"{len(common):,} common examples are too few for a verdict; at least {MIN_EXAMPLES} and at least half of "
            f"each {split} set are needed."
        )
    # Older predictions may not have these columns.
    older, newer = (table.reindex(index=common, columns=["prompt_id", "slice"]) for table in (first, second))
    examples = newer.where(newer.notna(), older)
    prompts = examples["prompt_id"].where(examples["prompt_id"].notna(), examples.index.to_series())
    slice_names = sorted(examples["slice"].dropna().unique())
    if metrics is None:
        metrics = [*{metric.name: metric for table in (first, second) for metric in all_metrics(table)}.values()]
    results, slices = [], []
    for metric in metrics:
        try:
            both = metric_runs(metric, before, common, names[0]), metric_runs(metric, after, common, names[1])
            check_equal_tokens(metric, *both)
        except NotComparableError as error:
            notes.append(f"{metric.name} can't be compared: {error}.")
            results.append(MetricResult(metric, verdict="can't be compared"))
            continue
        result = compare_metric(metric, *both, prompts, np.ones(len(common), bool))
        results.append(replace(result, is_small=is_small))
        if metric.direction and len(slice_names) > 1:
            for name in slice_names:
                result = compare_metric(metric, *both, prompts, (examples["slice"] == name).to_numpy())
                slices.append(replace(result, slice=name, is_small=is_small))
    return Results(judge(results, margins), notes, judge(slices, {}), join_answers(before, after, common))


def join_answers(before: RevisionRuns, after: RevisionRuns, common: pd.Index) -> pd.DataFrame:
    """`Results.joined` for the common examples."""
    seed = next((seed for seed in before.tables if seed in after.tables), None)
    tables = [side.tables[next(iter(side.tables)) if seed is None else seed] for side in (before, after)]
    old, new = (table.loc[common].reindex(columns=["loss", "answer"]) for table in tables)
    return old.add_suffix("_before").join(new.add_suffix("_after")).reset_index()


class NotComparableError(Exception):
    """Why a metric can't be compared."""


def metric_runs(metric: Metric, side: RevisionRuns, common: pd.Index, name: str) -> Runs:
    """The runs of a metric on the common examples.

    Raises:
        NotComparableError: the predictions of a run lack it.
    """
    sums, counts = [], []
    for table in side.tables.values():
        if missing := [column for column in metric.columns if column not in table]:
            raise NotComparableError(f"the predictions of {name} have no {missing[0]}")
        rows = table.loc[common]
        sums.append(np.asarray(metric.sums(rows), float))
        counts.append(np.asarray(metric.counts(rows), float))
    runs = Runs(list(side.tables), np.array(sums), np.array(counts))
    has_value = (np.isfinite(runs.sums) & np.isfinite(runs.counts)).all(axis=0)
    if not has_value.all():
        raise NotComparableError(f"{(~has_value).sum():,} examples of {name} have no value")
    return runs


def check_equal_tokens(metric: Metric, first: Runs, second: Runs) -> None:
    """Check that both sides have the same number of supervised tokens, if the metric is one of tokens.

    Raises:
        NotComparableError: they differ.
    """
    num_different = int((first.counts[:1] != second.counts[:1]).sum()) if "tokens" in metric.columns else 0
    if num_different:
        raise NotComparableError(
            f"{num_different:,} examples differ in their number of supervised tokens, because of another tokenizer, "
            "template or max_length"
        )


def compare_metric(
    metric: Metric, before: Runs, after: Runs, prompts: "pd.Series[str]", chosen: npt.NDArray[np.bool_]
) -> MetricResult:
    """Compare a metric on the chosen examples that count for it in all runs. Its verdict is still missing."""
    chosen = chosen & before.counts.all(axis=0) & after.counts.all(axis=0)
    if not chosen.any():
        return MetricResult(metric, verdict="not measured: applies to no example")
    before, after = before.of_examples(chosen), after.of_examples(chosen)
    numbers = pd.factorize(prompts[chosen])[0]
    if numbers.max() < 1:
        old, new = (float((runs.sums.sum(1) / runs.counts.sum(1)).mean()) for runs in (before, after))
        return MetricResult(metric, old, new, verdict="undecided: a single prompt")
    difference = compare(before, after, numbers)
    return MetricResult(metric, difference.before, difference.after, difference, difference.p_value)


def judge(results: Sequence[MetricResult], margins: Mapping[str, float]) -> list[MetricResult]:
    """Give each result with a difference its verdict; p-values of metrics with a direction are adjusted (Holm)."""
    p_values = [result.difference.p_value for result in results if result.difference and result.metric.direction]
    adjusted = iter(holm(p_values))
    judged = []
    for result in results:
        if result.difference and result.metric.direction:
            result = replace(result, p_value=next(adjusted))
        if result.difference:
            verdict = verdict_of(result, result.difference, margins.get(result.metric.name))
            result = replace(result, verdict=verdict)
        judged.append(result)
    return judged


def verdict_of(result: MetricResult, difference: Difference, margin: float | None) -> str:
    if result.is_small:
        return "undecided"
    if difference.value == difference.low == difference.high == 0:
        return "the same"
    if difference.run_noise is None:
        return "unknown"
    direction = result.metric.direction
    if result.is_significant:
        if not direction:
            return "higher" if difference.value > 0 else "lower"
        return "better" if difference.value * direction > 0 else "worse"
    if margin is not None and -margin <= difference.low and difference.high <= margin:
        return "equivalent"
    return "undecided"


def describe_difference(difference: Difference) -> str:
    """A difference with its interval in words, and what the interval covers.

    Example:
        >>> describe_difference(difference)
        '−0.0238, 95% interval −0.0331 to −0.0145; 3 runs paired by seed'
    """
    noise = {
        "paired": f"{len(difference.by_seed)} runs paired by seed",
        "pooled": "run noise pooled over both sides",
        None: f"between these two models; {RUN_NOISE_UNKNOWN}",
    }[difference.run_noise]
    return f"{signed(difference.value)}, 95% interval {signed(difference.low)} to {signed(difference.high)}; {noise}"


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")
