"""Alpaca's template: one instruction and one response."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.data.examples import BadRowError, Message
from stages.templates.answer_parts import AnswerParser
from stages.templates.conversations import Conversation, Formatted, Rendered
from stages.templates.masking import mask_spans, tokenize
from stages.templates.plain_text import PlainText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Taori et al., Stanford Alpaca, 2023: https://github.com/tatsu-lab/stanford_alpaca#data-release
ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""
ALPACA_WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""


def render_alpaca(instruction: str, input_text: str = "") -> str:
    """Alpaca's prompt, up to where the response begins.

    Example:
        >>> render_alpaca("Name a color.").endswith("Name a color.\\n\\n### Response:\\n")
        True
    """
    # `format` is called only once, so braces in the data are not interpreted.
    if input_text.strip():
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=input_text)
    return ALPACA.format(instruction=instruction)


def alpaca_as_jinja(begins_with_bos: bool) -> str:
    """A chat template that renders a question as in training, for servers and other programs.

    Only the last user message is rendered, because training examples have no earlier ones. It follows the system
    messages if there are some. If the last message is of the assistant, the answer begins with it.
    """
    before, after = map(json.dumps, render_alpaca("\0").split("\0"))
    return (
        "{% set found = namespace(system='', user='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set found.system = found.system + (message['content'] | trim) + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}{% set found.user = message['content'] %}{% endif %}{% endfor %}"
        f"{{{{ {'bos_token + ' if begins_with_bos else ''}{before} + found.system + found.user + {after} }}}}"
        "{% if messages[-1]['role'] == 'assistant' %}{{ messages[-1]['content'] }}{% endif %}"
    )


class AlpacaTemplate:
    """One instruction and one response, tokenized separately and joined, so that the boundary is exact.

    The prompt begins with the BOS token if the tokenizer adds one. Text from the data can't become special tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.eos_token_ids: list[int] = [tokenizer.eos_token_id]
        self._tokenizer = tokenizer
        self._plain_text = PlainText(tokenizer)
        self.answer_parser = AnswerParser(tokenizer)
        self.chat_template = alpaca_as_jinja(bool(self._plain_text.bos))

    def format(self, conversations: Sequence[Conversation], max_length: int) -> Formatted:
        """Render, tokenize and mask."""
        errors: dict[int, BadRowError] = {}
        pairs: dict[int, Conversation] = {}
        for row, conversation in enumerate(conversations):
            try:
                if conversation.text is None:
                    _require_one_pair(conversation)
                    pairs[row] = conversation
            except BadRowError as error:
                errors[row] = error
        prompts = [render_alpaca(pair.messages[0]["content"], pair.input) for pair in pairs.values()]
        responses = [pair.messages[1]["content"] for pair in pairs.values()]
        examples = [
            Rendered(row, conversation, [prompt], [response.strip()], spans)
            for (row, conversation), prompt, response, spans in zip(
                pairs.items(), prompts, responses, self.encode(prompts, responses), strict=True
            )
        ]
        examples += self._plain_text.render(conversations, self.eos_token_ids[0], errors)
        examples.sort(key=lambda example: example.row)
        return Formatted(examples, mask_spans([example.spans for example in examples], max_length), errors)

    def encode_prompts(self, questions: Sequence[str], history: Sequence[Message] = ()) -> list[list[int]]:
        """Token ids up to where the response begins, the same as in training. `history` is not used."""
        return self._tokenize_prompts([render_alpaca(question) for question in questions])

    def encode(self, prompts: list[str], responses: list[str]) -> list[list[list[int]]]:
        """The spans of each example: the token ids of its prompt, and of its response with the EOS token."""
        answers = tokenize(self._tokenizer, responses, allow_special_tokens=False)
        return [
            [prompt, [*answer, *self.eos_token_ids]]
            for prompt, answer in zip(self._tokenize_prompts(prompts), answers, strict=True)
        ]

    def _tokenize_prompts(self, prompts: list[str]) -> list[list[int]]:
        bos = self._plain_text.bos
        return [bos + ids for ids in tokenize(self._tokenizer, prompts, allow_special_tokens=False)]


def _require_one_pair(conversation: Conversation) -> None:
    """Check that a conversation has nothing but a question and its answer."""
    roles = [message["role"] for message in conversation.messages]
    if roles != ["user", "assistant"]:
        detail = f"found {', '.join(roles)}; template alpaca takes one instruction and one response, chat takes more"
        raise BadRowError("not_single_turn", detail)
    more = [name for message in conversation.messages for name in message if name not in ("role", "content")]
    more += ["tools"] * bool(conversation.tools) + ["chat_template_kwargs"] * bool(conversation.options)
    if more:
        raise BadRowError("not_rendered", f"template alpaca does not render {more[0]!r}; a chat template may")
