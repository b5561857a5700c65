"""Format rows of every kind with every chat template that TRL ships, and compare them with what transformers renders.

`make templates` does so for all templates and writes `tests/templates.json`; `make test` does so for some of them. The
tokenizer is byte-level and has the special tokens of the template. Each cell is `exact`, the reason why the row is
rejected, or `wrong: ...`.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from stages.data.chat_template import ChatTemplate
from stages.data.conversations import Conversation, parse_conversation
from stages.data.examples import IGNORE_INDEX
from stages.data.rendering import FIXED_DATE
from stages.data.rows import RowParser
from stages.runtime.errors import UserError
from stages.runtime.files import read_json, write_json
from stages.runtime.terminal import progress
from tests.clone import make_tokenizer

RESULTS = Path(__file__).with_suffix(".json")
SPECIAL = re.compile(
    r"<\|[^|<>\s]*\|>|<｜[^｜]*｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?INST\]|\[gMASK\]|<sop>|</s>|<\w+_of_\w+>"
)

TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a town.", "parameters": {}}}
TOOL["function"] |= {"parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}  # type: ignore[operator]
QUESTION, SECOND = {"role": "user", "content": "In Bonn?"}, {"role": "user", "content": "And in Oslo?"}
ANSWER, OTHER = {"role": "assistant", "content": "Sunny."}, {"role": "assistant", "content": "Windy."}
SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHT, OTHER_THOUGHT = "It is May.", "It is cold."
INSIDE = {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\nSunny."}


def call(number: int, town: str) -> dict[str, Any]:
    return {
        "id": f"call0000{number}",
        "type": "function",
        "function": {"name": "weather", "arguments": {"town": town}},
    }


CALL = {"role": "assistant", "content": "", "tool_calls": [call(1, "Bonn")]}
RESULT = {"role": "tool", "content": "18 degrees", "tool_call_id": "call00001"}
USE = [QUESTION, CALL, RESULT, ANSWER]
# The rows, and what must be supervised of each: texts in the order of the answers.
ROWS: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    "question": ({"messages": [QUESTION, ANSWER]}, [["Sunny."]]),
    "system": ({"messages": [SYSTEM, QUESTION, ANSWER]}, [["Sunny."]]),
    "two turns": ({"messages": [QUESTION, ANSWER, SECOND, OTHER]}, [["Sunny."], ["Windy."]]),
    "system, two turns": ({"messages": [SYSTEM, QUESTION, ANSWER, SECOND, OTHER]}, [["Sunny."], ["Windy."]]),
    "reasoning": ({"messages": [QUESTION, ANSWER | {"reasoning_content": THOUGHT}]}, [[THOUGHT, "Sunny."]]),
    "reasoning, two turns": (
        {
            "messages": [
                QUESTION,
                ANSWER | {"reasoning_content": THOUGHT},
                SECOND,
                OTHER | {"reasoning_content": OTHER_THOUGHT},
            ]
        },
        [[THOUGHT, "Sunny."], [OTHER_THOUGHT, "Windy."]],
    ),
    "call": ({"messages": USE[:2], "tools": [TOOL]}, [["weather", "Bonn"]]),
    "call, result, answer": ({"messages": USE, "tools": [TOOL]}, [["weather", "Bonn"], ["Sunny."]]),
    "reasoning, call": (
        {"messages": [QUESTION, CALL | {"reasoning_content": THOUGHT}], "tools": [TOOL]},
        [[THOUGHT, "weather", "Bonn"]],
    ),
    "parallel calls": (
        {
            "messages": [QUESTION, CALL | {"tool_calls": [call(1, "Bonn"), call(2, "Oslo")]}],
            "tools": [TOOL],
        },
        [["weather", "Bonn", "weather", "Oslo"]],
    ),
    "tools, no call": ({"messages": [QUESTION, ANSWER], "tools": [TOOL]}, [["Sunny."]]),
    "reasoning inside": ({"messages": [QUESTION, INSIDE]}, [[THOUGHT, "Sunny."]]),
    "last answer": ({"messages": [QUESTION, ANSWER, SECOND, OTHER]}, [["Windy."]]),
    "weight of 0": ({"messages": [QUESTION, ANSWER | {"weight": 0}, SECOND, OTHER]}, [["Windy."]]),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "In Bonn?"}]}, ANSWER]},
        [["Sunny."]],
    ),
}
# What the documentation of the models states and the template does not: tokens at which generation stops.
STOPS = {"glm4moe": ["<|user|>", "<|observation|>"]}
OPTIONS: dict[str, Any] = {}


@dataclass(frozen=True)
class Cell:
    """How a row of one kind is formatted with one template, and how its mask differs from that of TRL."""

    outcome: str
    trl: str = ""


def main() -> None:
    results = {name: try_template(name) for name in progress(template_names(), "format", "template")}
    write_json(RESULTS, {name: {kind: vars(cell) for kind, cell in cells.items()} for name, cells in results.items()})
    print(table(read_results()))
    if wrong := [
        f"{name}, {kind}: {cell.outcome}" for name, kind, cell in cells_of(results) if "wrong" in cell.outcome
    ]:
        raise SystemExit("\n".join(wrong))


def template_names() -> list[str]:
    folder = files("trl").joinpath("chat_templates")
    names = [path.name.removesuffix(".jinja") for path in folder.iterdir() if path.name.endswith(".jinja")]
    return sorted(name for name in names if not name.endswith("_training"))


def jinja(name: str) -> str | None:
    path = files("trl").joinpath(f"chat_templates/{name}.jinja")
    return path.read_text(encoding="utf-8") if path.is_file() else None


def read_results() -> dict[str, dict[str, Cell]]:
    return {name: {kind: Cell(**cell) for kind, cell in cells.items()} for name, cells in read_json(RESULTS).items()}


def cells_of(results: dict[str, dict[str, Cell]]) -> list[tuple[str, str, Cell]]:
    return [(name, kind, cell) for name, cells in results.items() for kind, cell in cells.items()]


def table(results: dict[str, dict[str, Cell]]) -> str:
    """Markdown: for each template, the kinds of rows that are exact and those that are not, and the totals."""
    totals = Counter(cell.outcome.partition(":")[0] for *_, cell in cells_of(results))
    lines = [f"{', '.join(f'{outcome}: {count}' for outcome, count in totals.most_common())}", ""]
    lines += ["| template | exact | not exact |", "|---|---:|---|"]
    for name, cells in results.items():
        other: dict[str, list[str]] = {}
        for kind, cell in cells.items():
            if cell.outcome != "exact":
                other.setdefault(cell.outcome, []).append(kind)
        listed = "; ".join(f"{outcome}: {', '.join(kinds)}" for outcome, kinds in other.items())
        lines.append(f"| {name} | {sum(cell.outcome == 'exact' for cell in cells.values())} | {listed} |")
    return "\n".join(lines)


def make_template_tokenizer(name: str) -> Any:
    """A byte-level tokenizer with the special tokens of a template."""
    text = jinja(name) or ""
    found = [token for token in dict.fromkeys(SPECIAL.findall(text)) if token != "<|think|>"]
    return make_tokenizer(["<bos>", "<eos>", *found], bos_token="<bos>", eos_token="<eos>")


def try_template(name: str) -> dict[str, Cell]:
    """The cells of one template."""
    tokenizer = make_template_tokenizer(name)
    try:
        template = ChatTemplate(tokenizer, jinja(name) or "", name, **OPTIONS)
    except UserError as error:
        return {kind: Cell(f"error: {error}") for kind in ROWS}
    return {kind: try_row(tokenizer, template, name, kind) for kind in ROWS}


def try_row(tokenizer: Any, template: ChatTemplate, name: str, kind: str) -> Cell:
    row, expected = ROWS[kind]
    parsed = RowParser().parse(row)
    raw = {"messages": json.dumps(parsed.messages), "tools": json.dumps(parsed.tools), "input": parsed.input}
    conversation = parse_conversation(raw, "last_answer" if kind == "last answer" else "all_answers")
    formatted = template.format([conversation], 9999)
    if formatted.errors:
        return Cell(f"{formatted.errors[0].reason}: {formatted.errors[0]}")
    ends = formatted.encoded.lengths.cumsum().tolist()
    ids, labels = formatted.encoded.input_ids.tolist(), formatted.encoded.labels.tolist()
    examples = [(ids[a:b], labels[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    wrong = compare(tokenizer, template, name, conversation, examples, expected)
    trl = "" if wrong else compare_with_trl(tokenizer, name, conversation, examples)
    return Cell("wrong: " + "; ".join(wrong) if wrong else "exact", trl)


Ids = list[int]


def spans_of(ids: Ids, labels: Ids) -> list[tuple[int, int]]:
    """The beginning and the end of each supervised span."""
    trained = [False, *(label != IGNORE_INDEX for label in labels), False]
    edges = [at for at in range(len(ids) + 1) if trained[at] != trained[at + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def compare(
    tokenizer: Any,
    template: ChatTemplate,
    name: str,
    conversation: Conversation,
    examples: Sequence[tuple[Ids, Ids]],
    expected: list[list[str]],
) -> list[str]:
    """What is wrong with the examples of a conversation."""
    wrong = []
    answers = [at for at, each in enumerate(conversation.messages) if each["role"] == "assistant"]
    answers = [at for at in answers if conversation.messages[at].get("train", True)]
    spans = [(ids, start, end) for ids, labels in examples for start, end in spans_of(ids, labels)]
    if len(spans) != len(expected):
        return [f"{len(spans)} supervised spans"]
    for at, texts, (ids, start, end) in zip(answers, expected, spans, strict=True):
        prompt, answer = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:end])
        before, upto = conversation.messages[:at], conversation.messages[: at + 1]
        prompts = renderings(tokenizer, name, before, conversation.tools, add_generation_prompt=True)
        if prompt not in prompts:
            wrong.append(f"prompt {at} is not that of inference")
        position = 0
        for text in texts:
            position = answer.find(text, position)
            if position < 0:
                wrong.append(f"answer {at} lacks {text!r}")
                break
        if ids[end - 1] not in template.eos_token_ids:
            wrong.append(f"answer {at} has no EOS token")
        if len(examples) == len(spans) or at == answers[-1]:
            fulls = [f for f in renderings(tokenizer, name, upto, conversation.tools) if f.startswith(prompt)]
            stop = tokenizer.decode(ids[end - 1 : end])
            if fulls and not any(
                f.startswith(prompt + answer) or f == prompt + answer.removesuffix(stop) for f in fulls
            ):
                wrong.append(f"answer {at} is not what the template renders")
    return wrong


def renderings(tokenizer: Any, name: str, messages: Sequence[Any], tools: Any, **options: Any) -> list[str]:
    """What transformers renders: arguments of calls as objects or as text, content as text, parts or null."""
    found = []
    for as_text in (False, True):
        for content in ("text", "parts", "null"):
            try:
                found.append(
                    tokenizer.apply_chat_template(
                        [for_template(message, as_text, content) for message in messages],
                        tools=list(tools) or None,
                        chat_template=FIXED_DATE + (jinja(name) or ""),
                        tokenize=False,
                        **options,
                    )
                )
            except Exception:
                continue
    return found


def for_template(message: Any, as_text: bool, content: str) -> Any:
    message = {key: value for key, value in message.items() if key != "train"}
    if "reasoning_content" in message:
        message["thinking"] = message["reasoning_content"]
    if content == "parts":
        message["content"] = [{"type": "text", "text": message["content"]}]
    if "tool_calls" in message:
        if content == "null":
            message["content"] = message["content"] or None
        if as_text:
            message["tool_calls"] = [
                each | {"function": each["function"] | {"arguments": json.dumps(each["function"]["arguments"])}}
                for each in message["tool_calls"]
            ]
    return message


def compare_with_trl(tokenizer: Any, name: str, conversation: Conversation, examples: Sequence[tuple[Ids, Ids]]) -> str:
    """How the mask differs from that of TRL's training template; empty if it has none or the masks are equal."""
    training = jinja(f"{name}_training")
    if training is None:
        return ""
    last = examples[-1]
    start, end = spans_of(*last)[-1]
    own = tokenizer.decode(last[0][start:end])
    try:
        rendered = tokenizer.apply_chat_template(
            [for_template(message, False, "text") for message in conversation.messages],
            tools=list(conversation.tools) or None,
            chat_template=FIXED_DATE + training,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception as error:
        return f"TRL fails: {type(error).__name__}"
    mask = rendered["assistant_masks"]
    labels = [token if trained else IGNORE_INDEX for token, trained in zip(rendered["input_ids"], mask, strict=True)]
    spans = spans_of(rendered["input_ids"], labels)
    if not spans:
        return "TRL masks all"
    theirs = tokenizer.decode(rendered["input_ids"][spans[-1][0] : spans[-1][1]])
    return "" if theirs == own else f"{theirs!r} instead of {own!r}"


if __name__ == "__main__":
    main()
