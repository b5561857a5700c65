"""Raw rows → conversations, and the ids that determine splits and duplicates."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import regex

from stages.data.examples import BadRowError, Message
from stages.data.splits import content_hash, normalize
from stages.templates.masking import Encoded

# Whitespace and characters without a glyph, such as zero-width spaces.
BLANK = regex.compile(r"[\s\p{Default_Ignorable_Code_Point}\p{Cc}\p{Cf}\u2800]*")


@dataclass(frozen=True)
class Conversation:
    """Messages, the last of which is a trained answer; or plain text, in one message with the role `text`.

    input: the `input` of an Alpaca row, or an empty string.
    tools: the tools that the answers may call.
    options: of the chat template, such as `enable_thinking`.
    """

    messages: Sequence[Message]
    input: str = ""
    tools: Sequence[dict[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str | None:
        """The plain text, if this is one."""
        return str(self.messages[0]["content"]) if self.messages[0]["role"] == "text" else None

    @property
    def first_question(self) -> Message:
        return next(message for message in self.messages if message["role"] in ("user", "text"))

    @property
    def questions(self) -> list[str]:
        """The texts of the user messages, the first one followed by the `input`; or the plain text."""
        first, *later = [message["content"] for message in self.messages if message["role"] in ("user", "text")]
        return ["\n\n".join(filter(None, [first, self.input])), *later]

    def up_to(self, answer: int) -> "Conversation":
        """The messages up to one answer, which alone is trained."""
        messages = [
            message | {"train": False} if message["role"] == "assistant" else message
            for message in self.messages[:answer]
        ]
        return replace(self, messages=[*messages, self.messages[answer]])


@dataclass(frozen=True)
class Rendered:
    """One example before it is truncated.

    row: the index of its conversation, which may have several examples.
    prompts, responses: for each trained answer, the text before it, and its text.
    spans: token ids, alternately masked and supervised.
    """

    row: int
    conversation: Conversation
    prompts: list[str]
    responses: list[str]
    spans: list[list[int]]


@dataclass(frozen=True)
class Formatted:
    """Formatted conversations: examples in order, and the conversations that the template can't render exactly.

    encoded: token ids and labels of the examples; empty for those that do not fit.
    errors: by the index of the conversation.
    """

    examples: list[Rendered]
    encoded: Encoded
    errors: dict[int, BadRowError]

    @property
    def prompts(self) -> list[str]:
        """For each example, the text before its last response that fits."""
        return self._last([example.prompts for example in self.examples])

    @property
    def responses(self) -> list[str]:
        """For each example, the text of its last response that fits."""
        return self._last([example.responses for example in self.examples])

    def _last(self, texts: list[list[str]]) -> list[str]:
        return [all_[n - 1] if n else "" for all_, n in zip(texts, self.encoded.responses.tolist(), strict=True)]


def parse_conversation(
    row: dict[str, Any], train_on: Literal["all_answers", "last_answer"] = "all_answers"
) -> Conversation:
    """The messages of a raw row up to the last trained answer.

    Answers before the first question are not trained, because they have no prompt.

    Raises:
        BadRowError: no answer is trained, or a message is empty.
    """
    messages: list[Message] = json.loads(row["messages"])
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    questions = [at for at, message in enumerate(messages) if message["role"] == "user"]
    if [message["role"] for message in messages] != ["text"]:
        if not answers or not questions or questions[0] > answers[-1]:
            raise BadRowError("no_exchange", "has no user message followed by an assistant message")
        for at in answers:
            if at < questions[0] or (train_on == "last_answer" and at < answers[-1]):
                messages[at]["train"] = False
        trained = [at for at in answers if messages[at].get("train", True)]
        if not trained:
            raise BadRowError("nothing_to_train", "no answer has a weight of 1")
        messages = messages[: trained[-1] + 1]
    for number, message in enumerate(messages, 1):
        # Only calls and the results of tools may have no text.
        if BLANK.fullmatch(message["content"]) and message["role"] != "tool" and "tool_calls" not in message:
            reason = "empty_response" if message["role"] in ("assistant", "text") else "empty_instruction"
            raise BadRowError(reason, f"message {number} ({message['role']}) is empty")
    tools, options = (json.loads(row.get(name) or "null") for name in ("tools", "chat_template_kwargs"))
    input_text = row["input"] if row["input"].strip() else ""
    return Conversation(messages, input_text, tools or (), options or {})


def content_ids(conversation: Conversation) -> tuple[str, str]:
    """The id of the prompt, which determines the split, and of the example, which identifies duplicates.

    Conversations that begin with the same question have the same prompt id, so the hash puts them in the same split.
    Whitespace around messages does not change the ids.
    """
    first = conversation.first_question
    prompt_id = content_hash(normalize(first["content"]), normalize(conversation.input))
    others = [message for message in conversation.messages if message is not first]
    more = []
    if conversation.tools or any(len(message) > len(("role", "content")) for message in conversation.messages):
        keys = [{**message, "role": "", "content": ""} for message in conversation.messages]
        more = [json.dumps([keys, conversation.tools], sort_keys=True)]
    if conversation.options:
        more.append(json.dumps(conversation.options, sort_keys=True))
    if len(others) == 1 and not more:
        return prompt_id, content_hash(prompt_id, others[0]["content"].strip())
    texts = (message[name].strip() for message in others for name in ("role", "content"))
    return prompt_id, content_hash(prompt_id, *texts, *more)
