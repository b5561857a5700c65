"""What decides a review besides the results: `gates.yaml`, `must_pass.yaml`, checks in the data and `scorers.py`.

Each side has its own. Those of the reviewed revision apply to both sides, and the report lists what they were before.
"""

import json
from difflib import unified_diff
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from review.changes import Change, find_changes
from review.data_changes import without_template
from review.rescoring import Rescoring, read_checks
from review.revisions import Revision
from stages.runtime.errors import UserError
from stages.runtime.yaml12 import YAMLError, parse_yaml
from stages.scoring.scorers import SCORERS

GATES, MUST_PASS = Path("gates.yaml"), Path("must_pass.yaml")
MAX_DIFF_LINES = 40  # of scorers.py
Bound = Annotated[float, Field(allow_inf_nan=False)]


class Gate(BaseModel):
    """The conditions on one metric: bounds of its value, and how much worse than in the base revision it may be."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    min: Bound | None = None
    max: Bound | None = None
    not_worse_by: Annotated[Bound, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _has_a_condition(self) -> Self:
        if self.min is None and self.max is None and self.not_worse_by is None:
            raise ValueError("has no condition")
        return self


class Conditions:
    """The gates by metric and the must-pass entries of a revision; a missing file means none.

    If a file is invalid, `problems` has the reason.
    """

    def __init__(self, revision: Revision):
        self.problems: list[str] = []
        allowed = "a metric needs min, max or not_worse_by (0 or more)"
        self.gates: dict[str, Gate] = self._read(revision, GATES, dict[str, Gate], allowed)
        allowed = "must be a list of prompts or ids of test rows, as text"
        self.must_pass: list[str] = self._read(revision, MUST_PASS, list[str], allowed)

    def _read(self, revision: Revision, path: Path, kind: Any, allowed: str) -> Any:
        try:
            return parse(revision.read(str(path)) or b"", f"{path} of {revision.name}", kind, allowed)
        except UserError as error:
            self.problems.append(str(error))
            return kind()

    def by_name(self) -> dict[str, Any]:
        bounds = {
            f"{GATES}: {metric}: {bound}": value
            for metric, gate in self.gates.items()
            for bound, value in gate.model_dump(exclude_none=True).items()
        }
        return bounds | {f"{MUST_PASS}: {entry}": "listed" for entry in self.must_pass}


def parse(content: bytes, where: str, kind: Any, allowed: str) -> Any:
    """The content of a YAML file with conditions; empty if the file is.

    Args:
        kind: the type of the content.
        allowed: what it may be, for messages.

    Raises:
        UserError: not valid YAML, or something else than `kind`.
    """
    try:
        return TypeAdapter(kind).validate_python(parse_yaml(content) or kind())
    except ValidationError as errors:
        lines = [
            f"  {'.'.join(map(str, error['loc'])) or 'content'}: found {error['input']!r:.100}: {error['msg']}"
            for error in errors.errors()
        ]
        raise UserError("\n".join([f"{where}:", *lines, f"  {allowed}"])) from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid YAML: {error}") from None


def changed_conditions(before: Conditions, after: Conditions) -> list[Change]:
    """The gates and must-pass entries that differ; an invalid file of `before` is listed by its problem."""
    problems = [Change(problem, "invalid", None) for problem in before.problems]
    return problems + find_changes(before.by_name(), after.by_name())


def changed_checks(before: Revision, after: Revision, rescoring: Rescoring) -> list[Change]:
    """The checks that differ, of rows that both sides have; none if the rows are not available."""
    prompts = {example_id: without_template(row["prompt"]) for (_, example_id), row in rescoring.rows.items()}
    old, new = (read_checks(side) if prompts else {} for side in (before, after))
    return [
        Change(f"checks: {prompts.get(example_id) or example_id}", old[example_id], check)
        for example_id, check in new.items()
        if example_id in old and json.loads(old[example_id] or "null") != json.loads(check or "null")
    ]


def changed_scorers(before: Revision, after: Revision) -> list[str]:
    """The changed lines of `scorers.py`, as a unified diff; empty if it is the same."""
    old, new = ((side.read(str(SCORERS)) or b"").decode(errors="replace").splitlines() for side in (before, after))
    lines = [*unified_diff(old, new, before.name, after.name, n=1, lineterm="")]
    return [*lines[:MAX_DIFF_LINES], "..."] if len(lines) > MAX_DIFF_LINES else lines
