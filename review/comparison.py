"""Everything that a review reports about two revisions."""

from dataclasses import dataclass

from review.changes import (
    TEST,
    Change,
    ExampleChange,
    StageRun,
    changed_metrics,
    changed_samples,
    find_changes,
    most_changed_examples,
    output_hashes,
    stages_that_ran,
)
from review.revisions import Revision
from review.verdicts import PREDICTIONS, MetricResult, compare_predictions


@dataclass(frozen=True)
class Comparison:
    """The results of a review.

    same_test_set: whether `dvc.lock` of both revisions has the same hash of the test split.
    other_metrics: changes in metrics that have no verdict.
    notes: sentences about the limits of the comparison of metrics.
    """

    before: Revision
    after: Revision
    params: list[Change]
    metrics: list[MetricResult]
    same_test_set: bool
    other_metrics: list[Change]
    stages: list[StageRun]
    samples: list[Change]
    examples: list[ExampleChange]
    notes: list[str]

    def metric(self, name: str) -> MetricResult:
        return next(result for result in self.metrics if result.metric.name == name)


def compare_revisions(before: Revision, after: Revision) -> Comparison:
    """Compare all that a review reports."""
    locks = [side.read_yaml("dvc.lock") for side in (before, after)]
    hashes = [output_hashes(lock) for lock in locks]
    same_test_set = hashes[0].get(TEST) == hashes[1].get(TEST) is not None
    same_predictions = hashes[0].get(PREDICTIONS) == hashes[1].get(PREDICTIONS) is not None
    results = compare_predictions(before, after, same_test_set, same_predictions)
    return Comparison(
        before,
        after,
        params=find_changes(before.read_yaml("params.yaml"), after.read_yaml("params.yaml")),
        metrics=results.metrics,
        same_test_set=same_test_set,
        other_metrics=changed_metrics(before, after),
        stages=stages_that_ran(*locks),
        samples=changed_samples(before, after),
        examples=[] if results.joined is None else most_changed_examples(results.joined, after),
        notes=results.notes,
    )
