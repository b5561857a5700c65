"""Metrics of the user: the public functions of `scorers.py` (docs/scorers.md)."""

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from stages.runtime.errors import UserError

SCORERS = Path("scorers.py")
MAX_SCORE = 1e9  # squares of larger ones could overflow in intervals
PREFIX = "score_"  # of the columns with the scores in the predictions
# Of prompt, answer, reference and row; a number, or None if the scorer does not apply to the row.
Scorer = Callable[[str, str, str, Mapping[str, Any]], Any]


def load_scorers(path: Path = SCORERS) -> dict[str, Scorer]:
    """The public functions that the file defines, by name, in its order; none if there is no file.

    Raises:
        UserError: the file can't be run, or a function does not take four arguments.
    """
    if not path.exists():
        return {}
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # noqa: S101 (the name ends in .py)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look it up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: can't be run: {_describe(error, path)}; fix it") from None
    scorers: dict[str, Scorer] = {}
    for name, function in vars(module).items():
        is_own = isinstance(function, partial) or getattr(function, "__module__", None) == module.__name__
        if callable(function) and not inspect.isclass(function) and is_own and not name.startswith("_"):
            try:
                inspect.signature(function).bind("", "", "", {})
            except TypeError:
                raise UserError(
                    f"{path}: {name}{inspect.signature(function)} must take prompt, answer, reference and row; "
                    f"a function with a name such as _{name} is not a scorer"
                ) from None
            scorers[name] = function
    return scorers


def score(
    name: str, scorer: Scorer, where: str, prompt: str, answer: str, reference: str, row: Mapping[str, Any]
) -> float | None:
    """The score of one answer; None if the scorer does not apply to the row.

    Args:
        where: the row, for messages.

    Raises:
        UserError: the scorer fails, or returns something else than None or a number of at most `MAX_SCORE`.
    """
    where = f"{SCORERS}: {name} for {where} and the answer {answer!r:.200}"
    try:
        value: Any = scorer(prompt, answer, reference, deepcopy(row))  # which the function may change
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {_describe(error, SCORERS)}; fix it and run `dvc repro`") from None
    if value is None:
        return None
    try:
        number = float(value) if not isinstance(value, str) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= MAX_SCORE:
        allowed = f"a number from -{MAX_SCORE:g} to {MAX_SCORE:g}, or None if it does not apply"
        raise UserError(f"{where}: found {value!r:.100}; must return {allowed}")
    return number


def _describe(error: BaseException, path: Path) -> str:
    """The type and the text of an error, and its line in the file."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.resolve()]
    return f"{type(error).__name__}{f' in line {lines[-1]}' if lines else ''}: {error}"
