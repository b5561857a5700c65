"""Rows of plain text: every token is supervised, and the EOS token after them."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from stages.data.examples import BadRowError
from stages.templates.conversations import Conversation, Rendered
from stages.templates.masking import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PlainText:
    """Text without a template.

    Attributes:
        special: matches the special tokens of the tokenizer.
        bos: the BOS token if the tokenizer adds one, and it is not the EOS token, too.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        tokens = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, tokens)))
        first: list[int] = tokenizer("")["input_ids"][:1]
        # Some tokenizers append EOS, and some use one token for both; EOS never begins a text.
        self.bos = first if first == [tokenizer.bos_token_id] != [tokenizer.eos_token_id] else []

    def render(
        self, conversations: Sequence[Conversation], eos_token_id: int, errors: dict[int, BadRowError]
    ) -> list[Rendered]:
        """The examples of those conversations that are plain text. Adds the others' errors by their index.

        Without a BOS token the first token has no prediction, so it is masked.
        """
        texts = {
            row: conversation.text for row, conversation in enumerate(conversations) if conversation.text is not None
        }
        examples = []
        for (row, text), ids in zip(texts.items(), tokenize(self._tokenizer, [*texts.values()], False), strict=True):
            try:
                self.reject_special_tokens([text])
            except BadRowError as error:
                errors[row] = error
                continue
            prompt = self.bos or ids[:1]
            spans = [prompt, [*ids[0 if self.bos else 1 :], eos_token_id]]
            examples.append(Rendered(row, conversations[row], [text.strip()], [text.strip()], spans))
        return examples

    def reject_special_tokens(self, texts: Iterable[str]) -> None:
        """Raises BadRowError if a text contains a special token, which could forge a message."""
        for text in texts:
            if found := self.special.search(text):
                raise BadRowError("special_token", f"its text contains {found[0]}, a special token of the tokenizer")
