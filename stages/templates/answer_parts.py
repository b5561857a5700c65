"""Split answers into reasoning, tool calls and final text, as the chat template or the tokenizer says."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from stages.data.examples import BadRowError
from stages.runtime.errors import UserError
from stages.templates.answer_ends import ANSWER, CALL, QUESTION, REPLY, WITH_TOOL
from stages.templates.plain_text import PlainText
from stages.templates.rendering import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT = "THOUGHT"  # the reasoning in test conversations
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # their names in response templates


@dataclass(frozen=True)
class AnswerParts:
    """An answer.

    text: the final text; the call if there is no other text; empty if the reasoning never closes.
    reasoning, calls: None if there are none.
    is_open: whether the reasoning never closes.
    """

    text: str
    reasoning: str | None = None
    calls: str | None = None
    is_open: bool = False


@dataclass(frozen=True)
class AnswerFormat:
    """How a template writes the parts of an answer; empty texts if it does not have them.

    opening: what reasoning begins with, such as `<think>`.
    closing: what is between reasoning and the final text, such as `</think>`.
    header: what every final text begins with, also without reasoning, such as gpt-oss' `<|channel|>final<|message|>`.
    call: what tool calls begin with, such as `<tool_call>`.
    """

    opening: str = ""
    closing: str = ""
    header: str = ""
    call: str = ""

    @classmethod
    def of_template(cls, renderer: Renderer, special: re.Pattern[str], reasoning_end: str | None) -> "AnswerFormat":
        """Find the format in renderings of test conversations.

        Args:
            special: matches special tokens.
            reasoning_end: what ends the reasoning that the generation prompt opens, if the template does not render it.

        Raises:
            BadRowError: the template can't render a question and an answer.
        """
        prompt = renderer.render([QUESTION], add_generation_prompt=True)
        reply = renderer.render([QUESTION, REPLY])
        call = _find_call(renderer)
        opening, closing = _find_thought(renderer, prompt, call, (reasoning_end or "").strip())
        if closing and closing in call:  # an empty thought
            call = call.rpartition(closing)[2].strip()
        header = reply.removeprefix(prompt).partition(ANSWER)[0].strip() if reply.startswith(prompt) else ""
        # What precedes an answer without reasoning can also be an empty thought, or its end. Words can be in any text.
        if (
            (closing and not closing.endswith(header))
            or (opening and prompt.rstrip().endswith(opening))
            or not special.search(header)
        ):
            header = ""
        if not header and not call.startswith("<") and not special.search(call):
            call = ""
        return cls(opening, closing, header, call)

    def split(self, prompt: str, answer: str) -> AnswerParts:
        """The parts of an answer to a prompt, with their special tokens."""
        body = answer.lstrip()
        thinks = self.opening != "" and (body.startswith(self.opening) or prompt.rstrip().endswith(self.opening))
        end, text, reasoning, calls = "", answer, None, None
        if thinks or self.header:
            body = body.removeprefix(self.opening)
            ends = [self.header, self.call] if self.header else [self.closing]
            end = next((candidate for candidate in ends if candidate and candidate in body), "")
            if end:
                before, _, text = body.partition(end)
                reasoning = before.rstrip().removesuffix(self.closing.removesuffix(self.header).strip())
                text = end + text if end == self.call else text
            elif thinks:
                return AnswerParts("", body, is_open=True)
        if self.call and (not end or end != self.header):
            text, found, rest = text.partition(self.call)
            calls = found + rest
        return AnswerParts(text, reasoning, calls)


def _after_prompt(prompt: str, text: str) -> str:
    """A rendering from where it differs from the prompt, stripped. It begins with a whole tag or special token."""
    common = commonprefix([prompt, text])  # noqa: RUF071 (of characters, not of paths)
    return text[len(re.sub(r"<[^<>]*$", "", common)) :].strip()


def _find_thought(renderer: Renderer, prompt: str, call: str, closing: str) -> tuple[str, str]:
    """What reasoning begins with, and what is between it and the final text.

    Args:
        closing: what ends the reasoning if the template does not render it.
    """
    before = prompt
    # Some templates, such as Gemma 4's, render reasoning only before a call.
    for answer, row, begin in ((REPLY, None, ANSWER), (CALL, WITH_TOOL, call)):
        with suppress(BadRowError):
            text = renderer.render([QUESTION, {**answer, "reasoning_content": THOUGHT}], row)
            if THOUGHT in text and begin:
                prompt = renderer.render([QUESTION], row, add_generation_prompt=True)
                before, _, after = text.partition(THOUGHT)
                closing = after.partition(begin)[0].strip()
                break
    tag = closing.replace("/", "", 1)
    return tag if before.rstrip().endswith(tag) else _after_prompt(prompt, before), closing


def _find_call(renderer: Renderer) -> str:
    """What tool calls begin with; empty if it is only JSON, which can be a final text, too."""
    (call,) = CALL["tool_calls"]
    names = ({**call, "function": {**call["function"], "name": name}} for name in ("f", "g"))
    try:
        prompt = renderer.render([QUESTION], WITH_TOOL, add_generation_prompt=True)
        renderings = [renderer.render([QUESTION, {**CALL, "tool_calls": [call]}], WITH_TOOL) for call in names]
    except BadRowError:
        return ""
    if not all(ANSWER in rendering for rendering in renderings):
        return ""
    begin = _after_prompt(prompt, commonprefix(renderings)).partition("{")[0].strip()  # noqa: RUF071
    return begin if any(map(str.isalpha, begin)) else ""


class AnswerParser:
    """Split the answers of a model into their parts.

    Args:
        answer_format: that of the template; the default has no parts.
        response_template: that of the tokenizer, with which transformers parses answers.

    Attributes:
        num_unmatched: the number of answers that the response template does not match. Their text is the final text.

    Raises:
        UserError: the response template is invalid.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        answer_format: AnswerFormat | None = None,
        response_template: Mapping[str, Any] | None = None,
    ):
        self._tokenizer: Any = tokenizer
        self._special = PlainText(tokenizer).special
        self._format = answer_format or AnswerFormat()
        self._response_template = response_template
        self._has_parts = bool(self._response_template or self._format != AnswerFormat())
        self.num_unmatched = 0
        if response_template:
            try:
                tokenizer.get_response_parser(dict(response_template), prefix="")
            except Exception as error:  # it can raise anything for a template with other types
                raise UserError(
                    f"models/tokenizer: its response_template is invalid: {error}; fix it in the model's "
                    "tokenizer_config.json, or remove it"
                ) from None

    def read(self, prompt: Sequence[int], answer: Sequence[int], end: Sequence[int] = ()) -> AnswerParts:
        """The parts of an answer in token ids, without the EOS token `end`."""
        if self._has_parts:
            prompt_text, text = (
                # Without spaces around special tokens, which tokenizers without a fast version would add.
                self._tokenizer.decode(ids, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False)
                for ids in (prompt, [*answer, *end])
            )
            parts = self.parse(prompt_text, text)
            if parts.is_open or parts.reasoning or parts.calls or parts.text != self._clean(text):
                return parts
        text = self._tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return AnswerParts(str(text).strip())

    def parse(self, prompt: str, answer: str) -> AnswerParts:
        """The parts of an answer with its special tokens, which they do not have."""
        parts = self._format.split(prompt, answer)
        if self._response_template and not parts.is_open:
            parts = self._apply_response_template(prompt, answer)
        text, reasoning, calls = (self._clean(part or "") for part in (parts.text, parts.reasoning, parts.calls))
        if parts.is_open:
            return replace(parts, text="", reasoning=reasoning)
        return AnswerParts(text or calls, reasoning or None, calls or None)

    def _apply_response_template(self, prompt: str, answer: str) -> AnswerParts:
        """The parts of an answer as transformers parses them; all of it is text if the template does not match."""
        try:
            parser = self._tokenizer.get_response_parser(self._response_template, prefix=prompt)
            parser.feed(answer)
            message, last_events = parser.finalize()
        except Exception:  # a parser of the content, such as that of JSON, can raise anything
            self.num_unmatched += 1
            return AnswerParts(answer)
        content, calls = message.get("content", ""), message.get("tool_calls")
        reasoning = next((message[name] for name in REASONING_FIELDS if name in message), None)
        closed_last = {event["field"] for event in last_events if event["type"] == "region_close"}
        is_open = not content and not calls and not closed_last.isdisjoint(REASONING_FIELDS)
        if not isinstance(content, str) or not (content or calls or is_open):
            self.num_unmatched += bool(self._clean(answer))
            return AnswerParts(answer)
        return AnswerParts(content, reasoning, json.dumps(calls, ensure_ascii=False) if calls else None, is_open)

    def _clean(self, text: str) -> str:
        """A text without special tokens and surrounding whitespace."""
        return self._special.sub("", text).strip()
