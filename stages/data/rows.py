"""Convert a row of any supported schema to messages."""

import reprlib
import textwrap
from collections.abc import Iterable
from typing import Any

from stages.data.examples import BadRowError, Message
from stages.runtime.errors import UserError

# The columns that identify each schema, and the one of them that may be missing.
MESSAGES, ALPACA, PROMPT_COMPLETION = ("messages",), ("instruction", "input", "output"), ("prompt", "completion")
SCHEMAS = (MESSAGES, ALPACA, PROMPT_COMPLETION)
OPTIONAL = "input"
ROLES = ("system", "user", "assistant", "tool")
ALLOWED = (
    "every row needs 'instruction' and 'output' (and may have 'input'), or 'prompt' and 'completion', all text, "
    "or 'messages'"
)
MESSAGES_ALLOWED = f"a list of objects with 'role' ({', '.join(ROLES)}) and 'content', both text"

# The number of a row in its source, counted from 1, and its fields by name, or the error if it could not be parsed.
Row = tuple[int, dict[str, Any] | BadRowError]


def parse_row(row: dict[str, Any] | BadRowError) -> tuple[list[Message], str]:
    """The messages of a row, and the `input` of an Alpaca row (otherwise an empty string).

    Raises:
        BadRowError: the row could not be parsed, or a field is missing or is not valid Unicode text.
    """
    if isinstance(row, BadRowError):
        raise row
    if not isinstance(row, dict):
        raise BadRowError("not_an_object", f"found {_shown(row)}; {ALLOWED}")
    schema = find_schema([name for name, value in row.items() if value is not None])
    if schema == MESSAGES:
        return _parse_messages(row["messages"]), ""
    texts = []
    for name in schema:
        value = row.get(name)
        if value is None and name != OPTIONAL:
            raise BadRowError("missing_field", f"{name!r} is missing; {ALLOWED}")
        texts.append(_require_text(repr(name), "" if value is None else value, ALLOWED))
    question, *inputs, answer = texts
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "".join(inputs)


def parse_slice(row: dict[str, Any] | BadRowError, column: str) -> str | None:
    """The value of a row's slice column as text; None if it has none.

    Raises:
        BadRowError: the value is not a text, number or truth value.
    """
    value = row.get(column) if isinstance(row, dict) else None
    if value is None:
        return None
    if not isinstance(value, str | int | float):
        raise BadRowError("not_text", f"{column!r} (slice_column) is {_shown(value)}; must be text or a number")
    return _require_text(repr(column), str(value).strip(), "must be text") or None


def find_schema(columns: Iterable[str]) -> tuple[str, ...]:
    """The first schema with all columns present; if there is none, the most similar one, to report what is missing."""
    names = set(columns)
    complete = [schema for schema in SCHEMAS if names.issuperset(name for name in schema if name != OPTIONAL)]
    like_prompt = names.intersection(PROMPT_COMPLETION) and not names.intersection(ALPACA)
    return [*complete, PROMPT_COMPLETION if like_prompt else ALPACA][0]


def require_columns(where: object, columns: Iterable[str]) -> None:
    """Check the columns of a table.

    Raises:
        UserError: a column of the schema is missing or occurs twice.
    """
    names = list(columns)
    for name in find_schema(names):
        if name != OPTIONAL and name not in names:
            found = textwrap.shorten(", ".join(names), 300, placeholder=" ...") or "none"
            raise UserError(f"{where}: column {name!r} is missing; found {found}; {ALLOWED}")
        if names.count(name) > 1:
            raise UserError(f"{where}: column {name!r} occurs {names.count(name)} times; keep one of them")


def _parse_messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list):
        raise BadRowError("not_text", f"'messages' is {_shown(messages)}; must be {MESSAGES_ALLOWED}")
    parsed = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadRowError("not_text", f"message {number} is {_shown(message)}; must be {MESSAGES_ALLOWED}")
        for name in ("role", "content"):
            if message.get(name) is None:
                detail = f"{name!r} of message {number} is missing; must be {MESSAGES_ALLOWED}"
                raise BadRowError("missing_field", detail)
        role, content = (
            _require_text(f"{name!r} of message {number}", message[name], f"must be {MESSAGES_ALLOWED}")
            for name in ("role", "content")
        )
        if role not in ROLES:
            raise BadRowError(
                "unknown_role", f"'role' of message {number} is {_shown(role)}; must be {MESSAGES_ALLOWED}"
            )
        parsed.append({"role": role, "content": content})
    return parsed


def _require_text(field: str, value: object, allowed: str) -> str:
    if not isinstance(value, str):
        raise BadRowError("not_text", f"{field} is {_shown(value)}; {allowed}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRowError("not_unicode", f"{field} has a lone surrogate at character {error.start}") from None
    return value


def _shown(value: object) -> str:
    """The type and the beginning of a value, in ASCII, for a message."""
    return f"{type(value).__name__} {reprlib.repr(value).encode('ascii', 'backslashreplace').decode():.60}"
