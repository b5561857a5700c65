"""Parse `params.yaml`, and describe what is wrong with parameters."""

import difflib
import re
from datetime import date
from typing import Any

from stages.runtime.errors import UserError
from stages.runtime.yaml12 import YAMLError, parse_yaml

# DVC inserts these parameters into `dvc.yaml`, and can't insert null. What means "none" instead:
INSTEAD_OF_NULL = {
    "dataset_file": "use the path of an existing file, which is not read if dataset_name is set",
    "retention_file": "for none, the path of an empty file",
    "launcher": "for a single process, python",
    "replicate_seeds": "for none, []",
}


def parse_params(text: bytes, where: str) -> dict[str, Any]:
    """Parse the text of a `params.yaml`.

    Raises:
        UserError: it is not a YAML mapping.
    """
    try:
        content = parse_yaml(text.decode("utf-8"))
    except (YAMLError, ValueError, RecursionError) as error:  # the last two: a huge number, deep nesting
        raise UserError(f"{where}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: found {type(content).__name__}; must be a list of `name: value` lines")
    return content


def raise_problems(problems: list[str], where: str) -> None:
    """Raise a `UserError` that lists all problems, if there are any."""
    if problems:
        raise UserError(f"{where}:\n" + "\n".join(f"  {problem}" for problem in dict.fromkeys(problems)))


def unknown_parameter(name: object, known: set[str]) -> str:
    """A line for a name that is not a parameter, with the closest known name."""
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
    return f"{name}: not a parameter; {hint}"


def describe_problem(error: Any) -> str:
    """A line for an error of pydantic."""
    name = ".".join(str(part) for part in error["loc"])
    value = error["input"]
    if error["type"] == "string_type" and isinstance(value, int | float | date):
        kind = "date" if isinstance(value, date) else "number"
        return f"{name}: found the {kind} {value}; must be text; put it in quotes"
    if isinstance(value, date):
        value = str(value)
    if error["type"] == "missing":
        return f"{name}: missing; every parameter needs a value"
    if error["type"] == "string_pattern_mismatch":
        allowed = "must not be empty"
    else:
        allowed = re.sub("^(Input|List) should", "must", error["msg"].removeprefix("Value error, "))
    found = "null" if value is None else f"{value!r:.100}"
    instead = f"; {INSTEAD_OF_NULL[name]}" if name in INSTEAD_OF_NULL and not value else ""
    return f"{name}: found {found}; {allowed}{instead}"
