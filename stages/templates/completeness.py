"""Whether the rendering of a message has everything that the message states."""

import json
from collections.abc import Iterator
from typing import Any

from stages.data.examples import Message


def stated_texts(message: Message) -> dict[str, list[str]]:
    """What a message states, by key: the texts that must be in its rendering."""
    keys = ("content", "reasoning_content")
    stated: dict[str, list[str]] = {name: [message[name]] for name in keys if name in message}
    if "name" in message and message["role"] != "tool":  # a tool's name is in the call
        stated["name"] = [message["name"]]
    if "tool_calls" in message:
        stated["tool_calls"] = []
        for call in message["tool_calls"]:
            stated["tool_calls"] += [call["function"]["name"], *texts_in(call["function"]["arguments"])]
    return stated


def missing_key(message: Message, rendering: str) -> str | None:
    """The first key of a message whose texts are not all in a rendering; None if nothing is missing."""
    if len(message) == len(("role", "content")) and message["content"] in rendering:
        return None  # most messages
    stated = stated_texts(message).items()
    return next((name for name, texts in stated if not all(_is_in(rendering, text) for text in texts)), None)


def texts_in(value: Any) -> Iterator[str]:
    """The texts and keys in a JSON value; without numbers and booleans, which templates write in different ways."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        yield from texts_in([*value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts_in(part)


def _is_in(rendering: str, text: str) -> bool:
    """Whether a rendering has a text, perhaps with other whitespace or as JSON."""
    if text in rendering:
        return True
    rendering = "".join(rendering.split())
    forms = (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    return any("".join(form.split()) in rendering for form in forms)
