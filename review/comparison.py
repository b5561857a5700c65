"""Everything that a review reports about two revisions."""

from dataclasses import dataclass

import pandas as pd

from review.changes import (
    Change,
    StageRun,
    changed_metrics,
    changed_samples,
    find_changes,
    most_changed_examples,
    stages_that_ran,
)
from review.conditions import Conditions, changed_checks, changed_conditions, changed_scorers, read_conditions
from review.data_changes import DataChanges, changed_data
from review.harness import compare_harness
from review.must_pass import MustPass, compare_must_pass
from review.rescoring import find_rescoring
from review.revisions import Revision, output_hashes
from review.runs import METRICS_FILE
from review.verdicts import MetricResult, Results, compare_predictions
from review.votes import VoteResults, count_votes


@dataclass(frozen=True)
class Comparison:
    """The results of a review.

    outdated: the stages whose results do not belong to the code and parameters of their revision, by its name.
    conditions: gates and must-pass entries, which are those of `after`.
    changed_conditions: how they, and the checks of common rows, differ from those of `before`.
    changed_scorers: the changed lines of `scorers.py`.
    results: by split, test and retention; the retention set can be missing.
    must_pass: the must-pass examples; None if the predictions are not available.
    votes: the votes on the answers of these revisions; None if there are none.
    harness: the results of lm-evaluation-harness; None if a revision has none.
    other_metrics: changes in metrics that have no verdict.
    examples: the most changed test examples, with columns of `most_changed_examples`.
    """

    before: Revision
    after: Revision
    outdated: dict[str, list[str]]
    conditions: Conditions
    changed_conditions: list[Change]
    changed_scorers: list[str]
    params: list[Change]
    results: dict[str, Results]
    must_pass: list[MustPass] | None
    votes: VoteResults | None
    harness: Results | None
    other_metrics: list[Change]
    stages: list[StageRun]
    samples: list[Change]
    data: DataChanges
    examples: pd.DataFrame

    @property
    def test(self) -> Results:
        return self.results["test"]

    def find_metric(self, name: str) -> MetricResult | None:
        """The result of one metric: `loss` on the test split, or such as `retention.loss`."""
        split, _, metric = name.rpartition(".")
        results = self.results.get(split or "test")
        return results.metric(metric) if results else None

    def warnings(self) -> list[str]:
        """Why this is not an ordinary comparison, for the first lines of the report."""
        sides = self.before, self.after
        sentences = []
        if self.before.commit() == self.after.commit():
            sentences.append(f"{self.before.name} and {self.after.name} are the same commit, so nothing was compared.")
        for side in sides:
            if empty := [path for path in ("params.yaml", "dvc.lock") if not side.read_yaml(path)]:
                sentences.append(f"{side.name} has no {' and no '.join(empty)}, so there is nothing to compare with.")
            elif not side.read_json(METRICS_FILE):
                sentences.append(f"{side.name} has no {METRICS_FILE}, so its results are not compared.")
        return sentences


def compare_revisions(before: Revision, after: Revision) -> Comparison:
    """Compare all that a review reports, by the gates and must-pass entries of `after`."""
    locks = [side.read_yaml("dvc.lock") for side in (before, after)]
    sides = (before, after) if locks[0] else (after,)  # a base that never ran has no results that could be outdated
    old_conditions, conditions = (read_conditions(side) for side in (before, after))
    margins = {name: gate.not_worse_by for name, gate in conditions.gates.items() if gate.not_worse_by is not None}
    rescoring = find_rescoring(before, after)
    results = compare_predictions(before, after, margins, rescoring)
    joined = results["test"].joined
    data = changed_data(before, after, [output_hashes(lock) for lock in locks])
    changed = changed_conditions(old_conditions, conditions) + changed_checks(before, after, rescoring)
    return Comparison(
        before,
        after,
        outdated={side.name: stages for side in sides if (stages := side.outdated())},
        conditions=conditions,
        changed_conditions=changed,
        changed_scorers=changed_scorers(before, after),
        params=find_changes(before.read_yaml("params.yaml"), after.read_yaml("params.yaml")),
        results=results,
        must_pass=compare_must_pass(conditions.must_pass, before, after, rescoring) if conditions.must_pass else [],
        votes=count_votes(before, after),
        harness=compare_harness(before, after),
        other_metrics=changed_metrics(before, after, results),
        stages=stages_that_ran(*locks),
        samples=changed_samples(before, after),
        data=data,
        examples=pd.DataFrame(columns=["change"]) if joined is None else most_changed_examples(joined, after, data),
    )
