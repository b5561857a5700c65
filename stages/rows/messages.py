"""Parse messages of the formats of OpenAI (`role`, `content`), ShareGPT (`from`, `value`) and others."""

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from itertools import cycle
from typing import Any

from stages.data.examples import BadRowError, Message
from stages.rows.strict_json import parse_json
from stages.rows.tools import parse_tool_calls

CALL_ROLES = ("function_call", "tool_call")  # their content is calls
ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai", *CALL_ROLES), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response", "ipython"), "tool"),
}
ROLE, CONTENT = ("role", "from"), ("content", "value")
WEIGHTS, FLAGS = ("weight", "loss_weight"), ("train", "loss")
REASONING = ("reasoning_content", "thinking", "reasoning")
PART_KEYS = ("text", "value", "content", *REASONING)
PAIR_ROLES, PAIR_KEYS = ("user", "assistant"), {"input", "output"}
ALTERNATIVES = (ROLE, CONTENT, REASONING, ("tool_calls", "function_call"))
MESSAGE_KEYS = {*WEIGHTS, *FLAGS, "tool_call_id", "name", *(name for names in ALTERNATIVES for name in names)}
LIST_OF_MESSAGES = re.compile(
    rf"""\s*\[\s*{{(?=.*['"]({"|".join(ROLE)})['"]\s*:\s*['"]\s*({"|".join(ROLES)})\b)(?=.*['"]({"|".join(CONTENT)})['"]\s*:)"""
    r".*}\s*]\s*",
    re.DOTALL | re.IGNORECASE,
)
NUMBER_ALLOWED = "must be text or a whole number, because other numbers have several forms, such as 7, 7.0 and 7.00"
MESSAGES_ALLOWED = f"must be a list of objects with 'role' ({', '.join(ROLES)}) and 'content'"


def parse_messages(column: str, messages: Any, unread: Counter[str]) -> list[Message]:
    """The messages of a column: objects, or texts in alternating roles, or pairs of a question and its answer.

    Args:
        column: its name.
        unread: counts the keys that are not read.

    Raises:
        BadRowError: this is not a list of messages, or one has a missing or invalid key.
    """
    messages = _decode(column, messages)
    if not isinstance(messages, list):
        as_json = "or such a list as JSON text, as json.dumps writes it"
        raise BadRowError("not_text", f"{column!r} is {describe(messages)}; {MESSAGES_ALLOWED}, {as_json}")
    if all(isinstance(pair, list) and len(pair) == len(PAIR_ROLES) for pair in messages):
        messages = [text for pair in messages for text in pair]
    if all(isinstance(message, str) for message in messages):
        return _parse_texts("message", messages)
    parsed: list[Message] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadRowError("not_text", f"message {number} is {describe(message)}; {MESSAGES_ALLOWED}")
        present = {name: value for name, value in message.items() if not is_missing(value)}
        if present.keys() >= PAIR_KEYS:
            known, new = PAIR_KEYS, _parse_texts("part", [present["input"], present["output"]])
        else:
            known = MESSAGE_KEYS
            new = [_parse_message(f"message {number}", present)]
        parsed += new
        unread.update(f"{column}[].{name}" for name in present.keys() - known)
    return parsed


def _decode(column: str, messages: Any) -> Any:
    """Messages from JSON text, a list of such texts, or an object of lists, as `datasets` stores a list of objects."""
    messages = parse_json(repr(column), messages)
    are_texts = isinstance(messages, list) and all(isinstance(message, str) for message in messages)
    if are_texts and looks_like_messages(joined := f"[{','.join(messages)}]"):
        return parse_json(repr(column), joined)
    columns = [*messages.values()] if isinstance(messages, dict) else []
    if columns and all(isinstance(values, list) and len(values) == len(columns[0]) for values in columns):
        return [dict(zip(messages, values, strict=True)) for values in zip(*columns, strict=True)]
    return messages


def _parse_texts(where: str, texts: list[Any]) -> list[Message]:
    """Messages of the user and the assistant in turn."""
    return [
        {"role": role, "content": read_text(f"{where} {number}", text, MESSAGES_ALLOWED)}
        for number, (text, role) in enumerate(zip(texts, cycle(PAIR_ROLES), strict=False), 1)
    ]


def _parse_message(where: str, present: Mapping[str, Any]) -> Message:
    """A message, an object with `MESSAGE_KEYS`."""

    def text(name: str) -> str:
        return require_text(f"{name!r} of {where}", present[name], "must be text")

    role_key, content_key, reasoning_key, calls_key = (_first(where, names, present) for names in ALTERNATIVES)
    calls = present.get(calls_key)
    for name in (role_key, *(() if calls else (content_key,))):
        if name not in present:
            raise BadRowError("missing_field", f"{name!r} of {where} is missing; {MESSAGES_ALLOWED}")
    role_name = text(role_key).strip().lower()
    if role_name not in ROLES:
        raise BadRowError(
            "unknown_role", f"{role_key!r} of {where} is {describe(present[role_key])}; {MESSAGES_ALLOWED}"
        )
    role = ROLES[role_name]
    content, reasoning = _parse_content(where, content_key, present.get(content_key, ""))
    if role_name in CALL_ROLES:
        if calls:
            raise BadRowError(
                "unsupported", f"{where} has calls in {content_key!r} and {calls_key!r}; keep one of them"
            )
        calls, content = content, ""
    if reasoning_key in present:
        reasoning += text(reasoning_key)
    message: Message = {"role": role, "content": content}
    if not _is_trained(where, role, present):
        message["train"] = False
    if reasoning.strip():
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = parse_tool_calls(f"{where}: the tool call", calls)
    for name in ("tool_call_id", "name"):
        if name in present:
            message[name] = text(name)
    for name in ("reasoning_content", "tool_calls"):
        if name in message and role != "assistant":
            raise BadRowError("unsupported", f"{where} ({role}) has {name!r}, which only an assistant message can have")
    return message


def _first(where: str, names: tuple[str, ...], message: Mapping[str, Any]) -> str:
    """The one of the alternative names of a key that a message has."""
    stated = [name for name in names if message.get(name) not in (None, "", [])]
    if any(message[name] != message[stated[0]] for name in stated):
        raise BadRowError("unsupported", f"{where} has {' and '.join(map(repr, stated))}; keep one of them")
    return next(iter([*stated, *(name for name in names if name in message), names[0]]))


def _parse_content(where: str, key: str, content: Any) -> tuple[str, str]:
    """The text and the reasoning of a message whose content is a text or a list of parts."""
    if not isinstance(content, list):
        return read_text(f"{key!r} of {where}", content, MESSAGES_ALLOWED), ""
    texts: dict[str, list[str]] = {"text": [], "reasoning": []}
    for number, part in enumerate(content, 1):
        part_of = f"part {number} of {where}"
        fields = {"type": "text", "text": part} if isinstance(part, str) else part
        fields = fields if isinstance(fields, dict) else {}
        kind = "reasoning" if fields.get("type") in REASONING else fields.get("type")
        values = [fields[name] for name in PART_KEYS if fields.get(name) is not None]
        if kind not in texts or len(values) != 1:
            raise BadRowError("not_text", f"{part_of} is {describe(part)}; must be a text or a reasoning part")
        texts[kind].append(read_text(part_of, values[0], "must be text"))
    return "".join(texts["text"]), "".join(texts["reasoning"])


def _is_trained(where: str, role: str, message: Mapping[str, Any]) -> bool:
    """Whether the weights and flags of a message are 1 or true; without any, an assistant message is trained."""
    trained = True
    for name in (*WEIGHTS, *FLAGS):
        if name in message:
            value = message[name]
            if value not in (0, 1) or (name in FLAGS and not isinstance(value, bool)):
                allowed = "true or false" if name in FLAGS else "0 or 1"
                raise BadRowError("bad_weight", f"{name!r} of {where} is {describe(value)}; must be {allowed}")
            if value and role != "assistant":
                raise BadRowError("bad_weight", f"{name!r} of {where} ({role}) is {value}; only answers can be trained")
            trained = trained and bool(value)
    return trained or role != "assistant"


def looks_like_messages(text: str) -> bool:
    """Whether a text is a list of messages, in JSON or as Python shows it."""
    return LIST_OF_MESSAGES.fullmatch(text) is not None


def is_missing(value: Any) -> bool:
    """Whether a value is null or NaN, as which pandas writes a missing value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_text(field: str, value: object, allowed: str) -> str:
    """A text. A whole number or a boolean becomes its JSON text."""
    if isinstance(value, float | Decimal):
        allowed = NUMBER_ALLOWED
    return require_text(field, json.dumps(value) if isinstance(value, int) else value, allowed)


def require_text(field: str, value: object, allowed: str) -> str:
    if not isinstance(value, str):
        raise BadRowError("not_text", f"{field} is {describe(value)}; {allowed}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRowError("not_unicode", f"{field} has a lone surrogate at character {error.start}") from None
    return value


def describe(value: object) -> str:
    """The type and the beginning of a value, in ASCII, for a message."""
    return f"{type(value).__name__} {reprlib.repr(value).encode('ascii', 'backslashreplace').decode():.60}"
