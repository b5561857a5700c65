"""Jinja chat templates: conversations with any number of messages."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stages.data.examples import BadRowError, Message
from stages.runtime.errors import UserError
from stages.templates.answer_ends import QUESTION
from stages.templates.answer_parts import AnswerParser
from stages.templates.completeness import missing_key, texts_in
from stages.templates.conversations import Conversation, Formatted, Rendered
from stages.templates.masking import mask_spans, tokenize
from stages.templates.plain_text import PlainText
from stages.templates.rendering import TIME_LIMIT, Renderer, time_limit
from stages.templates.responses import Response, ResponseFinder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_trained(message: Message) -> bool:
    return bool(message["role"] == "assistant" and message.get("train", True))


class ChatTemplate:
    """A Jinja chat template. Each trained answer is supervised, including its EOS token.

    The spans of the answers are found by rendering prefixes of the conversation: the messages before an answer, with
    the generation prompt, and the messages up to and including it. The first must be a prefix of the second, so that
    training and inference have the same prompt. If an answer is rendered differently when other messages follow, such
    as Qwen3's without its reasoning, the conversation becomes one example per answer.

    Everything that the row says must be in the rendered text; otherwise the row is rejected.

    Args:
        chat_template: Jinja text, as `apply_chat_template` of transformers takes it.
        where: the name of the template in messages.
        options: variables of the template, such as `enable_thinking`.
        stop_ids: the tokens at which the model stops, besides the EOS token of the tokenizer.
        reasoning_end: what ends the reasoning that the generation prompt opens, if the template does not render it.
        response_template: that of the tokenizer, if the template is the tokenizer's, too.

    Attributes:
        chat_template: the template with its options built in.
        eos_token_ids: the tokens that end an answer: that of a text, and if it is another one, that of a tool call.
        answer_parser: splits answers into reasoning, tool calls and final text.

    Raises:
        UserError: the template can't be rendered, or has no special token after a response; or the response template is
            invalid.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        chat_template: str,
        where: str,
        options: Mapping[str, Any] | None = None,
        stop_ids: Collection[int] = (),
        reasoning_end: str | None = None,
        response_template: Mapping[str, Any] | None = None,
    ):
        self._renderer = Renderer(tokenizer, chat_template, where, options or {})
        self._render = self._renderer.render
        self.chat_template = self._renderer.chat_template
        self._tokenizer = tokenizer
        self._where = where
        self._plain_text = PlainText(tokenizer)
        stop_tokens = tokenizer.convert_ids_to_tokens([*stop_ids, tokenizer.eos_token_id])
        try:
            with time_limit(TIME_LIMIT):
                self._finder = ResponseFinder(self._renderer, self._plain_text.special, stop_tokens, reasoning_end)
                header = len(self._render([QUESTION], add_generation_prompt=True)) - len(self._render([QUESTION]))
        except (BadRowError, TimeoutError) as error:
            fix = "fix it or template_options" if options else "fix it"
            raise UserError(f"{where}: can't render a question and an answer: {error}; {fix}") from None
        self._header_length = max(0, header)
        self.answer_parser = AnswerParser(tokenizer, self._finder.answer_format, response_template)
        eos_tokens = self._finder.eos_tokens
        self.eos_token_ids = [ids for (ids,) in tokenize(tokenizer, eos_tokens, allow_special_tokens=True)]

    def format(self, conversations: Sequence[Conversation], max_length: int) -> Formatted:
        """Render, tokenize and mask."""
        errors: dict[int, BadRowError] = {}
        texts: list[tuple[int, Conversation, list[Response]]] = []
        for row, conversation in enumerate(conversations):
            try:
                if conversation.text is None:
                    texts += [(row, *example) for example in self._render_examples(conversation)]
            except BadRowError as error:
                errors[row] = error
        # Tokenize in a single call: for each example, the full text and then the prompt of each response.
        parts = []
        for *_, responses in texts:
            full = responses[-1].text
            parts += [full, *(full[: response.start] for response in responses)]
        ids = iter(tokenize(self._tokenizer, parts, allow_special_tokens=True))
        examples: list[Rendered] = self._plain_text.render(conversations, self.eos_token_ids[0], errors)
        for row, conversation, responses in texts:
            full_ids, prompt_ids = next(ids), [next(ids) for _ in responses]
            prompts = [response.text[: response.start] for response in responses]
            answers = [
                self.answer_parser.parse(prompt, response.text[response.start : response.end]).text
                for prompt, response in zip(prompts, responses, strict=True)
            ]
            try:
                if spans := self._split_spans(full_ids, prompt_ids, responses):
                    examples.append(Rendered(row, conversation, prompts, answers, spans))
                    continue
                trained = [at for at, message in enumerate(conversation.messages) if is_trained(message)]
                for number, spans in enumerate(self._encode_apart(prompt_ids, responses)):
                    part = conversation.up_to(trained[number])
                    examples.append(Rendered(row, part, [prompts[number]], [answers[number]], spans))
            except BadRowError as error:
                errors[row] = error
        examples = [example for example in examples if example.row not in errors]
        examples.sort(key=lambda example: example.row)
        return Formatted(examples, mask_spans([example.spans for example in examples], max_length), errors)

    def encode_prompts(self, questions: Sequence[str], history: Sequence[Message] = ()) -> list[list[int]]:
        """Token ids up to where the response begins, the same as in training.

        Args:
            history: messages before each question.

        Raises:
            UserError: the template can't render a question.
        """
        conversations = [[*history, {"role": "user", "content": text}] for text in questions]
        try:
            for messages in conversations:
                self._plain_text.reject_special_tokens(message["content"] for message in messages)
            texts = [self._render(messages, add_generation_prompt=True) for messages in conversations]
        except BadRowError as error:
            raise UserError(f"{self._where}: {error}; change the question") from None
        return tokenize(self._tokenizer, texts, allow_special_tokens=True)

    def _render_examples(self, conversation: Conversation) -> list[tuple[Conversation, list[Response]]]:
        """Each example of a conversation with its trained responses, the last of which has the full text.

        Raises:
            BadRowError: a message contains a special token, the template can't render the conversation, its text lacks
                something that the row has, or no mask is exact.
        """
        messages = list(conversation.messages)
        if conversation.input:
            first = next(at for at, message in enumerate(messages) if message["role"] == "user")
            content = f"{messages[first]['content']}\n\n{conversation.input}"
            messages[first] = {**messages[first], "content": content}
        self._plain_text.reject_special_tokens(message["content"] for message in messages)
        more = [message for message in messages if len(message) > len(("role", "content"))]
        self._plain_text.reject_special_tokens(texts_in([more, conversation.tools, conversation.options]))
        self._renderer.require_options(conversation.options)
        responses: dict[int, Response] = {}
        for at, message in enumerate(messages):
            if is_trained(message):
                response = responses[at] = self._finder.find(messages[: at + 1], conversation)
                begin = max(0, response.start - self._header_length)  # the header may have a part, such as <think>
                self._require_complete(at, message, response.text[begin:])
        full = responses[len(messages) - 1].text
        if all(full.startswith(response.text[: response.end]) for response in responses.values()):
            examples = [(conversation, list(responses.values()))]
        else:
            examples = [(conversation.up_to(at), [response]) for at, response in responses.items()]
        for example, (*_, last) in examples:
            for at, message in enumerate(messages[: len(example.messages)]):
                if message["role"] != "assistant":
                    self._require_complete(at, message, last.text)
        for at, message in enumerate(messages):  # a template may drop the reasoning of an earlier answer
            if message["role"] == "assistant" and at not in responses and missing_key(message, full):
                self._require_complete(at, message, self._render(messages[: at + 1], conversation))
        if conversation.tools:
            renderings = [
                self._render(messages, replace(conversation, tools=tools)) for tools in (conversation.tools, ())
            ]
            names = [tool["function"]["name"] for tool in conversation.tools]
            if renderings[0] == renderings[1] or not all(name in full for name in names):
                raise BadRowError("not_rendered", f"{self._where} does not render the row's tools")
        return examples

    def _split_spans(
        self, full_ids: list[int], all_prompt_ids: list[list[int]], responses: list[Response]
    ) -> list[list[int]]:
        """Split the ids of an example into spans, alternately masked and supervised.

        Returns:
            No spans if the ids of a prompt are not a prefix, because a token crosses the boundary.
        """
        spans, end = [], 0
        for prompt_ids, response in zip(all_prompt_ids, responses, strict=True):
            start = len(prompt_ids)
            if full_ids[:start] != prompt_ids:
                return []
            eos_token_id = self.eos_token_ids[self._finder.eos_tokens.index(response.eos_token)]
            response_end = full_ids.index(eos_token_id, start) + 1
            spans += [full_ids[end:start], full_ids[start:response_end]]
            end = response_end
        return spans

    def _encode_apart(self, all_prompt_ids: list[list[int]], responses: list[Response]) -> list[list[list[int]]]:
        """The spans of an example per answer, whose ids are those of the prompt and then of the answer alone.

        This is how an answer begins at inference. It is used for answers that begin with whitespace, such as code,
        because one token could contain both the end of the prompt and this whitespace.
        """
        answers = [response.text[response.start : response.end] for response in responses]
        ids = tokenize(self._tokenizer, answers, allow_special_tokens=True)
        spans = [list(pair) for pair in zip(all_prompt_ids, ids, strict=True)]
        for answer, (prompt_ids, answer_ids), response in zip(answers, spans, responses, strict=True):
            decoded = self._tokenizer.decode([*prompt_ids, *answer_ids], clean_up_tokenization_spaces=False)
            if not answer[0].isspace() or decoded != response.text[: response.end]:
                raise BadRowError("unclean_boundary", "the first token of a response includes the end of its prompt")
        return spans

    def _require_complete(self, at: int, message: Message, rendering: str) -> None:
        """Check that a rendering has everything that a message states."""
        if name := missing_key(message, rendering):
            where = f"message {at + 1:,} ({message['role']})"
            raise BadRowError("not_rendered", f"{self._where} does not render {name!r} of {where}")
