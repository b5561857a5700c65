"""Parse the columns beside the messages of a row: its check, its slice and its options for the chat template."""

from typing import Any

from stages.checks.kinds import validate_check
from stages.data.examples import BadRowError
from stages.rows.messages import describe, is_missing, require_text
from stages.rows.strict_json import parse_json
from stages.rows.tools import require_json


def parse_check(name: str, value: Any) -> dict[str, Any] | None:
    """The check in a field of a row, an object or its JSON text; None if it is empty.

    Raises:
        BadRowError: it is not a valid check.
    """
    try:
        check = without_nulls(parse_json(name, value.strip() if isinstance(value, str) else value))
        if check in ("", {}) or is_missing(check):
            return None
        require_json(name, check, "invalid_check")
        validate_check(check)
    except (ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise BadRowError("invalid_check", f"{name}: {error}") from None
    return dict(check)


def without_nulls(check: Any) -> Any:
    """A check without null members, which Parquet adds if rows have different kinds. A single `json` can be null."""
    if not isinstance(check, dict):
        return check
    kept = {kind: value for kind, value in check.items() if not is_missing(value) or [*check] == ["json"]}
    for kind, value in kept.items():
        if kind in ("all", "any") and isinstance(value, list):
            kept[kind] = [without_nulls(part) for part in value]
        elif kind == "number" and isinstance(value, dict):
            kept[kind] = {key: member for key, member in value.items() if not is_missing(member)}
    return kept


def parse_slice(row: dict[str, Any] | BadRowError, column: str) -> str | None:
    """The value of a row's slice column as text; None if it has none.

    Raises:
        BadRowError: the value is not a text, number or boolean.
    """
    value = row.get(column) if isinstance(row, dict) else None
    if is_missing(value):
        return None
    if not isinstance(value, str | int | float):
        raise BadRowError("not_text", f"{column!r} (slice_column) is {describe(value)}; must be text or a number")
    return require_text(repr(column), str(value).strip(), "must be text") or None


def parse_options(where: str, options: Any) -> dict[str, Any]:
    """The options of a row for the chat template. Null is none, because tables give every row the same keys.

    Raises:
        BadRowError: this is not an object, or its JSON text.
    """
    found = parse_json(where, options)
    if not isinstance(found, dict):
        raise BadRowError(
            "bad_options", f'{where} is {describe(options)}; must be an object, such as {{"enable_thinking": false}}'
        )
    return require_json(where, {name: value for name, value in found.items() if value is not None}, "bad_options")
