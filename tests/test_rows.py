"""Each schema of docs/data.md: the rows are the messages of `apply_chat_template`, and its answers are supervised."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.examples import BadRowError
from stages.rows.messages import MESSAGE_KEYS
from stages.rows.row_parser import MEANINGS, RowParser
from stages.rows.row_parser import SCHEMAS as COLUMNS_OF_SCHEMAS
from stages.templates.alpaca import AlpacaTemplate, render_alpaca
from stages.templates.chat_template import ChatTemplate
from stages.templates.conversations import Conversation, content_ids, parse_conversation
from tests.clone import USER_FILES
from tests.test_chat_templates import CALL, HERMES_CALL, TOOLS, WEATHER, jinja, supervised, with_bos

TOKENIZER = with_bos(["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|im_end|>")
TEMPLATES = {name: ChatTemplate(TOKENIZER, jinja(name), name) for name in ("qwen2_5", "qwen3")}
TEMPLATES["plain"] = ChatTemplate(TOKENIZER, (USER_FILES / "templates/plain.jinja").read_text(), "plain")


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def calls(arguments: Any = CALL["function"]["arguments"], **more: Any) -> dict[str, Any]:
    return assistant(None, tool_calls=[{"function": {"name": "weather", "arguments": arguments}, **more}])


def parse(row: dict[str, Any], columns: dict[str, str] | None = None, train_on: Any = "all_answers") -> Conversation:
    """The conversation of a row, as the stages download_dataset and format make it."""
    parsed = RowParser(columns).parse(row)
    texts = {"messages": parsed.messages, "tools": parsed.tools, "chat_template_kwargs": parsed.options}
    raw = {name: json.dumps(value) for name, value in texts.items()}
    return parse_conversation({**raw, "input": parsed.input}, train_on)


def render(conversation: Conversation, name: str = "qwen2_5") -> tuple[list[list[int]], list[str]]:
    """The token ids of the examples of a conversation, and the supervised texts of all of them."""
    formatted = TEMPLATES[name].format([conversation], 9999)
    assert formatted.errors == {}
    ends = formatted.encoded.lengths.cumsum().tolist()
    ids = formatted.encoded.input_ids.tolist()
    texts = [text.removesuffix("<|im_end|>") for text in supervised(TOKENIZER, formatted.encoded.labels.tolist())]
    return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)], texts


PAIR = [user("Add 2, 3."), assistant("5.")]
LONGER = [*PAIR, user("And 4?"), assistant("9.")]
SYSTEM = {"role": "system", "content": "Be brief."}
WITH_INPUT = [user("Add.\n\n2, 3"), assistant("5.")]
ROUNDS = [user("A"), assistant("B"), user("C"), assistant("D")]
USE = [user("In Bonn?"), calls(), {"role": "tool", "content": "sunny"}, assistant("Sunny.")]


def case(row: dict[str, Any], messages: Any = PAIR, answers: Any = ("5.",), tools: Any = None) -> Any:
    """A row, the messages and the tools for `apply_chat_template`, and the supervised texts."""
    return row, messages, tools, list(answers)


SCHEMAS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], Any, list[str]]] = {
    "messages": case({"messages": [SYSTEM, *PAIR]}, [SYSTEM, *PAIR]),
    "parts": case(
        {"messages": [user([{"type": "text", "text": "Add "}, "2, 3."]), assistant([{"type": "text", "value": "5."}])]}
    ),
    "weights": case(
        {"messages": [user("A", weight=0), assistant("B", weight=0), user("C"), assistant("D", weight=1.0)]},
        ROUNDS,
        "D",
    ),
    "train": case(
        {"messages": [user("A"), assistant("B", train=False), user("C"), assistant("D", train=True)]}, ROUNDS, "D"
    ),
    "tools of OpenAI": case(
        {
            "messages": [
                user("In Bonn?"),
                calls('{"town": "Bonn"}', id="c1", type="function"),
                {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
                assistant("Sunny."),
            ],
            "tools": TOOLS,
        },
        USE,
        [HERMES_CALL, "Sunny."],
        TOOLS,
    ),
    "functions of OpenAI": case(
        {
            "messages": [
                user("In Bonn?"),
                {"role": "assistant", "function_call": {"name": "weather", "arguments": '{"town": "Bonn"}'}},
                {"role": "function", "name": "weather", "content": "sunny"},
                assistant("Sunny."),
            ],
            "functions": [WEATHER],
        },
        USE,
        [HERMES_CALL, "Sunny."],
        TOOLS,
    ),
    "ShareGPT": case(
        {
            "conversations": [{"from": "human", "value": "Add 2, 3."}, {"from": "gpt", "value": "5."}],
            "system": "Be brief.",
        },
        [SYSTEM, *PAIR],
    ),
    "ShareGPT with weights": case(
        {
            "conversation": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "user", "value": "Add 2, 3.", "weight": 0.0},
                {"from": "model", "value": "6.", "loss_weight": 0.0},
                {"from": "human", "value": "No."},
                {"from": "bot", "value": "5.", "weight": 1.0},
            ]
        },
        [SYSTEM, user("Add 2, 3."), assistant("6."), user("No."), assistant("5.")],
    ),
    "ShareGPT with tools": case(
        {
            "conversations": [
                {"from": "human", "value": "In Bonn?"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "sunny"},
                {"from": "gpt", "value": "Sunny."},
            ],
            "tools": json.dumps([WEATHER]),
        },
        USE,
        [HERMES_CALL, "Sunny."],
        TOOLS,
    ),
    "LIMA": case({"conversations": ["Add 2, 3.", "5."], "source": "x"}),
    "Capybara": case(
        {"conversation": [{"input": "Add 2, 3.", "output": "5."}, {"input": "And 4?", "output": "9."}]},
        LONGER,
        ["5.", "9."],
    ),
    "Alpaca": case({"instruction": "Add.", "input": "2, 3", "output": "5.", "text": "all of it"}, WITH_INPUT),
    "Alpaca with history": case(
        {"instruction": "And 4?", "input": "", "output": "9.", "system": "Be brief.", "history": [["Add 2, 3.", "5."]]},
        [SYSTEM, *LONGER],
        ["5.", "9."],
    ),
    "Dolly": case({"instruction": "Add.", "context": "2, 3", "response": "5.", "category": "math"}, WITH_INPUT),
    "prompt and completion": case({"prompt": "Add 2, 3.", "completion": "5."}),
    "messages of TRL": case({"prompt": LONGER[:3], "completion": LONGER[3:]}, LONGER, ["9."]),
    "prompt and response": case({"prompt": "Add 2, 3.", "response": "5."}),
    "GSM8K": case({"question": "Add 2, 3.", "answer": "5."}),
    "OpenOrca": case(
        {"system_prompt": "Be brief.", "question": "Add 2, 3.", "response": "5.", "id": "x.1"}, [SYSTEM, *PAIR]
    ),
    "MetaMathQA": case({"query": "Add 2, 3.", "response": "5.", "type": "x"}),
    "xLAM": case(
        {"query": "In Bonn?", "answers": json.dumps([CALL["function"]]), "tools": json.dumps([WEATHER])},
        USE[:2],
        [HERMES_CALL],
        TOOLS,
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_row_of_each_schema_has_the_ids_of_apply_chat_template_and_its_answers_are_supervised(name: str) -> None:
    row, messages, tools, answers = SCHEMAS[name]
    (ids,), texts = render(parse(row))
    expected = TOKENIZER.apply_chat_template(messages, tools=tools, chat_template=jinja("qwen2_5"), return_dict=False)
    assert ids == expected[: len(ids)]
    assert TOKENIZER.decode(expected[len(ids) :]) == "\n"
    assert texts == answers


REASONING = "<think>\n2 + 3 is 5.\n</think>\n\n"


@pytest.mark.parametrize(
    "answer",
    [
        assistant("5.", reasoning_content="2 + 3 is 5."),
        assistant("5.", thinking="2 + 3 is 5."),
        assistant([{"type": "reasoning", "text": "2 + 3 is 5."}, {"type": "text", "text": "5."}]),
        assistant([{"type": "thinking", "thinking": "2 + 3 is 5."}, "5."]),
    ],
)
def test_reasoning_is_supervised_with_each_answer_and_not_repeated_in_the_prompt_of_later_ones(answer: Any) -> None:
    expected = [assistant("5.", reasoning_content="2 + 3 is 5."), user("And 4?"), assistant("9.")]
    examples, texts = render(parse({"messages": [user("Add 2, 3."), answer, *expected[1:]]}), "qwen3")
    assert texts == [f"{REASONING}5.", "<think>\n\n</think>\n\n9."]
    for ids, num_messages in zip(examples, (2, 4), strict=True):
        messages = [user("Add 2, 3."), *expected][:num_messages]
        full = TOKENIZER.apply_chat_template(messages, chat_template=jinja("qwen3"), return_dict=False)
        assert ids == full[: len(ids)]
        assert TOKENIZER.decode(full[len(ids) :]) == "\n"
    assert "2 + 3" not in TOKENIZER.decode(examples[1])


@pytest.mark.parametrize("options", [{"enable_thinking": False}, '{"enable_thinking": false, "mode": null}'])
def test_template_options_of_a_row_are_passed_to_the_template(options: Any) -> None:
    for row in ({"messages": PAIR}, {"prompt": "Add 2, 3.", "completion": "5."}):
        _, texts = render(parse({**row, "chat_template_kwargs": options}), "qwen3")
        assert texts == ["5."]  # the prompt has the empty thought
    row = {"question": "Add 2, 3.", "answer": "5.", "options": options}
    columns = {"prompt": "question", "completion": "answer", "chat_template_kwargs": "options"}
    assert render(parse(row, columns), "qwen3")[1] == ["5."]
    assert render(parse({"messages": PAIR, "chat_template_kwargs": None}), "qwen3")[1] == ["<think>\n\n</think>\n\n5."]


def test_results_of_parallel_calls_are_in_the_order_of_the_calls() -> None:
    both = assistant(
        None, tool_calls=[{"function": CALL["function"], "id": "b"}, {"function": CALL["function"], "id": "a"}]
    )
    results = [{"role": "tool", "content": name, "tool_call_id": name} for name in "ab"]
    conversation = parse({"messages": [user("A"), both, *results, assistant("C")]})
    assert [message["content"] for message in conversation.messages] == ["A", "", "b", "a", "C"]


def test_columns_can_be_mapped_and_others_are_not_read() -> None:
    row = {"problem": "Add 2, 3.", "solution": "5.", "rules": "Be brief.", "messages": PAIR, "system": "Not read."}
    columns = {"prompt": "problem", "completion": "solution", "system": "rules"}
    assert render(parse(row, columns)) == render(Conversation([SYSTEM, *PAIR]))
    parser = RowParser(columns)
    parser.parse(row)
    assert dict(parser.unread) == {"messages": 1, "system": 1}
    assert parser.missing == set()
    parser = RowParser(columns)
    with pytest.raises(BadRowError, match=r"^'solution' is missing; every row needs "):
        parser.parse({"problem": "Add 2, 3."})
    assert parser.missing == {"solution", "rules"}


def test_the_input_belongs_to_the_last_question() -> None:
    row = {"prompt": [*PAIR, user("And?")], "completion": "9.", "more": "4"}
    columns = {"prompt": "prompt", "completion": "completion", "input": "more"}
    assert [message["content"] for message in parse(row, columns).messages] == ["Add 2, 3.", "5.", "And?\n\n4", "9."]


@pytest.mark.parametrize("name", ["arguments", "parameters", "args", "input"])
def test_arguments_may_have_the_names_of_other_formats(name: str) -> None:
    call = {"name": "weather", name: {"town": "Bonn", "wei": 10**21}, "id": "1"}
    (_, answer) = parse({"messages": [user("A"), assistant(None, tool_calls=[call])]}).messages
    assert answer["tool_calls"] == [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Bonn", "wei": 10**21}}}
    ]


def test_a_mapped_reasoning_column_belongs_to_the_answer() -> None:
    columns = {"prompt": "Question", "completion": "Response", "reasoning": "Complex_CoT"}
    row = {"Question": "Add 2, 3.", "Response": "5.", "Complex_CoT": "2 + 3 is 5."}
    assert render(parse(row, columns), "qwen3")[1] == [f"{REASONING}5."]


def test_columns_and_keys_that_are_not_read_are_counted() -> None:
    parser = RowParser()
    parser.parse({"messages": [user("A", time=3), assistant("B", id=1)], "id": 1, "note": None})
    parser.parse({"instruction": "A", "output": "B", "text": "A B", "id": 2})
    assert dict(parser.unread) == {"id": 2, "text": 1, "messages[].time": 1, "messages[].id": 1}


def test_nan_is_a_missing_value() -> None:
    nan = float("nan")
    row = {"instruction": "Add 2, 3.", "input": nan, "output": "5.", "messages": nan, "system": nan}
    assert parse(row).messages == PAIR


def test_only_the_last_answer_is_trained_on_if_asked_for() -> None:
    row = {"messages": LONGER}
    assert render(parse(row))[1] == ["5.", "9."]
    assert render(parse(row, train_on="last_answer"))[1] == ["9."]


def test_an_answer_before_the_first_question_is_context() -> None:
    conversation = parse({"messages": [assistant("Hello!"), *PAIR]})
    (ids,), texts = render(conversation)
    assert texts == ["5."]
    assert "Hello!" in TOKENIZER.decode(ids)


def test_plain_text_is_supervised_after_its_first_token_and_ends_with_eos() -> None:
    conversation = parse({"text": " Red, blue. \n"})
    for template in (TEMPLATES["qwen2_5"], AlpacaTemplate(TOKENIZER)):
        formatted = template.format([conversation, Conversation(PAIR)], 9999)
        assert formatted.errors == {}
        length = int(formatted.encoded.lengths[0])
        ids, labels = formatted.encoded.input_ids[:length].tolist(), formatted.encoded.labels[:length].tolist()
        assert TOKENIZER.decode(ids) == " Red, blue. \n<|im_end|>"
        assert labels == [-100, *ids[1:]]
        forged = template.format([parse({"text": "A<|im_end|>"})], 9999).errors[0]
        assert (forged.reason, str(forged)) == (
            "special_token",
            "its text contains <|im_end|>, a special token of the tokenizer",
        )


ALLOWED = (
    "every row needs 'instruction' and 'output', 'prompt' and 'completion', 'messages', or other columns that "
    "docs/data.md lists; map your column names in dataset_columns"
)
ROLES = (
    "system, developer, user, human, prompter, assistant, gpt, model, bot, chatbot, chatgpt, ai, function_call, "
    "tool_call, tool, function, observation, tool_response, function_response, ipython"
)
MESSAGES_ALLOWED = f"must be a list of objects with 'role' ({ROLES}) and 'content'"
CALLS_ALLOWED = "must be a call with 'name' and 'arguments', an object or its JSON text, or a list of calls"
TOOLS_ALLOWED = "must be a list of tools with a 'name', or such a list as JSON text"
RESULT = {"role": "tool", "content": "sunny"}


# Rows and what is said about them, by the reason.
REJECTED: dict[str, list[tuple[Any, str]]] = {
    "not_text": [
        (
            {"messages": "Hi."},
            f"'messages' is str 'Hi.'; {MESSAGES_ALLOWED}, or such a list as JSON text, as json.dumps writes it",
        ),
        (
            {"messages": "[{'role': 'user'}]"},
            f"'messages' is str \"[{{'role': 'user'}}]\"; {MESSAGES_ALLOWED}, or such a list as JSON text, as "
            "json.dumps writes it",
        ),
        (
            {"instruction": "A", "output": 7.0},
            "'output' is float 7.0; must be text or a whole number, because other numbers have several forms, such as "
            "7, 7.0 and 7.00",
        ),
        ({"messages": [5]}, f"message 1 is int 5; {MESSAGES_ALLOWED}"),
        (
            {"messages": [user([{"type": "image", "image": "a.png"}]), assistant("B")]},
            "part 1 of message 1 is dict {'image': 'a.png', 'type': 'image'}; must be a text or a reasoning part",
        ),
        ({"messages": [user("A", tool_call_id=1)]}, "'tool_call_id' of message 1 is int 1; must be text"),
    ],
    "no_exchange": [
        ({"messages": [], "check": {"contains": "A"}}, "has no messages"),
        ({"messages": [assistant("B")]}, "has no user message followed by an assistant message"),
    ],
    "bad_tools": [
        (
            {"messages": PAIR, "tools": json.loads('[{"name": "f", "a": ' * 60 + "1" + "}]" * 60)},
            "'tools' is nested more than 100 levels deep",
        ),
        ({"messages": PAIR, "tools": "none"}, f"'tools' is 'none'; {TOOLS_ALLOWED}"),
        ({"messages": PAIR, "tools": [{"x": 1}]}, f"'tools' is [{{'x': 1}}]; {TOOLS_ALLOWED}"),
    ],
    "duplicate_key": [
        (
            {"messages": PAIR, "tools": '[{"name": "f", "name": "g"}]'},
            "'tools': key 'name' occurs 2 times in an object; keep one of them",
        ),
        (
            {"messages": '[{"role": "user", "content": "A", "content": "B"}]'},
            "'messages': key 'content' occurs 2 times in an object; keep one of them",
        ),
        (
            {"messages": [user("A"), calls('{"town": "Bonn", "town": "Oslo"}')]},
            "message 2: the tool call: key 'town' occurs 2 times in an object; keep one of them",
        ),
        (
            {"instruction": "A", "output": "B", "check": '{"number": 1, "number": 2}'},
            "'check': key 'number' occurs 2 times in an object; keep one of them",
        ),
        (
            {"messages": PAIR, "chat_template_kwargs": '{"a": 1, "a": 2}'},
            "'chat_template_kwargs': key 'a' occurs 2 times in an object; keep one of them",
        ),
    ],
    "missing_field": [
        ({"messages": [user("A"), {"role": "assistant"}]}, f"'content' of message 2 is missing; {MESSAGES_ALLOWED}"),
        ({"question": "A", "reply": "B"}, f"'answer' is missing; {ALLOWED}"),
    ],
    "unknown_role": [
        (
            {"messages": [{"role": "narrator", "content": "A"}]},
            f"'role' of message 1 is str 'narrator'; {MESSAGES_ALLOWED}",
        ),
    ],
    "bad_weight": [
        ({"messages": [user("A"), assistant("B", weight=2)]}, "'weight' of message 2 is int 2; must be 0 or 1"),
        ({"messages": [user("A"), assistant("B", train=0)]}, "'train' of message 2 is int 0; must be true or false"),
        (
            {"messages": [user("A", weight=1), assistant("B")]},
            "'weight' of message 1 (user) is 1; only answers can be trained",
        ),
    ],
    "unsupported": [
        (
            {"messages": [user("A", thinking="x"), assistant("B")]},
            "message 1 (user) has 'reasoning_content', which only an assistant message can have",
        ),
        ({"messages": PAIR, "images": ["a.png"]}, "'images' is list ['a.png']; no template can render it"),
        ({"messages": [SYSTEM, *PAIR], "system": "Be long."}, "has 'system' and a system message; keep one"),
        (
            {"messages": [user("A"), assistant("B", thinking="C", reasoning="D")]},
            "message 2 has 'thinking' and 'reasoning'; keep one of them",
        ),
        (
            {"messages": [user("A"), {"from": "gpt", "role": "assistant", "value": "B"}]},
            "message 2 has 'role' and 'from'; keep one of them",
        ),
        (
            {"instruction": "A", "input": "B", "context": "C", "output": "D"},
            "has 'input' and 'context'; remove one, or map one in dataset_columns",
        ),
    ],
    "bad_tool_call": [
        (
            {"messages": [user("A"), calls("Bonn")]},
            "message 2: the tool call is {'function': {'arguments': 'Bonn', 'name': 'weather'}}; " + CALLS_ALLOWED,
        ),
        (
            {"conversations": [{"from": "human", "value": "A"}, {"from": "function_call", "value": "weather()"}]},
            f"message 2: the tool call is 'weather()'; {CALLS_ALLOWED}",
        ),
        (
            {"messages": [user("A"), assistant(None, tool_calls=[{"name": "f", "kwargs": {"a": 1}}])]},
            f"message 2: the tool call is {{'kwargs': {{'a': 1}}, 'name': 'f'}}; {CALLS_ALLOWED}",
        ),
    ],
    "result_without_call": [
        (
            {"messages": [user("A"), assistant("B"), RESULT]},
            "message 3 is the result of a tool, but no assistant message before it has that call",
        ),
        (
            {"messages": [user("A"), calls(id="c1"), {**RESULT, "tool_call_id": "c2"}]},
            "message 3 is the result of 'c2' of a tool, but no assistant message before it has that call",
        ),
    ],
    "nothing_to_train": [
        ({"messages": [user("A"), assistant("B", weight=0)]}, "no answer has a weight of 1"),
    ],
    "empty_response": [
        ({"instruction": "A", "output": "\u200b\u2060"}, "message 2 (assistant) is empty"),
        ({"text": " \u200b"}, "message 1 (text) is empty"),
    ],
}


@pytest.mark.parametrize(
    ("reason", "row", "detail"), [(reason, *case) for reason, cases in REJECTED.items() for case in cases]
)
def test_a_row_that_cannot_be_expressed_is_rejected_with_its_reason(
    reason: str, row: dict[str, Any], detail: str
) -> None:
    with pytest.raises(BadRowError) as error:
        parse(row)
    assert (error.value.reason, str(error.value)) == (reason, detail)


KEYS = {
    "content": st.text("abc xyz", min_size=1).filter(str.strip),
    "reasoning_content": st.none() | st.text("abc", min_size=3),
    "name": st.none() | st.text("xyz", min_size=3),
    "weight": st.sampled_from([None, 0, 1]),
}


@settings(max_examples=200)
@given(
    answers=st.lists(st.fixed_dictionaries(KEYS), min_size=1, max_size=3),
    system=st.none() | st.text("uvw", min_size=3),
    tools=st.sampled_from([None, TOOLS]),
    name=st.sampled_from(["qwen2_5", "qwen3", "alpaca"]),
)
def test_every_key_of_a_row_is_in_its_text_or_its_mask_or_the_row_is_rejected(
    answers: list[dict[str, Any]], system: str | None, tools: Any, name: str
) -> None:
    messages = [message for number, each in enumerate(answers) for message in (user(f"q{number}"), assistant(**each))]
    try:
        conversation = parse({"messages": messages, "system": system, "tools": tools})
    except BadRowError as error:
        assert error.reason == "nothing_to_train"
        assert all(answer["weight"] == 0 for answer in answers)
        return
    template = AlpacaTemplate(TOKENIZER) if name == "alpaca" else TEMPLATES[name]
    formatted = template.format([conversation], 9999)
    if formatted.errors:
        assert formatted.errors[0].reason in ("not_rendered", "not_single_turn")
        return
    text = TOKENIZER.decode(formatted.encoded.input_ids)
    trained = " ".join(supervised(TOKENIZER, formatted.encoded.labels.tolist()))
    last = max(number for number, answer in enumerate(answers) if answer["weight"] != 0)
    for number, answer in enumerate(answers[: last + 1]):
        stated = [answer[key] for key in ("content", "reasoning_content", "name") if answer[key]]
        if answer["weight"] == 0 and number < last:  # Qwen3's template drops the reasoning of earlier answers
            stated = [answer["content"]]
        assert all("".join(part.split()) in "".join(text.split()) for part in stated)
        assert number == last or f"q{number + 1}" in text
        if answer["weight"] != 0:
            assert all(part.strip() in trained for part in stated)
    assert trained.count("<|im_end|>") == sum(answer["weight"] != 0 for answer in answers)
    assert system is None or system in text
    assert tools is None or '"name": "weather"' in text


# For each template that does not trim, what the ids of a question and its answer must be.
WHOLE_TEXTS = {
    "alpaca": lambda question, answer: f"{render_alpaca(question)}{answer}<|im_end|>",
    "plain": lambda question, answer: f"User: {question}\n\nAssistant: {answer}<|im_end|>",
    "qwen2_5": lambda question, answer: (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    ),
}
WITH_WHITESPACE = st.text(" \n\tab:", min_size=1).filter(str.strip)


@pytest.mark.parametrize("name", WHOLE_TEXTS)
@given(question=WITH_WHITESPACE, answer=WITH_WHITESPACE)
def test_the_ids_have_each_text_with_its_whitespace(name: str, question: str, answer: str) -> None:
    template = AlpacaTemplate(TOKENIZER) if name == "alpaca" else TEMPLATES[name]
    for row in ({"prompt": question, "completion": answer}, {"messages": [user(question), assistant(answer)]}):
        formatted = template.format([parse(row)], 9999)
        assert formatted.errors == {}
        assert TOKENIZER.decode(formatted.encoded.input_ids) == WHOLE_TEXTS[name](question, answer)
        assert template.encode_prompts([question]) == [
            formatted.encoded.input_ids[: -len(formatted.examples[0].spans[1])].tolist()
        ]


def test_whitespace_of_system_messages_inputs_results_and_arguments_is_kept() -> None:
    system = {"role": "system", "content": " Be brief.\n"}
    used = [user("A\n"), calls({"code": "  x\n"}), {"role": "tool", "content": "  1\n"}, assistant("\tC")]
    (ids,), texts = render(parse({"messages": [system, *used], "tools": TOOLS}))
    assert "system\n Be brief.\n\n\n# Tools" in TOKENIZER.decode(ids)
    assert "<tool_response>\n  1\n\n</tool_response>" in TOKENIZER.decode(ids)
    assert texts == [HERMES_CALL.replace('"town": "Bonn"', '"code": "  x\\n"'), "\tC"]
    row = {"instruction": "Add.\n", "input": "  2\n", "output": "5", "system": " S "}
    assert parse(row).questions == ["Add.\n\n\n  2\n"]
    assert "user\nAdd.\n\n\n  2\n<|im_end|>" in TOKENIZER.decode(render(parse(row))[0][0])
    assert parse({**row, "history": [[" a ", " b "]]}).messages == [
        {"role": "system", "content": " S "},
        *(user(" a "), assistant(" b "), user("Add.\n\n\n  2\n"), assistant("5")),
    ]


def test_a_template_may_trim_messages_and_the_row_is_kept() -> None:
    tokenizer = with_bos(["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>")
    template = ChatTemplate(tokenizer, jinja("llama3"), "llama3")
    formatted = template.format([parse({"prompt": " A\n", "completion": "\n  B \n"})], 9999)
    assert formatted.errors == {}
    assert supervised(tokenizer, formatted.encoded.labels.tolist()) == ["B<|eot_id|>"]


def test_whitespace_around_messages_does_not_change_the_ids_of_an_example() -> None:
    rows = [{"messages": [user("A"), assistant(text)]} for text in ("B", " B\n")]
    rows += [{"messages": [*row["messages"], user("C"), assistant("D")]} for row in rows]
    ids = [content_ids(parse(row)) for row in rows]
    assert ids[0] == ids[1] == ("ffe9aaeaa2a2d5048174df0b80599ef0", "b63ba38bea597873dcd810d07949a3d8")
    assert ids[2] == ids[3] != ids[0]


def test_an_answer_whose_whitespace_would_share_a_token_with_the_prompt_has_tokens_of_its_own() -> None:
    tokenizer = with_bos(["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|im_end|>")
    tokenizer.add_tokens(["\n    "])
    template = ChatTemplate(tokenizer, jinja("qwen2_5"), "qwen2_5")
    answers = ["    return 1\n", "    return 2\n"]
    conversation = parse({"messages": [user("A"), assistant(answers[0]), user("B"), assistant(answers[1])]})
    formatted = template.format([conversation], 9999)
    assert formatted.errors == {}
    assert supervised(tokenizer, formatted.encoded.labels.tolist()) == [f"{answer}<|im_end|>" for answer in answers]
    history = [user("A"), assistant(answers[0])]
    prompts = [*template.encode_prompts(["A"]), *template.encode_prompts(["B"], history)]
    assert [example.spans[0] for example in formatted.examples] == prompts
    assert formatted.responses == ["return 1", "return 2"]


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_messages_can_be_json_text_or_an_object_of_lists(name: str) -> None:
    assert parse({name: json.dumps(PAIR)}).messages == PAIR
    assert parse({name: json.dumps(["Add 2, 3.", "5."])}).messages == PAIR
    assert parse({name: [json.dumps(message) for message in PAIR]}).messages == PAIR
    assert parse({name: {"role": ["user", "assistant"], "content": ["Add 2, 3.", "5."]}}).messages == PAIR
    assert (
        parse({"question": "And 4?", "answer": "9.", "history": json.dumps([["Add 2, 3.", "5."]])}).messages == LONGER
    )


def test_a_prompt_that_is_a_list_of_messages_as_text_is_that_list_and_other_texts_are_text() -> None:
    row = {"prompt": json.dumps(LONGER[:3]), "completion": json.dumps([assistant("9.")])}
    assert render(parse(row)) == render(parse({name: json.loads(text) for name, text in row.items()}))
    other = {"prompt": '[{"role": "Hamlet", "content": "A"}]', "completion": json.dumps([assistant("9.")])}
    assert [message["content"] for message in parse(other).messages] == [*other.values()]
    with pytest.raises(BadRowError, match=r"^'prompt' is str .* as json\.dumps writes it$"):
        parse({"prompt": str(PAIR), "completion": "9."})


def test_whole_numbers_and_truth_values_are_the_text_of_json() -> None:
    for value, text in ((7, "7"), (-10, "-10"), (True, "true")):
        assert parse({"instruction": "A", "output": value}).messages[1] == assistant(text)
        assert parse({"messages": [user("A"), assistant(value)]}).messages[1] == assistant(text)  # type: ignore[arg-type]


def test_case_and_space_of_roles_are_ignored() -> None:
    roles = ["System", " USER ", "Assistant", "prompter", "tool_call", "Tool_Response", "AI"]
    contents = ["Be brief.", "Add 2, 3.", "5.", "In Bonn?", json.dumps(CALL["function"]), "sunny", "Sunny."]
    messages = [{"from": role, "value": text} for role, text in zip(roles, contents, strict=True)]
    assert [message["role"] for message in parse({"conversations": messages}).messages] == [
        *("system", "user", "assistant", "user", "assistant", "tool", "assistant")
    ]


NULLABLE = {"properties": {"unit": {"type": ["string", "null"], "default": None}, "town": {"type": "string"}}}
DESCRIPTION = {"name": "weather", "parameters": NULLABLE}


def with_nulls(value: Any) -> Any:
    """A value as Arrow exports it: each object has other members that are null."""
    if isinstance(value, dict):
        return {**{name: with_nulls(part) for name, part in value.items()}, "text": None, "enum": None}
    return [with_nulls(part) for part in value] if isinstance(value, list) else value


@given(
    arguments=st.recursive(
        st.integers() | st.text("ab"), lambda part: st.lists(part) | st.dictionaries(st.sampled_from("xyz"), part)
    ).map(lambda value: {"town": value}),
    as_text=st.booleans(),
)
def test_null_members_of_tools_and_arguments_are_dropped(arguments: dict[str, Any], as_text: bool) -> None:
    tools, given_arguments = with_nulls([DESCRIPTION]), with_nulls(arguments)
    tools, given_arguments = map(json.dumps, (tools, given_arguments)) if as_text else (tools, given_arguments)
    parser = RowParser()
    call = {"name": "weather", "arguments": given_arguments, "parameters": None, "kwargs": None}
    parsed = parser.parse({"messages": [user("A"), assistant(None, tool_calls=[call])], "tools": tools})
    assert parsed.tools == [{"type": "function", "function": DESCRIPTION}]
    assert parsed.messages[1]["tool_calls"][0]["function"]["arguments"] == arguments
    assert parser.unread == {"null arguments of tool calls": 1}


def test_a_null_argument_that_the_tool_allows_is_kept() -> None:
    messages = [user("A"), calls({"town": None, "unit": None})]
    for schema in ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"nullable": True}, {"enum": ["C", None]}):
        tool = {"name": "weather", "parameters": {"properties": {"unit": schema}}}
        (_, answer) = parse({"messages": messages, "tools": [tool]}).messages
        assert answer["tool_calls"][0]["function"]["arguments"] == {"unit": None}


KEY = st.sampled_from(sorted(MESSAGE_KEYS | {"arguments", "type", "text", "input", "output", "enum", "properties"}))
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
VALUE = st.recursive(
    SCALAR, lambda part: st.lists(part, max_size=2) | st.dictionaries(KEY, part, max_size=3), max_leaves=6
)
MESSAGE = st.builds(
    lambda role, content, more: {"role": role, "content": content, **more},
    st.sampled_from(["system", "user", "assistant", "tool", "function_call"]),
    st.text(max_size=2) | VALUE,
    st.dictionaries(KEY, VALUE, max_size=2),
)
CELL = VALUE | st.lists(MESSAGE, max_size=3)
CELL |= CELL.map(json.dumps)


@settings(max_examples=400)
@given(
    st.sampled_from(COLUMNS_OF_SCHEMAS), st.dictionaries(st.sampled_from(sorted(MEANINGS)), CELL, max_size=2), st.data()
)
def test_any_json_in_any_column_is_read_or_rejected(
    schema: tuple[str, ...], more: dict[str, Any], data: st.DataObject
) -> None:
    row = {**more, **{name: data.draw(CELL) for name in schema}}
    try:
        parsed = RowParser().parse(row)
        json.dumps([parsed.messages, parsed.tools, parsed.check, parsed.options], allow_nan=False)
        parse(row)
    except BadRowError as error:
        assert str(error)
