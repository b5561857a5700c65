"""Reasoning, tool calls and final text of answers, as TRL's chat templates and response templates write them."""

from typing import Any

import pytest

from stages.runtime.errors import UserError
from stages.templates.alpaca import AlpacaTemplate
from stages.templates.answer_parts import AnswerFormat, AnswerParser, AnswerParts
from stages.templates.chat_template import ChatTemplate
from stages.templates.conversations import Conversation
from tests.clone import make_tokenizer
from tests.test_chat_templates import DEEPSEEK, FAMILIES, GPT_OSS, ONE, jinja

QWEN = FAMILIES["qwen2_5"][0]
FINAL = "<|channel|>final<|message|>"
CALL = " to=functions.f<|channel|>commentary json<|message|>{}"
PARAMETERS: dict[str, dict[str, Any]] = {"deepseek_r1_distill": {"reasoning_end": "\n</think>\n\n"}}


def make_parser(name: str, special_tokens: list[str], eos_token: str, **more: Any) -> AnswerParser:
    tokenizer = make_tokenizer(special_tokens, eos_token=eos_token)
    return ChatTemplate(tokenizer, jinja(name), name, **PARAMETERS.get(name, {}), **more).answer_parser


@pytest.fixture(scope="module")
def qwen() -> AnswerParser:
    return make_parser("qwen3", QWEN, "<|im_end|>")


@pytest.fixture(scope="module")
def gpt_oss() -> AnswerParser:
    return make_parser("gptoss", GPT_OSS, "<|return|>")


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("<think>\nnot no\n</think>\n\nyes<|im_end|>", AnswerParts("yes", "not no")),
        ("\n<think> a </think>b </think> c", AnswerParts("b </think> c", "a")),
        ("<think>\n\n</think>\n\nyes", AnswerParts("yes")),
        ("yes <think>", AnswerParts("yes <think>")),
        ("yes </think> no", AnswerParts("yes </think> no")),
        ("<think>\nnot no, not", AnswerParts("", "not no, not", is_open=True)),
        ("<think>", AnswerParts("", "", is_open=True)),
        ("<think>a</think>", AnswerParts("", "a")),
        ("<tool_call>\n{}", AnswerParts("<tool_call>\n{}", None, "<tool_call>\n{}")),
        ("<think>a</think>b<tool_call>{}", AnswerParts("b", "a", "<tool_call>{}")),
        ("<think>a <tool_call>{}", AnswerParts("", "a <tool_call>{}", is_open=True)),
    ],
)  # fmt: skip
def test_tags_separate_reasoning_and_calls_from_the_final_text(
    qwen: AnswerParser, answer: str, parts: AnswerParts
) -> None:
    assert qwen.parse("<|im_start|>assistant\n", answer) == parts


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        (f"<|channel|>analysis<|message|>no<|end|><|start|>assistant{FINAL}yes<|return|>", AnswerParts("yes", "no")),
        (f"{FINAL}yes<|return|>", AnswerParts("yes")),
        ("yes", AnswerParts("yes")),
        ("<|channel|>analysis<|message|>not no<|end|>", AnswerParts("", "not no", is_open=True)),
        (f"{CALL}<|call|>", AnswerParts("to=functions.fcommentary json{}", None, "to=functions.fcommentary json{}")),
        (
            f"<|channel|>analysis<|message|>a<|end|><|start|>assistant{CALL}<|call|>",
            AnswerParts("to=functions.fcommentary json{}", "a", "to=functions.fcommentary json{}"),
        ),
        (f"{FINAL}Call to=functions.f<|return|>", AnswerParts("Call to=functions.f")),
    ],
)  # fmt: skip
def test_special_tokens_are_parsed_before_they_are_removed(
    gpt_oss: AnswerParser, answer: str, parts: AnswerParts
) -> None:
    assert gpt_oss.parse("<|start|>assistant", answer) == parts


@pytest.mark.parametrize(
    ("name", "special_tokens", "eos_token"),
    [
        ("nemotron_3_nano", QWEN, "<|im_end|>"),
        ("deepseek_r1_distill", DEEPSEEK, DEEPSEEK[-1]),
        ("qwen3_5_think", QWEN, "<|im_end|>"),
    ],
)
def test_a_prompt_can_open_the_reasoning(name: str, special_tokens: list[str], eos_token: str) -> None:
    parser = make_parser(name, special_tokens, eos_token)
    assert parser.parse("A<think>\n", "a\n</think>\n\nyes") == AnswerParts("yes", "a")
    assert parser.parse("A<think>\n", "yes") == AnswerParts("", "yes", is_open=True)
    assert parser.parse("A<think></think>", "yes") == AnswerParts("yes")  # a row's options have closed it


def test_json_is_a_final_text_although_calls_of_llama_are_json() -> None:
    special_tokens, eos_token = FAMILIES["llama3"]
    parser = make_parser("llama3_1", special_tokens, eos_token)
    assert parser.parse("", '{"name": "f", "parameters": {}}') == AnswerParts('{"name": "f", "parameters": {}}')


def test_words_that_a_template_writes_before_answers_and_calls_do_not_split_a_text_that_contains_them() -> None:
    tokenizer = make_tokenizer(["<|end|>"], eos_token="<|end|>")
    template = ChatTemplate(
        tokenizer,
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% if m.tool_calls %} Calling "
        "{{ m.tool_calls[0].function | tojson }}{% else %} Answer: {{ m.content }}{% endif %}{% else %}{{ m.content }}"
        "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
        "t",
    )
    for text in ("Red. Answer: no", "Calling a friend", "Answer: Red"):
        assert template.answer_parser.parse("assistant:", text) == AnswerParts(text)


def test_without_reasoning_and_calls_the_text_is_all_of_the_answer() -> None:
    tokenizer = make_tokenizer(["<|end|>"], eos_token="<|end|>")
    text = " <think>a</think> <tool_call>b "
    for parser in (AlpacaTemplate(tokenizer).answer_parser, AnswerParser(tokenizer, AnswerFormat(call="<call>"))):
        assert parser.read([0], tokenizer.encode(text), [0]) == AnswerParts("<think>a</think> <tool_call>b")


def test_the_response_of_an_example_is_its_final_text() -> None:
    tokenizer = make_tokenizer(GPT_OSS, eos_token="<|return|>")
    template = ChatTemplate(tokenizer, jinja("gptoss"), "gptoss")
    messages = [ONE[0], {**ONE[1], "reasoning_content": "Not blue."}]
    formatted = template.format([Conversation(messages)], 9999)
    assert formatted.responses == ["Red."]
    prompt, answer = formatted.examples[0].spans
    assert tokenizer.decode(answer).startswith("<|channel|>analysis<|message|>Not blue.<|end|>")  # it is supervised
    assert template.answer_parser.read(prompt, answer[:-1], answer[-1:]) == AnswerParts("Red.", "Not blue.")


TAGS = {"open": "<r>", "close": "</r>", "content": "text"}
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": TAGS,
        "tool_calls": {"open": "<c>", "close": "</c>", "content": "json", "repeats": True},
        "content": {"open": "<a>", "close": "<|im_end|>", "content": "text"},
    },
}


def test_the_response_template_of_a_tokenizer_says_what_the_parts_are() -> None:
    parser = make_parser("qwen2_5", QWEN, "<|im_end|>", response_template=RESPONSE_TEMPLATE)
    prompt = "<|im_start|>assistant\n"
    assert parser.parse(prompt, "<r>a</r><a>b<|im_end|>") == AnswerParts("b", "a")
    assert parser.parse(f"{prompt}<r>", "a</r><a>b") == AnswerParts("b", "a")
    assert parser.parse(prompt, '<a>b<|im_end|><c>{"n": "ü"}</c>') == AnswerParts("b", None, '[{"n": "ü"}]')
    assert parser.parse(prompt, "<r>a") == AnswerParts("", "a", is_open=True)
    assert parser.num_unmatched == 0


@pytest.mark.parametrize("answer", ["b", "<a><|im_end|>b", "<c>{not JSON</c><a>b"])
def test_an_answer_that_the_response_template_does_not_match_is_counted_and_its_text_is_final(answer: str) -> None:
    parser = make_parser("qwen2_5", QWEN, "<|im_end|>", response_template=RESPONSE_TEMPLATE)
    assert parser.parse("", answer) == AnswerParts(answer.replace("<|im_end|>", ""))
    assert parser.num_unmatched == 1


@pytest.mark.parametrize("template", [{"fields": {"content": {"open_pattern": "("}}}, {"fields": []}, {"a": 1}])
def test_an_invalid_response_template_is_an_error(template: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        make_parser("qwen2_5", QWEN, "<|im_end|>", response_template=template)
    assert str(error.value).startswith("models/tokenizer: its response_template is invalid: ")
    assert str(error.value).endswith("; fix it in the model's tokenizer_config.json, or remove it")
