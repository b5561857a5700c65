"""Everything that a review reports about two revisions."""

from collections import Counter

from review.changes import changed_metrics, changed_samples, find_changes, most_changed_examples, stages_that_ran
from review.conditions import Conditions, changed_checks, changed_conditions, changed_scorers
from review.data_changes import changed_data
from review.harness import compare_harness
from review.must_pass import compare_must_pass
from review.rescoring import find_rescoring
from review.revisions import Revision, output_hashes
from review.runs import METRICS_FILE
from review.verdicts import MetricResult, Results, compare_predictions
from review.votes import count_votes
from stages.scoring.scorers import SCORERS


class Comparison:
    """The results of a review, by the gates and must-pass entries of `after`."""

    def __init__(self, before: Revision, after: Revision):
        self.before, self.after = before, after
        locks = [side.read_yaml("dvc.lock") for side in (before, after)]
        revisions = (before, after) if locks[0] else (after,)  # a base that never ran has no outdated results
        # The stages whose results do not belong to the code and parameters of their revision, by its name.
        self.outdated = {side.name: stages for side in revisions if (stages := side.outdated())}
        rescoring = find_rescoring(before, after)
        old_conditions, self.conditions = Conditions(before), Conditions(after)
        self.changed_conditions = changed_conditions(old_conditions, self.conditions)
        self.changed_conditions += changed_checks(before, after, rescoring)
        self.changed_scorers = changed_scorers(before, after)
        self.params = find_changes(before.read_yaml("params.yaml"), after.read_yaml("params.yaml"))
        self.stages = stages_that_ran(*locks)

        gates = self.conditions.gates
        margins = {name: gate.not_worse_by for name, gate in gates.items() if gate.not_worse_by is not None}
        # By split, test and retention; the retention set can be missing.
        self.results = compare_predictions(before, after, margins, rescoring)
        entries = self.conditions.must_pass
        # None if the predictions are not available.
        self.must_pass = compare_must_pass(entries, before, after, rescoring) if entries else []
        self.votes = count_votes(before, after)
        self.harness = compare_harness(before, after)
        # Those that have no verdict.
        self.other_metrics = changed_metrics(before, after, self.results)

        self.data = changed_data(before, after, [output_hashes(lock) for lock in locks])
        self.samples = changed_samples(before, after)
        self.examples = most_changed_examples(self.test.joined, after, self.data)

    @property
    def test(self) -> Results:
        return self.results["test"]

    def find_metric(self, name: str) -> MetricResult | None:
        """The result of one metric: `loss` on the test split, or such as `retention.loss`."""
        split, _, metric = name.rpartition(".")
        results = self.results.get(split or "test")
        return results.metric(metric) if results else None

    def changed_kinds(self) -> list[str]:
        """What decides a review and differs between the revisions, with the number of changes."""
        counts = Counter(change.name.partition(":")[0] for change in self.changed_conditions)
        if self.changed_scorers:
            counts[str(SCORERS)] = sum(line.startswith(("+", "-")) for line in self.changed_scorers[2:])
        return [f"{name} ({number:,})" for name, number in counts.items()]

    def warnings(self) -> list[str]:
        """Why this is not an ordinary comparison, for the first lines of the report."""
        sentences = []
        if self.before.commit() == self.after.commit():
            sentences.append(f"{self.before.name} and {self.after.name} are the same commit, so nothing was compared.")
        for side in (self.before, self.after):
            if empty := [path for path in ("params.yaml", "dvc.lock") if not side.read_yaml(path)]:
                sentences.append(f"{side.name} has no {' and no '.join(empty)}, so there is nothing to compare with.")
            elif not side.read_json(METRICS_FILE):
                sentences.append(f"{side.name} has no {METRICS_FILE}, so its results are not compared.")
        return sentences
