"""Jinja chat templates: conversations with any number of messages."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.data.conversations import Conversation, Formatted
from stages.data.examples import BadRowError, Message
from stages.data.masking import mask_spans, tokenize
from stages.runtime.errors import UserError, is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some chat templates write the current date into the prompt. The same data must give the same tokens on any day, so
# they get the date that Llama 3.1's template uses as its default.
FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July') | "
    "replace('%m', '07') | replace('%Y', '2024') | replace('%A', 'Friday') }}{% endmacro +%}"
)
ANSWER = "ANSWER"  # the response in a test conversation; the special token after it is the template's EOS token


class ChatTemplate:
    """A Jinja chat template. Each assistant message is supervised, including its EOS token.

    The spans of the responses are found by rendering prefixes of the conversation: the messages before a response, with
    the generation prompt, and the messages up to and including it. If one of these is not a prefix of the full
    rendering, no mask is exact.

    Args:
        chat_template: Jinja text, as `apply_chat_template` of transformers takes it.
        where: the name of the template in messages.

    Raises:
        UserError: the template can't be rendered, or has no special token after a response.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat_template: str, where: str):
        self.chat_template = chat_template
        self._tokenizer = tokenizer
        self._where = where
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        special = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)))
        try:
            exchange = self._render([{"role": "user", "content": "A"}, {"role": "assistant", "content": ANSWER}])
        except BadRowError as error:
            raise UserError(f"{where}: can't render a question and an answer: {error}; fix it") from None
        end = self._special.search(exchange, exchange.rfind(ANSWER) + len(ANSWER))
        if ANSWER not in exchange or not end:
            raise UserError(
                f"{where}: has no special token after an answer, so generation would never stop; "
                "must have one after each answer, such as {{ eos_token }}"
            )
        self._eos_token = end[0]
        ((self.eos_token_id,),) = tokenize(tokenizer, [self._eos_token], allow_special_tokens=True)

    def format(self, conversations: Sequence[Conversation], max_length: int) -> Formatted:
        """Render, tokenize and mask.

        Raises:
            UserError: the rendering of a message depends on the messages after it.
        """
        errors = {}
        rendered: list[tuple[str, list[int]]] = []  # the full text, and the positions where its responses begin
        for index, conversation in enumerate(conversations):
            try:
                rendered.append(self._find_responses(conversation))
            except BadRowError as error:
                errors[index] = error
                rendered.append(("", []))
        # Tokenize in a single call: for each conversation, the full text and then the prompt of each response.
        texts = [part for text, starts in rendered for part in (text, *(text[:start] for start in starts))]
        ids = iter(tokenize(self._tokenizer, texts, allow_special_tokens=True))
        spans: list[list[list[int]]] = []
        for index, (_, starts) in enumerate(rendered):
            full_ids, prompt_ids = next(ids), [next(ids) for _ in starts]
            try:
                spans.append(self._split_spans(full_ids, prompt_ids))
            except BadRowError as error:
                errors[index] = error
                spans.append([])
        encoded = mask_spans(spans, max_length)
        prompts, responses = [], []
        for num_responses, (text, starts), conversation in zip(
            encoded.responses.tolist(), rendered, conversations, strict=True
        ):
            prompts.append(text[: starts[num_responses - 1]] if num_responses else "")
            responses.append(conversation.responses[num_responses - 1])
        return Formatted(prompts, responses, encoded, errors)

    def encode_prompts(self, questions: Sequence[str], history: Sequence[Message] = ()) -> list[list[int]]:
        """Token ids up to where the response begins, the same as in training.

        Args:
            history: messages before each question.

        Raises:
            UserError: the template can't render a question.
        """
        conversations = [[*history, {"role": "user", "content": text.strip()}] for text in questions]
        try:
            self._reject_special_tokens([message["content"] for messages in conversations for message in messages])
            texts = [self._render(messages, add_generation_prompt=True) for messages in conversations]
        except BadRowError as error:
            raise UserError(f"{self._where}: {error}; change the question") from None
        return tokenize(self._tokenizer, texts, allow_special_tokens=True)

    def _find_responses(self, conversation: Conversation) -> tuple[str, list[int]]:
        """The full rendering, and the position where each response begins in it.

        Raises:
            BadRowError: a message contains a special token, or the template can't render the conversation.
            UserError: the rendering of a message depends on the messages after it.
        """
        messages = list(conversation.messages)
        if conversation.input:
            first = next(at for at, message in enumerate(messages) if message["role"] == "user")
            messages[first] = {"role": "user", "content": f"{messages[first]['content']}\n\n{conversation.input}"}
        self._reject_special_tokens([message["content"] for message in messages])
        full = self._render(messages)
        starts = []
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._render(messages[:at], add_generation_prompt=True)
                is_last = at + 1 == len(messages)
                with_response = full if is_last else self._render(messages[: at + 1])
                response, end, _ = with_response[len(prompt) :].partition(self._eos_token)
                if not with_response.startswith(prompt) or not end or not full.startswith(prompt + response + end):
                    when = "after a generation prompt" if is_last else "if other messages follow"
                    raise UserError(
                        f"{conversation.where}: {self._where} renders message {at + 1:,} differently {when}, "
                        "so no mask is exact; set template to a Jinja file that does not rewrite messages"
                    )
                starts.append(len(prompt))
        return full, starts

    def _split_spans(self, full_ids: list[int], all_prompt_ids: list[list[int]]) -> list[list[int]]:
        """Split the ids of a conversation into spans, alternately masked and supervised.

        Raises:
            BadRowError: the ids of a prompt are not a prefix, because a token crosses the boundary.
        """
        spans, end = [], 0
        for prompt_ids in all_prompt_ids:
            start = len(prompt_ids)
            if full_ids[:start] != prompt_ids:
                raise BadRowError("unclean_boundary", "the first token of a response includes the end of its prompt")
            response_end = full_ids.index(self.eos_token_id, start) + 1
            spans += [full_ids[end:start], full_ids[start:response_end]]
            end = response_end
        return spans

    def _reject_special_tokens(self, texts: Sequence[str]) -> None:
        for text in texts:
            if found := self._special.search(text):
                raise BadRowError("special_token", f"its text contains {found[0]}, a special token of the tokenizer")

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=FIXED_DATE + self.chat_template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except Exception as error:  # a template can raise anything
            if is_out_of_memory(error):
                raise
            raise BadRowError("refused_by_template", f"{self._where}: {error}") from None
