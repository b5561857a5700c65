"""Check the conditions that a change must meet to be merged, from `gates.yaml` and `must_pass.yaml`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from review.comparison import Comparison
from review.conditions import MUST_PASS, Gate
from review.must_pass import BAD, MustPass, counted
from review.revisions import Revision
from review.runs import METRICS_FILE, metrics_of_split
from review.verdicts import PREFIXES, describe_difference

NOTHING_TO_COMPARE = "nothing to compare with"


@dataclass(frozen=True)
class GateResult:
    """One condition and whether it passed; `found` says what was found and, if it failed, what to do."""

    rule: str
    passed: bool
    found: str

    @property
    def sentence(self) -> str:
        return f"{'passed' if self.passed else 'failed'}: {self.rule}; found: {self.found}"


def check_gates(comparison: Comparison) -> list[GateResult]:
    """Check all gates, and that no must-pass example is broken if there are some.

    No gate is decided, so all fail, if a side is outdated. An invalid file with gates is a gate that failed.
    """
    conditions = comparison.conditions
    results = [result for name, gate in conditions.gates.items() for result in check_gate(name, gate, comparison)]
    if comparison.must_pass != []:
        is_same = all(result.verdict == "the same" for result in comparison.test.metrics)
        results.append(check_must_pass(comparison.must_pass, is_same))
    if comparison.outdated:
        found = f"undecided, because {' and '.join(comparison.outdated)} is outdated"
        results = [replace(result, passed=False, found=found) for result in results]
    return [
        *results,
        *(GateResult("gates and must-pass entries are valid", False, problem) for problem in conditions.problems),
    ]


def values_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a metrics file by the names that gates use, such as `loss` and `retention.loss`."""
    return {
        prefix + name: value
        for split, prefix in PREFIXES.items()
        for name, value in metrics_of_split(metrics, split).items()
    }


def without_metric(name: str, revision: Revision, values: Mapping[str, Any]) -> str:
    """A metric that a revision does not have, and those that it has and can be compared."""
    with_error = [known for known in values if f"{known}_se" in values]
    comparable = [known for known in with_error if known.rpartition(".")[2] != "perplexity"]
    return f"{revision.name} has no {name}; it has {', '.join(comparable)}"


def check_gate(name: str, gate: Gate, comparison: Comparison) -> Iterator[GateResult]:
    """Check the conditions on one metric; a bound fails if the metric was not measured."""
    values = values_of(comparison.after.read_json(METRICS_FILE))
    value, number = values.get(name), math.nan
    applies_to_none = name in values and value is None  # such as stop_rate if no reference fits into max_new_tokens
    if isinstance(value, int | float):
        number, found = value, f"{value:.4g}"
    elif applies_to_none:
        found = "applies to no test example"
    elif values:
        found = f"{METRICS_FILE} of {without_metric(name, comparison.after, values)}"
    else:
        found = f"{comparison.after.name} has no {METRICS_FILE}; `dvc repro` writes it"
    if gate.min is not None:
        yield GateResult(f"{name} at least {gate.min:g}", applies_to_none or number >= gate.min, found)
    if gate.max is not None:
        yield GateResult(f"{name} at most {gate.max:g}", applies_to_none or number <= gate.max, found)
    if gate.not_worse_by is not None:
        yield check_not_worse_by(name, gate.not_worse_by, comparison)


def check_not_worse_by(name: str, margin: float, comparison: Comparison) -> GateResult:
    """Test that a metric is not worse by more than a margin: the whole interval must be on the right side of it.

    So a small test set makes it harder to pass, not easier. The gate passes if the base revision has no such metric,
    which the first lines of the report say.
    """
    before, after = comparison.before, comparison.after
    rule = f"{name} not worse than in {before.name} by more than {margin:g}"
    result = comparison.find_metric(name)
    if result and not result.metric.direction:
        return GateResult(rule, False, f"neither a higher nor a lower {name} is worse; only min and max are possible")
    if result and result.verdict == "the same":
        return GateResult(rule, True, "the same")
    if result and (difference := result.difference):
        found = describe_difference(difference)
        if result.is_small:
            return GateResult(rule, False, f"undecided, because too few examples are common: {found}")
        worst = min(bound * result.metric.direction for bound in (difference.low, difference.high))
        return GateResult(rule, worst >= -margin, found)
    old, new = (values_of(side.read_json(METRICS_FILE)) for side in (before, after))
    if METRICS_FILE in before.missing:
        return GateResult(rule, False, f"undecided, because {METRICS_FILE} of {before.name} can't be read")
    if name not in new:
        return GateResult(rule, False, f"undecided, because {without_metric(name, after, new)}")
    if name not in old:
        return GateResult(rule, True, f"{NOTHING_TO_COMPARE}: {before.name} has no {name if old else METRICS_FILE}")
    verdict = result.verdict if result else "can't be compared"
    return GateResult(rule, False, f"undecided, because the verdict is {verdict!r}")


def check_must_pass(examples: Sequence[MustPass] | None, is_same: bool = False) -> GateResult:
    """Check that no must-pass example is broken, and that all entries are test rows with a check.

    Args:
        examples: None if the predictions are not available.
        is_same: whether both revisions have the same predictions, which `dvc.lock` shows without having them.
    """
    rule = "no must-pass example is broken"
    if examples is None and is_same:
        return GateResult(rule, True, "the same")
    if examples is None:
        return GateResult(rule, False, "undecided, because the predictions are not available")
    bad = [f"{example.state}: {' '.join(example.prompt.split())}" for example in examples if example.state in BAD]
    advice = f"; correct {MUST_PASS}" if any(example.state in BAD[:2] for example in examples) else ""
    return GateResult(rule, not bad, counted(examples) + (f" ({'; '.join(bad):.300}){advice}" if bad else ""))
