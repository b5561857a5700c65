"""Convert a row of any supported schema to messages (docs/data.md)."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stages.data.examples import BadRowError, Message
from stages.rows.columns import parse_check, parse_options
from stages.rows.messages import (
    PAIR_ROLES,
    REASONING,
    describe,
    is_missing,
    looks_like_messages,
    parse_messages,
    read_text,
)
from stages.rows.tools import (
    check_tool_results,
    drop_null_arguments,
    order_results,
    parse_tool_calls,
    parse_tools,
)
from stages.runtime.errors import UserError

# The number of a row in its source, counted from 1, and its fields by name, or the error if it could not be parsed.
Row = tuple[int, dict[str, Any] | BadRowError]

# The columns that identify each schema. The first schema whose columns are all present is used.
SCHEMAS = (
    ("messages",),
    ("conversations",),
    ("conversation",),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answers"),  # tool calls
    ("text",),
)
SYSTEM, TOOLS, INPUT = ("system", "system_prompt"), ("tools", "functions"), ("input", "context")
OPTIONS = "chat_template_kwargs"  # the name in TRL
MEANINGS = {
    **dict.fromkeys(("messages", "conversations", "conversation"), "messages"),
    **dict.fromkeys(("instruction", "prompt", "question", "query"), "user message"),
    **dict.fromkeys(("output", "completion", "response", "answer"), "assistant message"),
    **dict.fromkeys(SYSTEM, "system message"),
    **dict.fromkeys(TOOLS, "tools"),
    **dict.fromkeys(INPUT, "input of the user message"),
    **dict.fromkeys(REASONING, "reasoning of the assistant message"),
    "answers": "tool calls of the assistant message",
    "history": "earlier messages",
    "text": "plain text",
    "check": "check of the last answer",
    OPTIONS: "options of the chat template",
}
# Columns that change what a row means and that no template of a language model can express.
UNSUPPORTED = {"image", "images", "video", "videos", "audio", "audios"}

ALLOWED = (
    "every row needs 'instruction' and 'output', 'prompt' and 'completion', 'messages', or other columns that "
    "docs/data.md lists; map your column names in dataset_columns"
)


@dataclass(frozen=True)
class ParsedRow:
    """The content of a row.

    messages: each has `role` and `content`, and where they apply `train` (False: masked), `reasoning_content`,
        `tool_calls`, `tool_call_id` and `name`. A row of plain text is one message with the role `text`.
    input: the `input` of an Alpaca row.
    tools: descriptions of the tools, as `apply_chat_template` takes them.
    check: the check of the last answer (see `checks`).
    options: of the chat template.
    other_columns: the columns that are not read.
    """

    messages: list[Message]
    input: str = ""
    tools: Sequence[dict[str, Any]] = ()
    check: dict[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    other_columns: Mapping[str, Any] = field(default_factory=dict)


class RowParser:
    """Parse the rows of one source.

    Args:
        columns: for each column of a schema, its name in the source. If it is not None, only these are read.

    Attributes:
        unread: for each column, or key of a message, that was not read: the number of rows or messages that have it.
        missing: those of `columns` that no row has had.
    """

    def __init__(self, columns: Mapping[str, str] | None = None):
        self.columns = columns
        self.unread: Counter[str] = Counter()
        self.missing = set((columns or {}).values())

    def parse(self, row: dict[str, Any] | BadRowError) -> ParsedRow:
        """The content of a row.

        Raises:
            BadRowError: the row could not be parsed, or a field is missing or invalid.
        """
        if isinstance(row, BadRowError):
            raise row
        if not isinstance(row, dict):
            raise BadRowError("not_an_object", f"found {describe(row)}; {ALLOWED}")
        fields = {name: value for name, value in row.items() if not is_missing(value)}
        schema, columns = self.find_columns(fields)
        renamed = {name: fields[column] for name, column in columns.items() if column in fields}
        unread = fields.keys() - set(columns.values())
        self.missing -= fields.keys()
        if self.columns is None and (name := next(filter(fields.get, UNSUPPORTED), None)):
            raise BadRowError("unsupported", f"{name!r} is {describe(fields[name])}; no template can render it")
        for group in (SYSTEM, INPUT, REASONING):
            if len(stated := [name for name in group if renamed.get(name)]) > 1:
                raise BadRowError(
                    "unsupported", f"has {' and '.join(map(repr, stated))}; remove one, or map one in dataset_columns"
                )
        for name in schema:
            if name not in renamed:
                raise BadRowError("missing_field", f"{self._own_name(name)} is missing; {ALLOWED}")
        parsed = self._parse(schema, renamed)
        self.unread.update(unread)
        return replace(parsed, other_columns={name: value for name, value in fields.items() if name in unread})

    def find_columns(self, names: Iterable[str]) -> tuple[tuple[str, ...], Mapping[str, str]]:
        """The schema of a row with these columns, and the name in the source of each column that it may have."""
        if self.columns is not None:
            return find_schema(self.columns), self.columns
        schema = find_schema(names)
        return schema, {name: name for name in (*schema, *optional_columns(schema))}

    def require_columns(self, where: object, names: Sequence[str]) -> None:
        """Check the columns of a table.

        Raises:
            UserError: a column of the schema is missing, or one occurs twice.
        """
        for name in self.columns.values() if self.columns is not None else find_schema(names):
            if name not in names:
                found = textwrap.shorten(", ".join(names), 300, placeholder=" ...") or "none"
                raise UserError(f"{where}: column {name!r} is missing; found {found}; {ALLOWED}")
        for name, count in Counter(names).items():
            if count > 1:
                raise UserError(f"{where}: column {name!r} occurs {count} times; keep one of them")

    def meanings(self, names: Iterable[str]) -> dict[str, str]:
        """What each of the columns of a row becomes."""
        _, columns = self.find_columns(names)
        read = {column: MEANINGS[name] for name, column in columns.items()}
        return {name: read.get(name, "not read") for name in names}

    def is_complete(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has all columns of a schema."""
        schema, columns = self.find_columns(row)
        return all(columns[name] in row for name in schema)

    def reads(self, name: str) -> bool:
        """Whether a column of the source may be read."""
        return name in (MEANINGS.keys() | UNSUPPORTED if self.columns is None else self.columns.values())

    def _own_name(self, name: str) -> str:
        return repr((self.columns or {}).get(name, name))

    def _text(self, fields: Mapping[str, Any], name: str) -> str:
        return read_text(self._own_name(name), fields[name], "must be text")

    def _parse(self, schema: tuple[str, ...], fields: Mapping[str, Any]) -> ParsedRow:
        """The content of the fields of a schema, by the names of the schema."""
        if schema == ("text",):
            return ParsedRow([{"role": "text", "content": self._text(fields, "text")}])
        if len(schema) == 1:
            messages, input_text = self._messages(fields, schema[0]), ""
        else:
            messages, input_text = self._pair(schema, fields)
        for name in SYSTEM:
            if name in fields and (system := self._text(fields, name)).strip():
                if messages and messages[0]["role"] in ("system", "developer"):
                    raise BadRowError("unsupported", f"has {self._own_name(name)} and a system message; keep one")
                messages.insert(0, {"role": "system", "content": system})
        tools = [tool for name in TOOLS if name in fields for tool in parse_tools(self._own_name(name), fields[name])]
        check_tool_results(messages)
        if not messages:
            raise BadRowError("no_exchange", "has no messages")
        if changed := drop_null_arguments(messages, tools):
            self.unread["null arguments of tool calls"] += changed
        check = parse_check(self._own_name("check"), fields["check"]) if "check" in fields else None
        if check and (messages[-1]["role"] != "assistant" or not messages[-1].get("train", True)):
            name = self._own_name("check")
            raise BadRowError("invalid_check", f"{name}: the last message must be an answer that is trained")
        options = parse_options(self._own_name(OPTIONS), fields[OPTIONS]) if OPTIONS in fields else {}
        return ParsedRow(order_results(messages), input_text, tools, check, options)

    def _pair(self, schema: tuple[str, ...], fields: Mapping[str, Any]) -> tuple[list[Message], str]:
        """A question and its answer, each a text or a list of messages; and the input that belongs to the question."""
        prompt, completion = schema
        messages = self._messages(fields, "history") if fields.get("history") else []
        input_text = next((self._text(fields, name) for name in INPUT if name in fields), "")
        is_chat = prompt == "prompt" and _is_list(fields[prompt])
        if is_chat:
            context = self._messages(fields, prompt)
            for message in context:
                messages.append(message | ({"train": False} if message["role"] == "assistant" else {}))
        else:
            messages.append({"role": "user", "content": self._text(fields, prompt)})
        questions = [message for message in messages if message["role"] == "user"]
        if input_text.strip() and len(questions) > 1:  # it belongs to the last question, and not to the first one
            questions[-1]["content"] += f"\n\n{input_text}"
            input_text = ""
        if completion == "answers":
            calls = parse_tool_calls(self._own_name(completion), fields[completion])
            return [*messages, {"role": "assistant", "content": "", "tool_calls": calls}], input_text
        if (is_chat and _is_list(fields[completion])) or (prompt == "prompt" and isinstance(fields[completion], list)):
            return messages + self._messages(fields, completion), input_text
        answer: Message = {"role": "assistant", "content": self._text(fields, completion)}
        for name in REASONING:
            if name in fields and (reasoning := self._text(fields, name)).strip():
                answer["reasoning_content"] = reasoning
        return [*messages, answer], input_text

    def _messages(self, fields: Mapping[str, Any], name: str) -> list[Message]:
        return parse_messages((self.columns or {}).get(name, name), fields[name], self.unread)


def _is_list(value: Any) -> bool:
    """Whether a prompt or completion is a list of messages, or its text."""
    return looks_like_messages(value) if isinstance(value, str) else isinstance(value, list | dict)


def find_schema(columns: Iterable[str]) -> tuple[str, ...]:
    """The first schema with all columns present; if there is none, the most similar one, to report what is missing."""
    names = set(columns)
    pairs = [schema for schema in SCHEMAS if len(schema) == len(PAIR_ROLES)]
    similar = max(pairs, key=lambda schema: len(names.intersection(schema)))
    complete = (schema for schema in SCHEMAS if names.issuperset(schema))
    schema = next(complete, similar)
    # A question without its answer is not plain text.
    return similar if schema == ("text",) and names.intersection(similar) else schema


def optional_columns(schema: tuple[str, ...]) -> tuple[str, ...]:
    """The columns that may be next to those of a schema."""
    if schema == ("text",):
        return ()
    of_pairs = ("history", *REASONING) if len(schema) > 1 else ()
    return (*SYSTEM, *TOOLS, OPTIONS, "check", *of_pairs, *(INPUT if schema[0] == "instruction" else ()))
