"""How a chat template ends answers: the tokens at which generation stops."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from re import Pattern

from stages.data.examples import BadRowError, Message
from stages.templates.conversations import Conversation
from stages.templates.rendering import Renderer

ANSWER = "ANSWER"  # the response in test conversations; a special token after it is the template's EOS token
QUESTION: Message = {"role": "user", "content": "A"}
REPLY: Message = {"role": "assistant", "content": ANSWER}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        # Mistral requires an id of nine characters.
        {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": {"a": ANSWER}}}
    ],
}
RESULT: Message = {"role": "tool", "content": "A", "tool_call_id": "123456789", "name": "f"}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": PARAMETERS}}
WITH_TOOL = Conversation([], tools=[TOOL])


@dataclass(frozen=True)
class AnswerEnd:
    """What ends an answer.

    token: the special token at which generation stops.
    next_header: if the template ends answers with the header of the next message, its text up to the token.
    after: what the template writes after the token at the end of a conversation.
    """

    token: str
    next_header: str = ""
    after: str = ""


def find_text_end(renderer: Renderer, special: Pattern[str], stop_tokens: Collection[str]) -> AnswerEnd | None:
    """The end of an answer that is text; None if no special token follows it.

    Raises:
        BadRowError: the template can't render a question and an answer.
    """
    messages = [QUESTION, REPLY]
    exchange = renderer.adapt("content_as_parts", messages, ANSWER)
    if ANSWER not in exchange:
        return None
    found = special.search(exchange, exchange.rfind(ANSWER) + len(ANSWER))
    if found is None:
        return _find_next_header(renderer, special, stop_tokens, messages, QUESTION)
    end = found
    while end[0] not in stop_tokens and (following := special.match(exchange, end.end())):
        end = following  # Command R7B has two special tokens after an answer, and stops at the second
    end = end if end[0] in stop_tokens else found
    return AnswerEnd(end[0], after=exchange[end.end() :])


def find_call_end(
    renderer: Renderer, special: Pattern[str], stop_tokens: Collection[str], after: str
) -> AnswerEnd | None:
    """The end of a tool call; None if the template has no tool calls.

    Args:
        after: what the template writes at the end of a conversation.
    """
    messages = [QUESTION, CALL]
    try:
        rendered = renderer.adapt("calls_as_text", messages, ANSWER, WITH_TOOL)
    except BadRowError:
        return None
    if ANSWER not in rendered:
        return None
    *_, end = rendered.removesuffix(after).rpartition(ANSWER)
    if found := special.findall(end):
        return AnswerEnd(found[-1], after=after)
    return _find_next_header(renderer, special, stop_tokens, messages, RESULT, WITH_TOOL)


def _find_next_header(
    renderer: Renderer,
    special: Pattern[str],
    stop_tokens: Collection[str],
    messages: Sequence[Message],
    following: Message,
    row: Conversation | None = None,
) -> AnswerEnd | None:
    """The special token that begins the next message, as in GLM-4.5, if it is one at which the model stops."""
    text = renderer.render(messages, row)
    try:
        longer = renderer.render([*messages, following], row)
    except BadRowError:
        return None
    header = longer.removeprefix(text)
    found = special.match(header.lstrip())
    if not longer.startswith(text) or not found or found[0] not in stop_tokens:
        return None
    return AnswerEnd(found[0], next_header=header[: header.index(found[0])] + found[0])
