"""Check the conditions that a change must meet to be merged, from `gates.yaml`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from review.comparison import Comparison
from review.verdicts import MEASURED, METRICS
from stages.runtime.errors import UserError
from stages.runtime.yaml12 import YAMLError, parse_yaml

GATES = Path("gates.yaml")
Bound = Annotated[float, Field(allow_inf_nan=False)]


class Gate(BaseModel):
    """The conditions on one metric: bounds of its value, and that it is not worse than in the base revision."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    min: Bound | None = None
    max: Bound | None = None
    not_worse: bool = False


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
        raise UserError(f"{path}:\n{listed}\n  a metric may have min, max (numbers) and not_worse (true)") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    comparable = [metric.name for metric in MEASURED if metric.direction]
    for name, gate in gates.items():
        if gate.not_worse and name not in comparable:
            raise UserError(f"{path}: {name}: not_worse; must be one of {', '.join(comparable)}")
    return gates


def check_gates(gates: dict[str, Gate], comparison: Comparison) -> list[GateResult]:
    return [result for name, gate in gates.items() for result in check_gate(name, gate, comparison)]


def check_gate(name: str, gate: Gate, comparison: Comparison) -> Iterator[GateResult]:
    """Check the conditions on one metric; a bound fails if the metric has no value."""
    value = comparison.after.read_json(METRICS).get(name)
    found = (
        f"{value:.4g}"
        if value is not None
        else f"{METRICS} of {comparison.after.name} has no value; `dvc repro` writes it"
    )
    if gate.min is not None:
        yield GateResult(f"{name} at least {gate.min:g}", value is not None and value >= gate.min, found)
    if gate.max is not None:
        yield GateResult(f"{name} at most {gate.max:g}", value is not None and value <= gate.max, found)
    if gate.not_worse:
        yield check_not_worse(name, comparison)


def check_not_worse(name: str, comparison: Comparison) -> GateResult:
    """Check that a metric is not significantly worse; fail if this can't be decided.

    It passes if the base revision has no metrics. Without an interval, for example because predictions are missing, it
    passes only if the value on the same test set did not get worse: only a worse value needs an interval to be excused.
    """
    rule = f"{name} not worse than in {comparison.before.name} by more than noise"
    result = comparison.metric(name)
    if result.difference or result.verdict == "the same":
        return GateResult(rule, result.verdict != "worse", result.verdict)
    if result.before is None:
        return GateResult(rule, True, f"nothing to compare with: {comparison.before.name} has no {METRICS}")
    after = result.after if comparison.same_test_set else None
    if after is not None and (after - result.before) * result.metric.direction >= 0:
        return GateResult(rule, True, "not worse")
    return GateResult(rule, False, f"can't be decided ({result.verdict}): `dvc pull`, then review again")
