"""Conversations → tokens and masks: the one place from which training, evaluation and generation take a prompt.

A template is Alpaca's, the tokenizer's own chat template, or a Jinja file. Whichever it is, a response follows in
training what it follows at inference: the very token ids that the model is asked with.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.shared.errors import UserError, is_out_of_memory, reading
from stages.shared.examples import BadRowError, Message
from stages.shared.masking import Encoded, mask, tokenize

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

# Some chat templates write today's date into the prompt. Equal data must give equal tokens on any day: they get the
# date that Llama 3.1's template falls back to.
FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July') | "
    "replace('%m', '07') | replace('%Y', '2024') | replace('%A', 'Friday') }}{% endmacro +%}"
)
ANSWER = "ANSWER"  # of the exchange by which a chat template shows its end token


@dataclass(frozen=True)
class Conversation:
    """Turns, the last of them the assistant's.

    input: what Alpaca's form sets beside the instruction, often empty.
    where: its place in the data, for messages.
    """

    messages: Sequence[Message]
    input: str = ""
    where: str = ""

    @property
    def responses(self) -> list[str]:
        return [message["content"] for message in self.messages if message["role"] == "assistant"]


@dataclass(frozen=True)
class Formatted:
    """Conversations, in order.

    prompts: text up to the last response that has room. responses: text of that response.
    encoded: tokens and labels, none where the conversation is in `faults` or has no room.
    faults: by index, what a template can't render exactly.
    """

    prompts: list[str]
    responses: list[str]
    encoded: Encoded
    faults: dict[int, BadRowError]


def render_alpaca(instruction: str, input_text: str = "") -> str:
    """Alpaca's prompt, up to where the response begins.

    Example:
        >>> render_alpaca("Name a colour.").endswith("Name a colour.\\n\\n### Response:\\n")
        True
    """
    # One pass of `format`: braces in the data are text and stay as they are.
    if input_text.strip():
        return ALPACA_WITH_INPUT.format(instruction=instruction.strip(), input=input_text.strip())
    return ALPACA.format(instruction=instruction.strip())


class AlpacaTemplate:
    """One instruction, one response. They are tokenised apart and joined, so the boundary is exact.

    One BOS, where the tokenizer itself puts one. Text can't become special tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.chat_template = None
        self.end_token_id: int = tokenizer.eos_token_id
        self._tokenizer = tokenizer
        start: list[int] = tokenizer("")["input_ids"][:1]
        self._bos = start if tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id] else []

    def format(self, conversations: Sequence[Conversation], max_length: int) -> Formatted:
        """Render, tokenise and mask."""
        faults = {}
        for index, conversation in enumerate(conversations):
            roles = [message["role"] for message in conversation.messages]
            if roles != ["user", "assistant"]:
                detail = (
                    f"found {', '.join(roles)}; template alpaca has one instruction and one response, chat has more"
                )
                faults[index] = BadRowError("not_single_turn", detail)
        prompts = [render_alpaca(each.messages[0]["content"], each.input) for each in conversations]
        responses = [each.responses[-1] for each in conversations]
        runs = self.encode(prompts, responses)
        for index in faults:
            runs[index] = []
        return Formatted(prompts, responses, mask(runs, max_length), faults)

    def encode_prompts(self, questions: Sequence[str], earlier: Sequence[Message] = ()) -> list[list[int]]:
        """Token ids up to where the responses begin, in training and in generation alike, without earlier turns."""
        return self._encode([render_alpaca(question) for question in questions])

    def encode(self, prompts: list[str], responses: list[str]) -> list[list[list[int]]]:
        """Token ids of each prompt, and of its response with the end token."""
        answers = tokenize(self._tokenizer, responses, special=False)
        return [
            [prompt, [*answer, self.end_token_id]]
            for prompt, answer in zip(self._encode(prompts), answers, strict=True)
        ]

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        return [self._bos + ids for ids in tokenize(self._tokenizer, prompts, special=False)]


class ChatTemplate:
    """A Jinja chat template. Each turn of the assistant is supervised, up to and with its end token.

    Where a turn begins and ends is found by rendering turn by turn: what stands before it, with the generation prompt,
    and what stands up to it. Where that is not how the whole begins, there is no exact mask.

    Args:
        chat_template: Jinja text, as `apply_chat_template` of transformers takes it.
        where: what to call it in messages.

    Raises:
        UserError: it can't be rendered, or puts no special token after an answer.
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
            raise UserError(f"{where}: can't render a question and an answer: {error}; mend it") from None
        end = self._special.search(exchange, exchange.rfind(ANSWER) + len(ANSWER))
        if ANSWER not in exchange or not end:
            raise UserError(
                f"{where}: puts no special token after an answer, so that no answer would ever end; "
                "must put one after each, such as {{ eos_token }}"
            )
        self._end_token = end[0]
        ((self.end_token_id,),) = tokenize(tokenizer, [self._end_token], special=True)

    def format(self, conversations: Sequence[Conversation], max_length: int) -> Formatted:
        """Render, tokenise and mask.

        Raises:
            UserError: a turn changes with what follows it.
        """
        faults = {}
        rendered: list[tuple[str, list[int]]] = []  # all of it, and where its responses begin
        for index, conversation in enumerate(conversations):
            try:
                rendered.append(self._find_responses(conversation))
            except BadRowError as error:
                faults[index] = error
                rendered.append(("", []))
        texts = [part for text, starts in rendered for part in (text, *(text[:start] for start in starts))]
        ids = iter(tokenize(self._tokenizer, texts, special=True))
        runs: list[list[list[int]]] = []
        for index, (_, starts) in enumerate(rendered):
            whole, before = next(ids), [next(ids) for _ in starts]
            try:
                runs.append(self._cut(whole, before))
            except BadRowError as error:
                faults[index] = error
                runs.append([])
        encoded = mask(runs, max_length)
        prompts, responses = [], []
        for number, (text, starts), conversation in zip(
            encoded.responses.tolist(), rendered, conversations, strict=True
        ):
            prompts.append(text[: starts[number - 1]] if number else "")
            responses.append(conversation.responses[number - 1])
        return Formatted(prompts, responses, encoded, faults)

    def encode_prompts(self, questions: Sequence[str], earlier: Sequence[Message] = ()) -> list[list[int]]:
        """Token ids up to where the responses begin, in training and in generation alike.

        Args:
            earlier: turns before each question.

        Raises:
            UserError: a question that this template can't render.
        """
        asked = [[*earlier, {"role": "user", "content": text.strip()}] for text in questions]
        try:
            self._require_no_marks([message["content"] for messages in asked for message in messages])
            texts = [self._render(messages, ask=True) for messages in asked]
        except BadRowError as error:
            raise UserError(f"{self._where}: {error}; ask something else") from None
        return tokenize(self._tokenizer, texts, special=True)

    def _find_responses(self, conversation: Conversation) -> tuple[str, list[int]]:
        messages = list(conversation.messages)
        if conversation.input:
            first = next(at for at, message in enumerate(messages) if message["role"] == "user")
            messages[first] = {"role": "user", "content": f"{messages[first]['content']}\n\n{conversation.input}"}
        self._require_no_marks([message["content"] for message in messages])
        whole = self._render(messages)
        starts = []
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:at], ask=True)
                with_it = self._render(messages[: at + 1]) if at + 1 < len(messages) else whole
                response, end, _ = with_it[len(before) :].partition(self._end_token)
                if not with_it.startswith(before) or not end or not whole.startswith(before + response + end):
                    when = "than it asks for it" if at + 1 == len(messages) else "where others follow"
                    raise UserError(
                        f"{conversation.where}: {self._where} renders turn {at + 1:,} in another way {when}, "
                        "so that no mask is exact; set template to a Jinja file that leaves turns as they are"
                    )
                starts.append(len(before))
        return whole, starts

    def _cut(self, whole: list[int], prompts: list[list[int]]) -> list[list[int]]:
        """The runs between and of responses, masked and supervised in turn."""
        runs, end = [], 0
        for prompt in prompts:
            start = len(prompt)
            if whole[:start] != prompt:
                raise BadRowError(
                    "unclean_boundary", "the first token of a response reaches back into what stands before it"
                )
            stop = whole.index(self.end_token_id, start) + 1
            runs += [whole[end:start], whole[start:stop]]
            end = stop
        return runs

    def _require_no_marks(self, texts: Sequence[str]) -> None:
        for text in texts:
            if found := self._special.search(text):
                raise BadRowError("special_token", f"its text holds {found[0]}, a mark of the template")

    def _render(self, messages: Sequence[Message], ask: bool = False) -> str:
        """Text of the messages, with the generation prompt where the model is to be asked."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=FIXED_DATE + self.chat_template,
                    tokenize=False,
                    add_generation_prompt=ask,
                )
            )
        except Exception as error:  # whatever Jinja, and what a template does with it, can raise
            if is_out_of_memory(error):
                raise
            raise BadRowError("refused_by_template", f"{self._where}: {error}") from None


Template = AlpacaTemplate | ChatTemplate


def load_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> Template:
    """The template of the parameter `template`: alpaca, chat (the tokenizer's own) or a Jinja file.

    Raises:
        UserError: there is none, or it is no chat template.
    """
    if name == "alpaca":
        return AlpacaTemplate(tokenizer)
    if name == "chat":
        if not tokenizer.chat_template:
            raise UserError(
                "template: found chat, but this model's tokenizer brings no chat template; "
                "set template to alpaca or to a file in templates/"
            )
        return ChatTemplate(tokenizer, str(tokenizer.get_chat_template()), "the tokenizer's chat template")
    if not Path(name).is_file():
        raise UserError(f"template: {name!r} is not a file; name one (in a copy for an experiment, `git add` it first)")
    with reading(Path(name), "save it as UTF-8 text"):
        text = Path(name).read_text(encoding="utf-8")
    return ChatTemplate(tokenizer, text, name)
