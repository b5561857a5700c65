"""Raw rows → conversations, and the ids that determine splits and duplicates."""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.data.examples import BadRowError, Message
from stages.data.masking import Encoded


@dataclass(frozen=True)
class Conversation:
    """Messages, the last of which is the assistant's.

    input: the `input` of an Alpaca row, or an empty string.
    where: source and row, for error messages.
    """

    messages: Sequence[Message]
    input: str = ""
    where: str = ""

    @property
    def responses(self) -> list[str]:
        return [message["content"] for message in self.messages if message["role"] == "assistant"]

    @property
    def first_question(self) -> Message:
        return next(message for message in self.messages if message["role"] == "user")


@dataclass(frozen=True)
class Formatted:
    """Formatted conversations, in order.

    prompts: the text before the last response that fits. responses: the text of that response.
    encoded: token ids and labels; empty for conversations in `errors` and for those that do not fit.
    errors: by index, the conversations that the template can't render exactly.
    """

    prompts: list[str]
    responses: list[str]
    encoded: Encoded
    errors: dict[int, BadRowError]


def parse_conversation(row: dict[str, Any]) -> Conversation:
    """The messages of a raw row up to the last response, stripped of surrounding whitespace.

    Raises:
        BadRowError: there is no response, or a message is empty.
    """
    messages = [{**message, "content": message["content"].strip()} for message in row["messages"]]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise BadRowError("no_exchange", "has no user message followed by an assistant message")
    for number, message in enumerate(messages, 1):
        if not message["content"]:
            reason = "empty_response" if message["role"] == "assistant" else "empty_instruction"
            raise BadRowError(reason, f"message {number} ({message['role']}) is empty")
    return Conversation(messages, row["input"].strip(), f"{row['source']}, row {row['source_row']:,}")


def content_ids(conversation: Conversation) -> tuple[str, str]:
    """The id of the prompt, which determines the split, and of the example, which identifies duplicates.

    Conversations that begin with the same question have the same prompt id and are never in different splits.
    """
    first = conversation.first_question
    prompt_id = content_hash(normalize(first["content"]), normalize(conversation.input))
    others = [message for message in conversation.messages if message is not first]
    if len(others) == 1:
        return prompt_id, content_hash(prompt_id, others[0]["content"])
    return prompt_id, content_hash(prompt_id, *(part for message in others for part in message.values()))


def normalize(text: str) -> str:
    """Remove differences of case, whitespace and Unicode form, so that prompts that differ only in these are equal."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def content_hash(*parts: str) -> str:
    """The first 32 hexadecimal digits of the SHA-256 of the parts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
