"""Check the conditions that a change must meet to be merged, from `gates.yaml`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from review.comparison import Comparison
from review.runs import METRICS_FILE
from review.verdicts import describe_difference
from stages.evaluate import METRICS
from stages.runtime.errors import UserError
from stages.runtime.yaml12 import YAMLError, parse_yaml

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
    comparable = [metric.name for metric in METRICS if metric.direction]
    for name, gate in gates.items():
        if gate.not_worse_by is not None and name not in comparable:
            raise UserError(f"{path}: {name}: found not_worse_by; only for {', '.join(comparable)}")
    return gates


def check_gates(gates: dict[str, Gate], comparison: Comparison) -> list[GateResult]:
    return [result for name, gate in gates.items() for result in check_gate(name, gate, comparison)]


def check_gate(name: str, gate: Gate, comparison: Comparison) -> Iterator[GateResult]:
    """Check the conditions on one metric; a bound fails if the metric was not measured."""
    metrics = comparison.after.read_json(METRICS_FILE)
    value = metrics.get(name)
    number = value if isinstance(value, int | float) else None
    applies_to_none = name in metrics and value is None  # such as stop_rate if no reference fits into max_new_tokens
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

    So a small test set makes it harder to pass, not easier. The gate passes if the base revision has no metrics.
    """
    rule = f"{name} not worse than in {comparison.before.name} by more than {margin:g}"
    result = comparison.metric(name)
    if result.verdict == "the same":
        return GateResult(rule, True, "the same")
    if not comparison.before.read_json(METRICS_FILE):
        return GateResult(rule, True, f"nothing to compare with: {comparison.before.name} has no {METRICS_FILE}")
    if result.difference is None:
        return GateResult(rule, False, f"undecided, because the verdict is {result.verdict!r}")
    found = describe_difference(result.difference)
    if comparison.is_small:
        return GateResult(rule, False, f"undecided, because too few examples are common: {found}")
    worst = min(bound * result.metric.direction for bound in (result.difference.low, result.difference.high))
    return GateResult(rule, worst >= -margin, found)
