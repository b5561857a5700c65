"""Everything that a review reports about two revisions."""

from collections.abc import Mapping, Sequence
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
from review.harness import compare_harness
from review.must_pass import MustPass, compare_must_pass
from review.revisions import Revision, output_hashes
from review.verdicts import MetricResult, Results, compare_predictions
from review.votes import VoteResults, count_votes


@dataclass(frozen=True)
class Comparison:
    """The results of a review.

    results: by split, test and retention; the retention set can be missing.
    must_pass: the must-pass examples; None if the predictions are not available.
    votes: the votes on the answers of these revisions; None if there are none.
    harness: the results of lm-evaluation-harness; None if a revision has none.
    other_metrics: changes in metrics that have no verdict.
    """

    before: Revision
    after: Revision
    params: list[Change]
    results: dict[str, Results]
    must_pass: list[MustPass] | None
    votes: VoteResults | None
    harness: Results | None
    other_metrics: list[Change]
    stages: list[StageRun]
    samples: list[Change]
    data: DataChanges
    examples: list[ExampleChange]

    @property
    def test(self) -> Results:
        return self.results["test"]

    def find_metric(self, name: str) -> tuple[Results, MetricResult] | None:
        """The results on a split, and that of one metric: `loss` on the test split, or such as `retention.loss`."""
        split, _, metric = name.rpartition(".")
        results = self.results.get(split or "test")
        found = results and results.metric(metric)
        return (results, found) if results and found else None


def compare_revisions(
    before: Revision, after: Revision, margins: Mapping[str, float], must_pass: Sequence[str] = ()
) -> Comparison:
    """Compare all that a review reports.

    Args:
        margins: the difference that a gate tolerates, by metric.
        must_pass: prompts or ids of test rows.
    """
    locks = [side.read_yaml("dvc.lock") for side in (before, after)]
    results = compare_predictions(before, after, margins)
    joined = results["test"].joined
    data = changed_data(before, after, [output_hashes(lock) for lock in locks])
    return Comparison(
        before,
        after,
        params=find_changes(before.read_yaml("params.yaml"), after.read_yaml("params.yaml")),
        results=results,
        must_pass=compare_must_pass(must_pass, before, after) if must_pass else [],
        votes=count_votes(before, after),
        harness=compare_harness(before, after),
        other_metrics=changed_metrics(before, after, results),
        stages=stages_that_ran(*locks),
        samples=changed_samples(before, after),
        data=data,
        examples=[] if joined is None else most_changed_examples(joined, after, data),
    )
