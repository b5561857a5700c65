"""Check the conditions that a change must meet to be merged, from `gates.yaml`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from review.comparison import Comparison
from review.must_pass import BAD, MUST_PASS, MustPass, counted
from review.runs import METRICS_FILE, metrics_of_split
from review.verdicts import PREFIXES, describe_difference, metrics_of_files
from stages.runtime.errors import UserError
from stages.runtime.yaml12 import YAMLError, parse_yaml
from stages.scoring.metrics import METRICS

GATES = Path("gates.yaml")
Bound = Annotated[float, Field(allow_inf_nan=False)]


class Gate(BaseModel):
    """The conditions on one metric: bounds of its value, and how much worse than in the base revision it may be."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    min: Bound | None = None
    max: Bound | None = None
    not_worse_by: Annotated[Bound, Field(ge=0)] | None = None


@dataclass(frozen=True)
class GateResult:
    """One condition and whether it passed; `found` says what was found and, if it failed, what to do."""

    rule: str
    passed: bool
    found: str

    @property
    def sentence(self) -> str:
        return f"{'passed' if self.passed else 'failed'}: {self.rule}; found: {self.found}"


def read_gates(path: Path = GATES) -> dict[str, Gate]:
    """The gates by metric; none if there is no file.

    Raises:
        UserError: the file is not valid YAML or does not describe gates.
    """
    if not path.exists():
        return {}
    try:
        gates = TypeAdapter(dict[str, Gate]).validate_python(parse_yaml(path.read_text(encoding="utf-8")) or {})
    except ValidationError as errors:
        listed = "\n".join(f"  {'.'.join(map(str, error['loc']))}: {error['msg']}" for error in errors.errors())
        raise UserError(
            f"{path}:\n{listed}\n  a metric may have the numbers min, max and not_worse_by (0 or more)"
        ) from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    return gates


def check_gates(gates: dict[str, Gate], comparison: Comparison) -> list[GateResult]:
    """Check all gates, and that no must-pass example is broken if there are some.

    Raises:
        UserError: `not_worse_by` is set for a metric that has no direction, or that no revision has.
    """
    files = [side.read_json(METRICS_FILE) for side in (comparison.before, comparison.after)]
    known = [metrics_of_split(file, split) for split in PREFIXES for file in files]
    comparable = {metric.name for metric in metrics_of_files(*known) if metric.direction}
    for name, gate in gates.items():
        if gate.not_worse_by is not None and name.removeprefix("retention.") not in comparable:
            names = ", ".join(metric.name for metric in METRICS if metric.direction)
            raise UserError(
                f"{GATES}: {name}: found not_worse_by; only for {names}, functions of scorers.py, and these on the "
                "retention set, such as retention.loss"
            )
    results = [result for name, gate in gates.items() for result in check_gate(name, gate, comparison)]
    if comparison.must_pass != []:
        is_same = all(result.verdict == "the same" for result in comparison.test.metrics)
        results.append(check_must_pass(comparison.must_pass, is_same))
    return results


def value_of(metrics: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    """Whether a metrics file has a metric, such as `loss` or `retention.loss`, and its value."""
    split, _, metric = name.rpartition(".")
    own = metrics_of_split(metrics, split or "test")
    return metric in own, own.get(metric)


def check_gate(name: str, gate: Gate, comparison: Comparison) -> Iterator[GateResult]:
    """Check the conditions on one metric; a bound fails if the metric was not measured."""
    is_known, value = value_of(comparison.after.read_json(METRICS_FILE), name)
    number = value if isinstance(value, int | float) else None
    applies_to_none = is_known and value is None  # such as stop_rate if no reference fits into max_new_tokens
    if number is not None:
        found = f"{number:.4g}"
    elif applies_to_none:
        found = "applies to no test example"
    else:
        found = f"{METRICS_FILE} of {comparison.after.name} has no value; `dvc repro` writes it"
    if gate.min is not None:
        yield GateResult(
            f"{name} at least {gate.min:g}", applies_to_none or (number is not None and number >= gate.min), found
        )
    if gate.max is not None:
        yield GateResult(
            f"{name} at most {gate.max:g}", applies_to_none or (number is not None and number <= gate.max), found
        )
    if gate.not_worse_by is not None:
        yield check_not_worse_by(name, gate.not_worse_by, comparison)


def check_not_worse_by(name: str, margin: float, comparison: Comparison) -> GateResult:
    """Test that a metric is not worse by more than a margin: the whole interval must be on the right side of it.

    So a small test set makes it harder to pass, not easier. The gate passes if the base revision has no such metric.
    """
    before = comparison.before.name
    rule = f"{name} not worse than in {before} by more than {margin:g}"
    found_metric = comparison.find_metric(name)
    if found_metric and found_metric[1].verdict == "the same":
        return GateResult(rule, True, "the same")
    metrics = comparison.before.read_json(METRICS_FILE)
    if not value_of(metrics, name)[0]:
        missing = f"has no {name}" if metrics else f"has no {METRICS_FILE}"
        return GateResult(rule, True, f"nothing to compare with: {before} {missing}")
    if not found_metric:
        return GateResult(rule, False, f"undecided, because {comparison.after.name} has no {name}")
    results, result = found_metric
    if result.difference is None:
        return GateResult(rule, False, f"undecided, because the verdict is {result.verdict!r}")
    found = describe_difference(result.difference)
    if results.is_small:
        return GateResult(rule, False, f"undecided, because too few examples are common: {found}")
    worst = min(bound * result.metric.direction for bound in (result.difference.low, result.difference.high))
    return GateResult(rule, worst >= -margin, found)


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
        return GateResult(rule, False, "undecided, because the predictions are not available; `dvc pull` gets them")
    bad = [f"{example.state}: {' '.join(example.prompt.split())}" for example in examples if example.state in BAD]
    advice = f"; correct {MUST_PASS}" if any(example.state in BAD[:2] for example in examples) else ""
    return GateResult(rule, not bad, counted(examples) + (f" ({'; '.join(bad):.300}){advice}" if bad else ""))
