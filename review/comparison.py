"""Everything that a review reports about two revisions."""

from collections.abc import Mapping
from dataclasses import dataclass

from review.changes import (
    Change,
    ExampleChange,
    StageRun,
    changed_metrics,
    changed_samples,
    find_changes,
    most_changed_examples,
    stages_that_ran,
)
from review.data_changes import DataChanges, changed_data
from review.revisions import Revision, output_hashes
from review.verdicts import MetricResult, compare_predictions


@dataclass(frozen=True)
class Comparison:
    """The results of a review.

    slices: the results of each slice, if there are several.
    is_small: whether too few examples are common for a verdict.
    other_metrics: changes in metrics that have no verdict.
    notes: sentences about the limits of the comparison of metrics.
    """

    before: Revision
    after: Revision
    params: list[Change]
    metrics: list[MetricResult]
    slices: list[MetricResult]
    is_small: bool
    other_metrics: list[Change]
    stages: list[StageRun]
    samples: list[Change]
    data: DataChanges
    examples: list[ExampleChange]
    notes: list[str]

    def metric(self, name: str) -> MetricResult:
        return next(result for result in self.metrics if result.metric.name == name)


def compare_revisions(before: Revision, after: Revision, margins: Mapping[str, float]) -> Comparison:
    """Compare all that a review reports.

    Args:
        margins: the difference that a gate tolerates, by metric.
    """
    locks = [side.read_yaml("dvc.lock") for side in (before, after)]
    results = compare_predictions(before, after, margins)
    data = changed_data(before, after, [output_hashes(lock) for lock in locks])
    return Comparison(
        before,
        after,
        params=find_changes(before.read_yaml("params.yaml"), after.read_yaml("params.yaml")),
        metrics=results.metrics,
        slices=results.slices,
        is_small=results.is_small,
        other_metrics=changed_metrics(before, after),
        stages=stages_that_ran(*locks),
        samples=changed_samples(before, after),
        data=data,
        examples=[] if results.joined is None else most_changed_examples(results.joined, after, data),
        notes=results.notes,
    )
