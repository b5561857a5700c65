"""JSON in the cells of a table, of which nothing is lost: of two equal keys, `json.loads` would keep the last one."""

import json
from typing import Any

from stages.data.examples import BadRowError


class DuplicateKeyError(ValueError):
    """An object has the same key twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, as the `object_pairs_hook` of a JSON decoder.

    Raises:
        DuplicateKeyError: a key occurs twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DuplicateKeyError(f"the key {twice!a:.60} occurs twice in an object; keep one of them")
    return found


def parse_json(where: str, value: Any) -> Any:
    """The value of a JSON text; other values, and texts that are not JSON, are returned unchanged.

    Raises:
        BadRowError: an object in the text has the same key twice.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=unique_keys)
    except DuplicateKeyError as error:
        raise BadRowError("duplicate_key", f"{where}: {error}") from None
    except (ValueError, RecursionError):  # also integers of more than 4,300 digits
        return value
