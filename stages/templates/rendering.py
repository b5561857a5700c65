"""Render messages with a Jinja chat template, in the form in which it takes them."""

import json
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

from stages.data.examples import BadRowError, Message
from stages.runtime.errors import UserError, is_out_of_memory
from stages.templates.conversations import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some chat templates write the current date into the prompt. The same data must give the same tokens on any day, so
# they get the date that Llama 3.1's template uses as its default.
FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July') | "
    "replace('%m', '07') | replace('%Y', '2024') | replace('%A', 'Friday') }}{% endmacro %}\n"
)
# What `apply_chat_template` passes to a template, besides special tokens.
PASSED = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
TIME_LIMIT = 30  # seconds to find out how a template renders messages, which takes milliseconds


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread, which alone gets signals: a loop in a template can take hours."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"takes longer than {seconds:g} s")

    if current_thread() is not main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # repeated, in case that an error is expected and ignored
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Renderer:
    """Render messages with a chat template, its options and a fixed date.

    Args:
        chat_template: Jinja text, as `apply_chat_template` of transformers takes it.
        where: the name of the template in messages.
        options: variables of the template, such as `enable_thinking`. Those of a row override them.

    Attributes:
        chat_template: the template with the options and the fixed date built in.
        calls_as_text: whether the arguments of calls are JSON text. transformers documents that they are objects, but
            some templates (DeepSeek's) can only append them.
        content_as_parts: whether the content of messages is a list of parts, as templates of models that also read
            images need it.

    Raises:
        UserError: the template does not use an option.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", chat_template: str, where: str, options: Mapping[str, Any]
    ):
        self.where = where
        self.calls_as_text = self.content_as_parts = False
        self._tokenizer = tokenizer
        self._text = chat_template
        # Each on a line of its own: `trim_blocks` removes the line break, and `lstrip_blocks` treats the template's
        # first line as before.
        built_in = [f"{{% set {name} = {name} if {name} is defined else {options[name]!r} %}}\n" for name in options]
        self.chat_template = "".join([*built_in, FIXED_DATE * ("strftime_now" in chat_template), chat_template])
        try:
            self.require_options(options)
        except BadRowError as error:
            raise UserError(f"template_options: {error}") from None

    def require_options(self, options: Mapping[str, Any]) -> None:
        """Raises BadRowError if the template does not use one of these options."""
        for name in options:
            if name not in self._variables:
                known = ", ".join(sorted(self._variables)) or "none"
                raise BadRowError("not_rendered", f"{self.where} does not use the option {name!r}; it uses {known}")

    @cached_property
    def _variables(self) -> set[str]:
        """The variables that the template reads and does not compute itself."""
        from jinja2 import Environment, meta, nodes

        text = re.sub(r"{%[-+]?\s*(end)?generation\s*[-+]?%}", "", self._text)  # a tag that only transformers knows
        try:
            tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)  # noqa: S701 (not rendered)
        except Exception as error:
            raise BadRowError("refused_by_template", f"{self.where}: {error}") from None
        # `meta` also finds variables that only some branches of the template set. Those with a default value are tested
        # (`if x is defined`), or set to an expression of themselves (`set x = x | default(1)`).
        tested = {test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
        updated = {
            node.target.name
            for node in tree.find_all(nodes.Assign)
            if isinstance(node.target, nodes.Name)
            and node.target.name in {name.name for name in node.node.find_all(nodes.Name)}
        }
        computed = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"} - tested - updated
        return meta.find_undeclared_variables(tree) - computed - PASSED - self._tokenizer.special_tokens_map.keys()

    def adapt(self, flag: str, messages: Sequence[Message], text: str, row: Conversation | None = None) -> str:
        """Render messages that have a text, with a flag if the rendering lacks the text without it.

        Returns:
            The rendering; an empty text if it never has the text.

        Raises:
            BadRowError: the template can't render the messages.
        """
        first_error = None
        for value in (False, True):
            setattr(self, flag, value)
            try:
                if text in (rendered := self.render(messages, row)):
                    return rendered
            except BadRowError as error:
                first_error = first_error or error
        setattr(self, flag, False)
        if first_error:
            raise first_error
        return ""

    def render(
        self,
        messages: Sequence[Message],
        row: Conversation | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of messages, with the tools and options of a row.

        Raises:
            BadRowError: the template can't render them.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [self._for_template(message) for message in messages],
                    tools=list(row.tools) or None if row else None,
                    chat_template=self.chat_template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **(row.options if row else {}),
                )
            )
        except Exception as error:  # a template can raise anything
            if is_out_of_memory(error):
                raise
            raise BadRowError("refused_by_template", f"{self.where}: {error}") from None

    def _for_template(self, message: Message) -> Message:
        """A message with the keys that templates know."""
        if len(message) == len(("role", "content")) and not self.content_as_parts:
            return message
        message = {name: value for name, value in message.items() if name != "train"}
        if self.content_as_parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
        if "tool_calls" in message and self.calls_as_text:
            message["tool_calls"] = [
                {
                    **call,
                    "function": {
                        **call["function"],
                        "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                    },
                }
                for call in message["tool_calls"]
            ]
        return message
