"""Format rows of every kind with every chat template that TRL ships, and compare them with what transformers renders.

`make templates` does so for all templates and writes `tests/templates.json`; `make test` does so for some of them. The
tokenizer is byte-level and has the special tokens of the template. Each cell is `exact`, the reason why the row is
rejected, or `wrong: ...`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import groupby, product
from pathlib import Path
from typing import Any

from stages.data.files import read_json, write_json
from stages.rows.row_parser import RowParser
from stages.runtime.errors import UserError
from stages.runtime.terminal import progress
from stages.templates.chat_template import ChatTemplate
from stages.templates.conversations import Conversation, parse_conversation
from stages.templates.rendering import FIXED_DATE
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
    "two turns and system": ({"messages": [SYSTEM, QUESTION, ANSWER, SECOND, OTHER]}, [["Sunny."], ["Windy."]]),
    "reasoning": ({"messages": [QUESTION, ANSWER | {"reasoning_content": THOUGHT}]}, [[THOUGHT, "Sunny."]]),
    "reasoning in two turns": (
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
    "call and answer": ({"messages": USE, "tools": [TOOL]}, [["weather", "Bonn"], ["Sunny."]]),
    "reasoning and call": (
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
    "tools without a call": ({"messages": [QUESTION, ANSWER], "tools": [TOOL]}, [["Sunny."]]),
    "reasoning in the text": ({"messages": [QUESTION, INSIDE]}, [[THOUGHT, "Sunny."]]),
    "last answer only": ({"messages": [QUESTION, ANSWER, SECOND, OTHER]}, [["Windy."]]),
    "weight of 0": ({"messages": [QUESTION, ANSWER | {"weight": 0}, SECOND, OTHER]}, [["Windy."]]),
    "text as parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "In Bonn?"}]}, ANSWER]},
        [["Sunny."]],
    ),
}
# Tokens at which generation stops, as in generation_config.json of the models.
STOPS = {"cohere2": ["<|END_OF_TURN_TOKEN|>"], "glm4moe": ["<|user|>", "<|observation|>"]}
CLOSES = {"reasoning_end": "\n</think>\n\n"}
THINKS, THINKS_NOT = ({"options": {"enable_thinking": value}} for value in (True, False))
# Parameters with which templates are also tried.
PARAMETERS: dict[str, dict[str, Any]] = {
    "deepseek_r1_distill": CLOSES,
    "deepseekv3": CLOSES,
    "gemma4_v5": THINKS | {"reasoning_end": "\n<channel|>"},
    "glm4moe": THINKS_NOT,
    "nemotron_3_5_lightning": THINKS_NOT,
    "nemotron_3_nano": THINKS_NOT,
    "nemotron_3_super": THINKS_NOT,
    "nemotron_3_ultra": THINKS_NOT,
    "qwen3": THINKS_NOT,
    "qwen3_5_nothink": THINKS,
    "qwen3_5_think": THINKS_NOT,
}


@dataclass(frozen=True)
class Cell:
    """How a row of one kind is formatted with one template, and what TRL trains instead.

    outcome: exact, the reason why the row is rejected, error (of the template) or wrong.
    detail: of an error, or what is wrong.
    trl: see `describe`; empty if TRL has no mask.
    """

    outcome: str
    detail: str = ""
    trl: str = ""


Table = dict[str, dict[str, Cell]]  # by template, with its parameters, and by kind of row


def main() -> None:
    results = {label: try_template(*case) for label, case in progress(list(cases().items()), "format", "template")}
    stored = {label: {kind: vars(cell) for kind, cell in cells.items()} for label, cells in results.items()}
    write_json(
        RESULTS,
        {
            label: {kind: {k: v for k, v in cell.items() if v} for kind, cell in cells.items()}
            for label, cells in stored.items()
        },
    )
    print(table(read_results()))
    if wrong := [f"{label}, {kind}: {cell.detail}" for label, kind, cell in cells_of(results) if cell.detail]:
        raise SystemExit("\n".join(wrong))


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """The templates that TRL ships, and their parameters."""
    folder = files("trl").joinpath("chat_templates")
    names = [path.name.removesuffix(".jinja") for path in folder.iterdir() if path.name.endswith(".jinja")]
    names = sorted(name for name in names if not name.endswith("_training"))
    found: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in names}
    for name, parameters in PARAMETERS.items():
        stated = parameters.get("options", {}) | {key: value for key, value in parameters.items() if key != "options"}
        shown = ", ".join(f"{key}: {json.dumps(value)}" for key, value in stated.items())
        found[f"{name}, {shown}"] = (name, parameters)
    return dict(sorted(found.items()))


def jinja(name: str) -> str:
    return files("trl").joinpath(f"chat_templates/{name}.jinja").read_text(encoding="utf-8")


def read_results() -> Table:
    return {name: {kind: Cell(**cell) for kind, cell in cells.items()} for name, cells in read_json(RESULTS).items()}


def cells_of(results: Table) -> list[tuple[str, str, Cell]]:
    return [(label, kind, cell) for label, cells in results.items() for kind, cell in cells.items()]


def table(results: Table) -> str:
    """Markdown: the totals, the templates with the same outcomes, and those with the same differences from TRL."""
    plain = {label: cells for label, cells in results.items() if "," not in label}
    totals = Counter(cell.outcome for *_, cell in cells_of(plain))
    counts = ", ".join(f"{count} `{outcome}`" for outcome, count in totals.most_common())
    lines = [f"Without parameters, {len(plain)} templates × {len(ROWS)} kinds of rows: {counts}.", ""]
    groups: dict[tuple[int, str], list[str]] = {}
    for label, cells in results.items():
        kinds: dict[str, list[str]] = {}
        for kind, cell in cells.items():
            if cell.outcome != "exact":
                kinds.setdefault(cell.outcome, []).append(kind)
        other = "; ".join(f"`{outcome}`: {', '.join(names)}" for outcome, names in kinds.items())
        groups.setdefault((sum(cell.outcome == "exact" for cell in cells.values()), other), []).append(f"`{label}`")
    lines += ["| exact | rejected | templates |", "|---:|---|---|"]
    lines += [f"| {exact} | {other} | {', '.join(labels)} |" for (exact, other), labels in sorted(groups.items())[::-1]]
    differences: dict[str, Counter[str]] = {}
    for label, _, cell in cells_of(results):
        for difference in filter(None, cell.trl.split("; ")):
            differences.setdefault(difference, Counter())[f"`{label}`"] += 1
    lines += ["", "| TRL trains | rows | templates |", "|---|---:|---|"]
    for difference, rows in sorted(differences.items(), key=lambda item: -item[1].total()):
        lines.append(f"| {difference} | {rows.total()} | {', '.join(rows)} |")
    return "\n".join(lines)


def try_template(name: str, parameters: dict[str, Any]) -> dict[str, Cell]:
    """The cells of one template."""
    special = list(dict.fromkeys(SPECIAL.findall(jinja(name))))
    tokenizer = make_tokenizer(["<bos>", "<eos>", *special], bos_token="<bos>", eos_token="<eos>")
    stop_ids = tokenizer.convert_tokens_to_ids(STOPS.get(name, []))
    try:
        template = ChatTemplate(tokenizer, jinja(name), name, stop_ids=stop_ids, **parameters)
    except UserError as error:
        return {kind: Cell("error", str(error)) for kind in ROWS}
    checker = Checker(name, tokenizer, template, parameters)
    return {kind: checker.try_row(kind) for kind in ROWS}


@dataclass(frozen=True)
class Checker:
    """Compare examples with what transformers renders.

    name, parameters: of the template.
    """

    name: str
    tokenizer: Any
    template: ChatTemplate
    parameters: dict[str, Any]

    def try_row(self, kind: str) -> Cell:
        row, expected = ROWS[kind]
        parsed = RowParser().parse(row)
        raw = {"messages": json.dumps(parsed.messages), "tools": json.dumps(parsed.tools), "input": ""}
        conversation = parse_conversation(raw, "last_answer" if kind == "last answer only" else "all_answers")
        formatted = self.template.format([conversation], 9999)
        if formatted.errors:
            return Cell(formatted.errors[0].reason)
        spans = [span for example in formatted.examples for span in self.texts(example.spans)]
        answers = [at for at, each in enumerate(conversation.messages) if each["role"] == "assistant"]
        answers = [at for at in answers if conversation.messages[at].get("train", True)]
        if len(spans) != len(expected):
            return Cell("wrong", f"{len(spans)} answers are trained")
        wrong, differences = [], []
        for at, stated, (prompt, answer) in zip(answers, expected, spans, strict=True):
            before, upto = (replace(conversation, messages=conversation.messages[:end]) for end in (at, at + 1))
            wrong += self.compare(before, upto, prompt, answer, stated)
            differences.append(self.compare_with_trl(upto, prompt, answer, stated))
        trl = "; ".join(dict.fromkeys(filter(None, differences)))
        return Cell("wrong" if wrong else "exact", "; ".join(wrong), trl)

    def texts(self, spans: list[list[int]]) -> list[tuple[str, str]]:
        """The text before each answer of an example, and the text of the answer."""
        ends = [sum(map(len, spans[:number])) for number in range(len(spans) + 1)]
        ids = [token for span in spans for token in span]
        decode = self.tokenizer.decode
        return [
            (decode(ids[:start]), decode(ids[start:end])) for start, end in zip(ends[1::2], ends[2::2], strict=True)
        ]

    def compare(
        self, before: Conversation, upto: Conversation, prompt: str, answer: str, stated: list[str]
    ) -> Iterator[str]:
        """What is wrong with a prompt and an answer: it is neither that of transformers nor what the row states."""
        if before.tools and "Of a town." not in prompt:
            yield "the prompt lacks the tools"
        if prompt not in self.render(before, add_generation_prompt=True):
            yield "the prompt is not that of inference"
        if not re.search(".*".join(map(re.escape, stated)), answer, re.DOTALL):
            yield "the answer lacks something"
        eos = next((token for token in self.eos_tokens if answer.endswith(token)), "")
        if not eos or any(token in answer.removesuffix(eos) for token in self.eos_tokens):
            yield "the answer does not end at its EOS token"
        if answer.count("</think>") > 1:
            yield "the reasoning is closed twice"
        if "reasoning_end" in self.parameters and prompt.endswith(("<think>\n", "<|channel>thought\n")):
            thought = THOUGHT if THOUGHT in stated else OTHER_THOUGHT if OTHER_THOUGHT in stated else ""
            if not answer.startswith(f"{thought}{self.parameters['reasoning_end']}"):
                yield "the reasoning is not closed"
            return
        # Some templates open an empty thought with a line break in the prompt and without one in the answer.
        starts = (prompt + answer, prompt.rstrip() + answer)
        rendered = self.render(upto)
        if upto.messages[-1]["content"] == INSIDE["content"]:  # also with the reasoning apart
            apart = ANSWER | {"reasoning_content": THOUGHT}
            rendered += self.render(replace(upto, messages=[*before.messages, apart]))
        if any(text.startswith(starts) or text + eos in starts for text in rendered):
            return
        # The template renders what is before the answer differently once the answer is there.
        if any(text.startswith(prompt) for text in rendered) or not any(answer in text for text in rendered):
            yield "the answer is not what the template renders"

    @property
    def eos_tokens(self) -> list[str]:
        return list(self.tokenizer.convert_ids_to_tokens(self.template.eos_token_ids))

    def render(self, row: Conversation, **more: Any) -> list[str]:
        """What transformers renders: with arguments of calls as objects or text, and content as text or parts."""
        found = []
        for as_text, as_parts in product((False, True), repeat=2):
            with suppress(Exception):  # a template can raise anything
                found.append(self.apply(row, jinja(self.name), as_text, as_parts, tokenize=False, **more))
        return found

    def apply(self, row: Conversation, text: str, as_text: bool = False, as_parts: bool = False, **more: Any) -> Any:
        messages = json.loads(json.dumps(row.messages))
        for message in messages:
            message.pop("train", None)
            if as_parts:
                message["content"] = [{"type": "text", "text": message["content"]}]
            for each in message.get("tool_calls", []) if as_text else []:
                each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
        options = self.parameters.get("options", {})
        return self.tokenizer.apply_chat_template(
            messages, tools=list(row.tools) or None, chat_template=FIXED_DATE + text, **options, **more
        )

    def compare_with_trl(self, row: Conversation, prompt: str, answer: str, stated: list[str]) -> str:
        """What TRL's training template trains instead of an answer; empty if TRL has none."""
        with suppress(FileNotFoundError):
            training = jinja(f"{self.name}_training")
            masked = {"return_dict": True, "return_assistant_tokens_mask": True}
            for as_parts in (False, True):
                with suppress(Exception):  # a template can raise anything
                    rendered = self.apply(row, training, as_parts=as_parts, **masked)
                    tokens = zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
                    spans = [[one for one, _ in span] for kept, span in groupby(tokens, lambda each: each[1]) if kept]
                    theirs = self.tokenizer.decode(spans[-1]) if spans else ""
                    if stated[-1] in theirs:
                        return describe(prompt, answer, theirs)
            return "nothing"
        return ""


def describe(prompt: str, answer: str, theirs: str) -> str:
    """What TRL trains instead of an answer."""
    own, whole, other = ("".join(text.split()) for text in (answer, prompt + answer, theirs))
    if own == other:
        return "the same" if theirs == answer else "the same, and line breaks around it"
    if own in other and whole.endswith(other):
        return "the same, and the end of the prompt"
    if other.startswith(own):
        return "the same, and text after it"
    if own.startswith(other):
        return "the same without its EOS token"
    if own.replace("</think>", "") in other:
        return "the same without the end of an empty thought"
    return "another text"


if __name__ == "__main__":
    main()
