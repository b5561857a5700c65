"""Alpaca's template: one instruction and one response."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.data.conversations import Conversation, Formatted
from stages.data.examples import BadRowError, Message
from stages.data.masking import mask_spans, tokenize

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
        return ALPACA_WITH_INPUT.format(instruction=instruction.strip(), input=input_text.strip())
    return ALPACA.format(instruction=instruction.strip())


class AlpacaTemplate:
    """One instruction and one response, tokenized separately and joined, so that the boundary is exact.

    The prompt begins with the BOS token if the tokenizer adds one, and it is not the EOS token, too. Text from the data
    can't become special tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.chat_template = None
        self.eos_token_id: int = tokenizer.eos_token_id
        self._tokenizer = tokenizer
        added: list[int] = tokenizer("")["input_ids"][:1]
        # Some tokenizers append EOS, and some use one token for both; EOS never begins a prompt.
        self._bos = added if added == [tokenizer.bos_token_id] != [tokenizer.eos_token_id] else []

    def format(self, conversations: Sequence[Conversation], max_length: int) -> Formatted:
        """Render, tokenize and mask."""
        errors = {}
        for index, conversation in enumerate(conversations):
            roles = [message["role"] for message in conversation.messages]
            if roles != ["user", "assistant"]:
                detail = (
                    f"found {', '.join(roles)}; template alpaca takes one instruction and one response, chat takes more"
                )
                errors[index] = BadRowError("not_single_turn", detail)
        prompts = [render_alpaca(each.messages[0]["content"], each.input) for each in conversations]
        responses = [each.responses[-1] for each in conversations]
        spans = self.encode(prompts, responses)
        for index in errors:
            spans[index] = []
        return Formatted(prompts, responses, mask_spans(spans, max_length), errors)

    def encode_prompts(self, questions: Sequence[str], history: Sequence[Message] = ()) -> list[list[int]]:
        """Token ids up to where the response begins, the same as in training. `history` is not used."""
        return self._tokenize_prompts([render_alpaca(question) for question in questions])

    def encode(self, prompts: list[str], responses: list[str]) -> list[list[list[int]]]:
        """The spans of each example: the token ids of its prompt, and of its response with the EOS token."""
        answers = tokenize(self._tokenizer, responses, allow_special_tokens=False)
        return [
            [prompt, [*answer, self.eos_token_id]]
            for prompt, answer in zip(self._tokenize_prompts(prompts), answers, strict=True)
        ]

    def _tokenize_prompts(self, prompts: list[str]) -> list[list[int]]:
        return [self._bos + ids for ids in tokenize(self._tokenizer, prompts, allow_special_tokens=False)]
