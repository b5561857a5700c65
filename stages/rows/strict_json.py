"""Parse JSON without silent changes: two equal keys, or a number that would become infinite, reject the row."""

import json
import math
from collections import Counter
from typing import Any

from stages.data.examples import BadRowError

MAX_DIGITS = 4300  # Python refuses to parse longer integers


def _object(members: list[tuple[str, Any]]) -> dict[str, Any] | BadRowError:
    found = dict(members)
    if len(found) == len(members):
        return found
    name, count = Counter(name for name, _ in members).most_common(1)[0]
    return BadRowError("duplicate_key", f"key {name!r:.60} occurs {count} times in an object; keep one of them")


def _integer(digits: str) -> int | BadRowError:
    return int(digits) if len(digits) <= MAX_DIGITS else _too_large(digits)


def _float(digits: str) -> float | BadRowError:
    return value if math.isfinite(value := float(digits)) else _too_large(digits)


def _too_large(digits: str) -> BadRowError:
    return BadRowError("bad_number", f"number {digits:.20} is too large; write it as text")


# Errors take the place of values, so that the values around them are read.
JSON = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float)


def checked(value: Any) -> Any:
    """The value, or the first error inside it, at any depth."""
    return _first_error(value) or value


def _first_error(value: Any) -> BadRowError | None:
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return next(filter(None, map(_first_error, parts)), None)
    return value if isinstance(value, BadRowError) else None


def parse_json(where: str, value: Any) -> Any:
    """The value of a JSON text; other values, and texts that are not JSON, are returned unchanged.

    Raises:
        BadRowError: an object in the text has the same key twice, or a number is too large.
    """
    if not isinstance(value, str):
        return value
    try:
        found = checked(JSON.decode(value))
    except (ValueError, RecursionError):
        return value
    if isinstance(found, BadRowError):
        raise BadRowError(found.reason, f"{where}: {found}")
    return found
