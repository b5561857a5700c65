"""Locate answers in what a chat template renders: the prompt of inference, and what the model should write there."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from os.path import commonprefix
from re import Pattern

from stages.data.examples import BadRowError, Message
from stages.runtime.errors import UserError
from stages.templates.answer_ends import ANSWER, QUESTION, REPLY, find_call_end, find_text_end
from stages.templates.answer_parts import AnswerFormat
from stages.templates.conversations import Conversation
from stages.templates.rendering import Renderer


@dataclass(frozen=True)
class Response:
    """An answer in the rendering that ends with it.

    text: the rendering of the messages up to this answer.
    start, end: the positions of the first character of the response, and after its EOS token.
    eos_token: the token that ends it.
    """

    text: str
    start: int
    end: int
    eos_token: str


class ResponseFinder:
    """Find the answers in renderings.

    Args:
        special: matches special tokens.
        stop_tokens: those at which the model stops.
        reasoning_end: what ends the reasoning that the generation prompt opens, if the template does not render it.

    Attributes:
        answer_format: how the template writes the parts of an answer.
        eos_tokens: the tokens that end an answer: that of a text, and if it is another one, that of a tool call.

    Raises:
        BadRowError: the template can't render a question and an answer.
        UserError: it has no special token after an answer.
    """

    def __init__(
        self, renderer: Renderer, special: Pattern[str], stop_tokens: Collection[str], reasoning_end: str | None
    ):
        self._renderer = renderer
        self._render = renderer.render
        self._reasoning_end = reasoning_end
        text_end = find_text_end(renderer, special, stop_tokens)
        if not text_end:
            raise UserError(
                f"{renderer.where}: has no special token after an answer, so generation would never stop; must have "
                "one after each answer, such as {{ eos_token }}, or begin the next message with one that eos_token_id "
                "in the model's generation_config.json names"
            )
        self._text_end = text_end
        self._call_end = find_call_end(renderer, special, stop_tokens, text_end.after)
        self.answer_format = AnswerFormat.of_template(renderer, special, reasoning_end)
        # The tag that ends the reasoning before an answer, such as `</think>`; empty if something else ends it.
        closing = self.answer_format.closing
        is_tag = re.fullmatch(r"</\w+>|\[/\w+\]", closing) and not special.search(closing)
        self._closing_tag = closing if is_tag else ""
        self.eos_tokens = list(dict.fromkeys(end.token for end in (self._text_end, self._call_end) if end))

    def find(self, messages: list[Message], row: Conversation) -> Response:
        """Locate the last message, an answer, in the rendering of the messages of a row."""
        end = self._call_end if messages[-1].get("tool_calls") else self._text_end
        if end is None:
            raise BadRowError("not_rendered", f"{self._renderer.where} can't render tool calls")
        where = f"message {len(messages):,}"
        if self._closing_tag and self._closing_tag in messages[-1].get("reasoning_content", ""):
            raise BadRowError("closing_tag", f"the reasoning of {where} contains {self._closing_tag}, which ends it")
        prompt = self._render(messages[:-1], row, add_generation_prompt=True)
        text = self._render(messages, row)
        tags = messages[-1]["content"].count(self._closing_tag) if self._closing_tag else 0
        if tags and text.count(self._closing_tag, len(prompt)) > tags:
            # The template has added an empty thought, as Qwen3.8's does.
            messages = [*messages[:-1], self._split_reasoning(messages[-1])]
            text = self._render(messages, row)
        if not text.startswith(prompt):
            text = prompt + self._continue(prompt, text, messages, row)
        text = text.removesuffix(end.after) + end.next_header
        stop = text.rfind(end.token, len(prompt))
        if stop < 0:
            raise BadRowError("not_rendered", f"{self._renderer.where} renders {where} without {end.token}")
        if found := next((token for token in self.eos_tokens if token in text[len(prompt) : stop]), None):
            detail = f"{self._renderer.where} renders {where} with {found} inside, at which generation stops"
            raise BadRowError("inexact_mask", detail)
        return Response(text, len(prompt), stop + len(end.token), end.token)

    def _continue(self, prompt: str, text: str, messages: list[Message], row: Conversation) -> str:
        """What the model should write after a prompt with which the rendering of the answer does not begin.

        Args:
            text: the rendering of the messages, the last of which is the answer.
        """
        *earlier, answer = messages
        # Without reasoning. The prompt opens the reasoning with what it has and this has not.
        reply = self._render([*earlier, REPLY], row)
        header = commonprefix([prompt, reply])  # noqa: RUF071 (of characters, not of paths)
        opening = prompt[len(header) :]
        if opening and not opening.strip() and text.startswith(header):
            return text[len(header) :]  # the template closes an empty thought that it has opened with less whitespace
        if opening and reply.startswith(ANSWER, len(header)):
            return self._close_reasoning(header, opening, messages, row)
        # A template may render earlier messages differently once the answer is there: Mistral's has the system prompt
        # only if a question is last. The model sees this prompt, so the answer must follow it. It is the same as after
        # a single question.
        question = self._render([QUESTION], row, add_generation_prompt=True)
        exchange = self._render([QUESTION, answer], row)
        response = exchange.removeprefix(question)
        if response != exchange and text.endswith(response):
            return response
        if not opening and "reasoning_content" in answer:
            raise BadRowError(
                "inexact_mask",
                f"the generation prompt of {self._renderer.where} leaves no place for the reasoning of message "
                f"{len(messages):,}; set template_options, such as {{enable_thinking: true}}",
            )
        raise self._inexact(messages)

    def _close_reasoning(self, header: str, opening: str, messages: list[Message], row: Conversation) -> str:
        """An answer of a template that opens the reasoning in the prompt only: reasoning, its end, and the rest."""
        *earlier, answer = messages
        answer = self._split_reasoning(answer)
        if self._reasoning_end is None:
            raise BadRowError(
                "open_reasoning",
                f"the generation prompt of {self._renderer.where} opens the reasoning with {opening!r}, and nothing "
                'closes it; set reasoning_end to the text that does, such as "\\n</think>\\n\\n"',
            )
        spoken = {name: value for name, value in answer.items() if name != "reasoning_content"}
        text = self._render([*earlier, spoken], row)
        if not text.startswith(header):
            raise self._inexact(messages)
        thought = answer.get("reasoning_content", "").strip("\n")
        return f"{thought}{self._reasoning_end}{text.removeprefix(header)}"

    def _split_reasoning(self, answer: Message) -> Message:
        """An answer whose reasoning is in its content, between the tags of the template, with it apart."""
        opening_tag = self._closing_tag.replace("/", "")
        content = answer["content"]
        if not self._closing_tag or "reasoning_content" in answer or not content.startswith(opening_tag):
            return answer
        thought, found, content = content.removeprefix(opening_tag).partition(self._closing_tag)
        # The tags have whitespace around them, but the indentation of the first line is content.
        content = re.sub(r"^\s*\n|^\s", "", content)
        return {**answer, "content": content, "reasoning_content": thought.strip("\n")} if found else answer

    def _inexact(self, messages: list[Message]) -> BadRowError:
        return BadRowError(
            "inexact_mask",
            f"{self._renderer.where} renders message {len(messages):,} differently after a generation prompt, so no "
            "mask is exact; set template to a Jinja file that renders it the same",
        )
