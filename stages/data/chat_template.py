"""Jinja chat templates: conversations with any number of messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stages.data.completeness import missing_key, texts_in
from stages.data.conversations import Conversation, Formatted, Rendered
from stages.data.examples import BadRowError, Message
from stages.data.masking import mask_spans, tokenize
from stages.data.plain_text import PlainText
from stages.data.rendering import Renderer
from stages.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION: Message = {"role": "user", "content": "A"}
ANSWER = "ANSWER"  # the response in test conversations; a special token after it is the template's EOS token
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": PARAMETERS}}


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

    @property
    def num_eos_tokens(self) -> int:
        """How often the EOS token is in the response; reasoning may end with it, too."""
        return self.text.count(self.eos_token, self.start, self.end)


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

    Attributes:
        chat_template: the template with its options built in.
        eos_token_ids: the tokens that end an answer: that of a text, and if it is another one, that of a tool call.

    Raises:
        UserError: the template can't be rendered, or has no special token after a response.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        chat_template: str,
        where: str,
        options: Mapping[str, Any] | None = None,
    ):
        self._renderer = Renderer(tokenizer, chat_template, where, options or {})
        self._render = self._renderer.render
        self.chat_template = self._renderer.chat_template
        self._tokenizer = tokenizer
        self._where = where
        self._plain_text = PlainText(tokenizer)
        try:
            exchange = self._render([QUESTION, {"role": "assistant", "content": ANSWER}])
            header = len(self._render([QUESTION], add_generation_prompt=True)) - len(self._render([QUESTION]))
        except BadRowError as error:
            fix = "fix it or template_options" if options else "fix it"
            raise UserError(f"{where}: can't render a question and an answer: {error}; {fix}") from None
        end = self._plain_text.special.search(exchange, exchange.rfind(ANSWER) + len(ANSWER))
        if ANSWER not in exchange or not end:
            raise UserError(
                f"{where}: has no special token after an answer, so generation would never stop; "
                "must have one after each answer, such as {{ eos_token }}"
            )
        self._eos_token, self._after_eos = end[0], exchange[end.end() :]
        self._header_length = max(0, header)
        self._call_eos_token = self._find_call_eos_token()
        eos_tokens = dict.fromkeys(filter(None, (self._eos_token, self._call_eos_token)))
        self.eos_token_ids = [ids for (ids,) in tokenize(tokenizer, list(eos_tokens), allow_special_tokens=True)]

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
        parts = [
            part
            for *_, responses in texts
            for part in (responses[-1].text, *(responses[-1].text[: response.start] for response in responses))
        ]
        ids = iter(tokenize(self._tokenizer, parts, allow_special_tokens=True))
        examples: list[Rendered] = self._plain_text.render(conversations, self.eos_token_ids[0], errors)
        for row, conversation, responses in texts:
            full_ids, prompt_ids = next(ids), [next(ids) for _ in responses]
            try:
                spans = self._split_spans(full_ids, prompt_ids, responses)
            except BadRowError as error:
                errors[row] = error
                continue
            prompts = [response.text[: response.start] for response in responses]
            answers = [
                self._plain_text.special.sub("", response.text[response.start : response.end]).strip()
                for response in responses
            ]
            examples.append(Rendered(row, conversation, prompts, answers, spans))
        examples = sorted((each for each in examples if each.row not in errors), key=lambda each: each.row)
        return Formatted(examples, mask_spans([example.spans for example in examples], max_length), errors)

    def encode_prompts(self, questions: Sequence[str], history: Sequence[Message] = ()) -> list[list[int]]:
        """Token ids up to where the response begins, the same as in training.

        Args:
            history: messages before each question.

        Raises:
            UserError: the template can't render a question.
        """
        conversations = [[*history, {"role": "user", "content": text.strip()}] for text in questions]
        try:
            for messages in conversations:
                self._plain_text.reject_special_tokens(message["content"] for message in messages)
            texts = [self._render(messages, add_generation_prompt=True) for messages in conversations]
        except BadRowError as error:
            raise UserError(f"{self._where}: {error}; change the question") from None
        return tokenize(self._tokenizer, texts, allow_special_tokens=True)

    def _find_call_eos_token(self) -> str | None:
        """The special token that ends a tool call; None if the template has no tool calls."""
        function = {"name": "f", "arguments": {"a": ANSWER}}
        call = {"id": "123456789", "type": "function", "function": function}  # Mistral requires nine characters
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        for self._renderer.calls_as_text in (False, True):
            try:
                rendered = self._render([QUESTION, message], Conversation([], tools=[TOOL]))
            except BadRowError:
                continue
            *_, after = rendered.removesuffix(self._after_eos).rpartition(ANSWER)
            special = self._plain_text.special.findall(after)
            return special[-1] if special and ANSWER in rendered else None
        return None

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
            if message["role"] == "assistant" and message.get("train", True):
                response = responses[at] = self._render_response(messages[: at + 1], conversation)
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
            without = self._render(messages, replace(conversation, tools=()))
            names = [tool["function"]["name"] for tool in conversation.tools]
            if without == full or not all(name in full for name in names):
                raise BadRowError("not_rendered", f"{self._where} does not render the row's tools")
        return examples

    def _render_response(self, messages: list[Message], row: Conversation) -> Response:
        """Locate the last message, an answer, in the rendering of the messages of a row."""
        eos_token = self._call_eos_token if messages[-1].get("tool_calls") else self._eos_token
        if eos_token is None:
            raise BadRowError("not_rendered", f"{self._where} can't render tool calls")
        prompt = self._render(messages[:-1], row, add_generation_prompt=True)
        text = self._render(messages, row)
        if not text.startswith(prompt):
            # A template may render earlier messages differently once the answer is there: Mistral's has the system
            # prompt only if a question is last. The model sees this prompt, so the answer must follow it. It is the
            # same as after a single question.
            question = self._render([QUESTION], row, add_generation_prompt=True)
            exchange = self._render([QUESTION, messages[-1]], row)
            response = exchange.removeprefix(question)
            if response == exchange or not text.endswith(response):
                raise BadRowError(
                    "inexact_mask",
                    f"{self._where} renders message {len(messages):,} differently after a generation prompt, so no "
                    "mask is exact; set template to a Jinja file that renders it the same",
                )
            text = prompt + response
        end = text.removesuffix(self._after_eos).rfind(eos_token, len(prompt))
        if end < 0:
            raise BadRowError("not_rendered", f"{self._where} renders message {len(messages):,} without {eos_token}")
        return Response(text, len(prompt), end + len(eos_token), eos_token)

    def _split_spans(
        self, full_ids: list[int], all_prompt_ids: list[list[int]], responses: list[Response]
    ) -> list[list[int]]:
        """Split the ids of an example into spans, alternately masked and supervised.

        Raises:
            BadRowError: the ids of a prompt are not a prefix, because a token crosses the boundary.
        """
        spans, end = [], 0
        for prompt_ids, response in zip(all_prompt_ids, responses, strict=True):
            start = response_end = len(prompt_ids)
            if full_ids[:start] != prompt_ids:
                raise BadRowError("unclean_boundary", "the first token of a response includes the end of its prompt")
            eos_token_id = self.eos_token_ids[0 if response.eos_token == self._eos_token else -1]
            for _ in range(response.num_eos_tokens):
                response_end = full_ids.index(eos_token_id, response_end) + 1
            spans += [full_ids[end:start], full_ids[start:response_end]]
            end = response_end
        return spans

    def _require_complete(self, at: int, message: Message, rendering: str) -> None:
        """Check that a rendering has everything that a message states.

        Raises:
            BadRowError: something is missing.
        """
        if name := missing_key(message, rendering):
            where = f"message {at + 1:,} ({message['role']})"
            raise BadRowError("not_rendered", f"{self._where} does not render {name!r} of {where}")
