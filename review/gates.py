"""Thresholds that a change must keep: `gates.yaml`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from review.comparison import MEASURED, METRICS, Comparison
from stages.shared.errors import UserError

GATES = Path("gates.yaml")
Bound = Annotated[float, Field(allow_inf_nan=False)]


class Gate(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    min: Bound | None = None
    max: Bound | None = None
    not_worse: bool = False


@dataclass(frozen=True)
class Checked:
    """One threshold and whether it holds; `found` says what was found and, where it is broken, what to do."""

    rule: str
    holds: bool
    found: str

    @property
    def sentence(self) -> str:
        return f"{'holds' if self.holds else 'broken'}: {self.rule}; found: {self.found}"


def read_gates(path: Path = GATES) -> dict[str, Gate]:
    """The gates by metric; none where there is no file.

    Raises:
        UserError: no YAML, or something that is no gate.
    """
    if not path.exists():
        return {}
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
        gates = TypeAdapter(dict[str, Gate]).validate_python(content)
    except ValidationError as errors:
        listed = "\n".join(f"  {'.'.join(map(str, error['loc']))}: {error['msg']}" for error in errors.errors())
        raise UserError(f"{path}:\n{listed}\n  a metric may have min, max (numbers) and not_worse (true)") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    comparable = [metric.name for metric in MEASURED if metric.better]
    for name, gate in gates.items():
        if gate.not_worse and name not in comparable:
            raise UserError(f"{path}: {name}: not_worse; must be one of {', '.join(comparable)}")
    return gates


def check_gates(gates: dict[str, Gate], comparison: Comparison) -> list[Checked]:
    return [checked for name, gate in gates.items() for checked in check_gate(name, gate, comparison)]


def check_gate(name: str, gate: Gate, comparison: Comparison) -> Iterator[Checked]:
    value = comparison.after.read_json(METRICS).get(name)
    found = f"{value:.4g}" if value is not None else f"{METRICS} of {comparison.after.name} has none: `dvc repro`"
    if gate.min is not None:
        yield Checked(f"{name} at least {gate.min:g}", value is not None and value >= gate.min, found)
    if gate.max is not None:
        yield Checked(f"{name} at most {gate.max:g}", value is not None and value <= gate.max, found)
    if gate.not_worse:
        yield check_not_worse(name, comparison)


def check_not_worse(name: str, comparison: Comparison) -> Checked:
    """Broken where it is worse, and where it may be and nobody can tell.

    Without predictions a value that did not get worse holds all the same: noise could only excuse one that did.
    """
    rule = f"{name} not worse than in {comparison.before.name} by more than noise"
    verdict = comparison.verdict(name)
    if verdict.difference or verdict.words == "the same":
        return Checked(rule, not verdict.is_worse, verdict.words)
    if verdict.before is None:
        return Checked(rule, True, f"nothing to compare with: {comparison.before.name} has no {METRICS}")
    after = verdict.after if comparison.same_test_set else None
    if after is not None and (after - verdict.before) * verdict.metric.better >= 0:
        return Checked(rule, True, "no worse at all")
    return Checked(rule, False, f"can't be told from noise ({verdict.words}): `dvc pull`, then review again")
