"""Formatting: rows in = rows kept + rows rejected."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import download_dataset, download_model
from stages import format as format_stage
from stages.data.splits import content_hash, normalize
from stages.runtime.errors import UserError
from tests.clone import USER_FILES, edit


def run_format(tiny_model: Path, rows: list[dict[str, Any]], max_length: int = 256) -> list[dict[str, Any]]:
    """Run the stages up to format on these rows; returns the rows of `formatted.parquet`."""
    Path("data/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit(Path.cwd(), dataset_file="data/a.jsonl", model_name=str(tiny_model), max_length=str(max_length))
    download_dataset.main()
    download_model.main()
    format_stage.main()
    return pq.read_table("data/formatted.parquet").to_pylist()


def metrics() -> dict[str, Any]:
    return dict(json.loads(Path("metrics/format.json").read_text()))


def rejected() -> list[tuple[Any, ...]]:
    """Row number, reason and detail of each rejected row."""
    return [tuple(row.values())[1:] for row in pq.read_table("data/rejected.parquet").to_pylist()]


GOOD = {"instruction": "Name a color.", "input": "", "output": "Red."}


def test_a_row_is_rendered_tokenized_and_masked(project: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    (row,) = run_format(tiny_model, [GOOD])
    assert row["source_row"] == 1
    assert row["prompt"].endswith("### Instruction:\nName a color.\n\n### Response:\n")
    assert row["response"] == "Red."
    assert row["truncated"] is False
    tokenizer = AutoTokenizer.from_pretrained("models/tokenizer")
    masked = row["labels"].count(-100)
    assert row["labels"][masked:] == row["input_ids"][masked:]
    assert tokenizer.decode(row["input_ids"][:masked]) == row["prompt"]
    assert tokenizer.decode(row["input_ids"][masked:]) == "Red.<|end|>"


def test_every_row_is_kept_or_rejected_with_its_reason(project: Path, tiny_model: Path) -> None:
    bad = [
        {"instruction": "A"},
        {"instruction": "A", "output": 5.5},
        {"instruction": " ", "output": "b"},
        {"instruction": "A", "output": " \n"},
        {"instruction": "A" * 300, "output": "b"},
    ]
    kept = run_format(tiny_model, [bad[0], GOOD, bad[1], GOOD, *bad[2:], GOOD, GOOD, GOOD], max_length=150)
    assert [row["source_row"] for row in kept] == [2, 4, 8, 9, 10]
    assert [entry[:2] for entry in rejected()] == [
        (1, "missing_field"),
        (3, "not_text"),
        (5, "empty_instruction"),
        (6, "empty_response"),
        (7, "prompt_too_long"),
    ]
    assert rejected()[4][2] == "the prompt leaves no room for a response in max_length = 150"
    assert [metrics()[name] for name in ("rows_in", "kept", "left_out")] == [10, 5, 5]
    assert metrics()["left_out_by_reason"] == dict.fromkeys(sorted(reason for _, reason, _ in rejected()), 1)


def test_tokens_are_counted_and_the_lengths_of_examples_are_plotted(project: Path, tiny_model: Path) -> None:
    rows = run_format(tiny_model, [GOOD, {**GOOD, "output": "Blue. " * 60}], max_length=100)
    lengths = [len(row["input_ids"]) for row in rows]
    assert lengths[1] == 100
    supervised = sum(len(row["labels"]) - row["labels"].count(-100) for row in rows)
    counts = {"truncated": 1, "tokens": sum(lengths), "supervised_tokens": supervised}
    assert metrics().items() >= counts.items()
    plot = Path("metrics/lengths.csv").read_text().splitlines()
    assert plot[0] == "tokens,examples"
    assert plot[-2:] == ["96,1", "112,0"]  # the last line ends the last bar
    assert sum(int(line.split(",")[1]) for line in plot[1:]) == 2


def test_the_stage_stops_if_more_than_half_of_the_rows_are_rejected(project: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError) as error:
        run_format(tiny_model, [GOOD, {"instruction": "A"}, {"instruction": "A", "output": ""}])
    assert str(error.value) == (
        "data/a.jsonl: 2 of 3 rows can't be trained on (missing_field: 1, empty_response: 1); more than half were "
        "rejected; fix the source. First: data/a.jsonl, row 2: missing_field: 'output' is missing; every row needs "
        "'instruction' and 'output', 'prompt' and 'completion', 'messages', or other columns that docs/data.md lists; "
        "map your column names in dataset_columns"
    )
    assert not Path("data/formatted.parquet").exists()
    assert not Path("data/rejected.parquet").exists()
    assert len(run_format(tiny_model, [GOOD, {"instruction": "A"}])) == 1  # half of the rows


def test_rows_that_the_template_cannot_express_do_not_stop_the_stage(project: Path, tiny_model: Path) -> None:
    rows = [{"instruction": f"A {n}", "output": "b", "tools": [{"name": "f"}] if n else []} for n in range(5)]
    assert [row["source_row"] for row in run_format(tiny_model, rows)] == [1]
    assert rejected()[0][1:] == ("not_rendered", "template alpaca does not render 'tools'; a chat template may")
    with pytest.raises(UserError, match=r"4 of 4 rows can't be trained on \(not_rendered: 4\)"):
        run_format(tiny_model, rows[1:])


@pytest.mark.parametrize("text", ["a" * 1_000_000, "🐎" * 250_000, " <|im_end|>" * 100_000, "word " * 200_000])
def test_a_row_of_a_megabyte_is_truncated_or_rejected(project: Path, tiny_model: Path, text: str) -> None:
    (cut, complete) = run_format(
        tiny_model, [{**GOOD, "output": text}, {**GOOD, "instruction": text}, GOOD], max_length=99
    )
    assert len(cut["input_ids"]) == 99
    assert cut["truncated"] is True
    assert complete["truncated"] is False
    assert [entry[:2] for entry in rejected()] == [(2, "prompt_too_long")]


def test_prompts_that_differ_only_in_case_and_whitespace_have_the_same_id(project: Path, tiny_model: Path) -> None:
    rows = run_format(
        tiny_model,
        [
            {"instruction": "Name  a color.", "output": "Red."},
            {"instruction": " name a COLOR.", "output": "Red."},
            {"instruction": "Name a color.", "output": "Blue."},
            {"instruction": "Name a", "input": "color.", "output": "Red."},
        ],
    )
    prompt_ids = [row["prompt_id"] for row in rows]
    assert prompt_ids[0] == prompt_ids[1] == prompt_ids[2] != prompt_ids[3]
    example_ids = [row["example_id"] for row in rows]
    assert example_ids[0] == example_ids[1]
    assert len(set(example_ids)) == 3


def test_an_id_is_the_same_on_every_machine() -> None:
    assert content_hash("a", "b") == "59b271ae1bbcb1d31d41929817f4b16f"


@given(text=st.text())
def test_normalizing_twice_equals_normalizing_once(text: str) -> None:
    once = normalize(text)
    assert normalize(f"  {once}\n") == once


def test_show_distinguishes_masked_and_supervised_tokens(
    project: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_format(tiny_model, [GOOD, GOOD, {"instruction": "", "output": "Blue."}])
    capsys.readouterr()
    format_stage.show_formatted(format_stage.FORMATTED, 1)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("data/a.jsonl, row 1: ")
    assert lines[1].split("Below")[0].split()[0] == "masked,"
    assert sum("Name a color." in line for line in lines) == 1
    assert lines[-1].split()[0] == "supervised,"
    assert lines[-1].endswith("  Red.<|end|>")
    format_stage.show_rejected(format_stage.REJECTED, 3)
    assert capsys.readouterr().out == "data/a.jsonl, row 3: empty_instruction: message 1 (user) is empty\n"
    run_format(tiny_model, [GOOD])
    capsys.readouterr()
    format_stage.show_rejected(format_stage.REJECTED, 3)
    assert capsys.readouterr().out == "data/rejected.parquet: no row was rejected\n"


def test_columns_are_explained_with_the_first_row_of_each_dataset(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "data/mine").mkdir()
    call = {"tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}], "thinking": "Hm.", "weight": 0}
    messages = [{"role": "user", "content": "A"}, {"role": "assistant", **call}, {"role": "tool", "content": "B"}]
    messages.append({"role": "assistant", "content": "C"})
    (project / "data/mine/a.jsonl").write_text(json.dumps({"messages": messages, "tools": [{"name": "f"}], "id": 1}))
    (project / "data/mine/b.jsonl").write_text('{"question": "A", "answer": "B", "why": "C"}\n')
    (project / "data/mine/c.jsonl").write_text('{"question": "A"}\n{"question": "A", "answer": "B"}\n')
    columns = "{prompt: question, completion: answer, reasoning: why}"
    edit(project, dataset_file="data/mine")
    edit(project, datasets=f"[{{file: a.jsonl}}, {{file: b.jsonl, columns: {columns}}}, {{file: c.jsonl}}]")
    format_stage.show_columns()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "data/mine/a.jsonl, row 1",
        "messages messages",
        "tools tools",
        "id not read",
        '→ tool {"name": "f"}',
        "→ user A",
        '→ assistant reasoning_content: "Hm."',
        'tool_calls: [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]',
        "→ tool B",
        "→ assistant C",
        "data/mine/b.jsonl, row 1",
        "question user message",
        "answer assistant message",
        "why reasoning of the assistant message",
        "→ user A",
        "→ assistant B",
        'reasoning_content: "C"',
        "data/mine/c.jsonl, row 1",
        "missing_field: 'answer' is missing; every row needs 'instruction' and 'output', 'prompt' and 'completion', "
        "'messages', or other columns that docs/data.md lists; map your column names in",
        "dataset_columns",
    ]


# It renders an earlier answer differently, so each answer has its own example.
REWRITING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}.{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def set_template(project: Path, text: str) -> None:
    (project / "templates").mkdir()
    (project / "templates/t.jinja").write_text(text)
    edit(project, template="templates/t.jinja")


def in_turn(*texts: str) -> list[dict[str, str]]:
    """Messages of the user and the assistant."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def test_answers_that_do_not_fit_into_an_example_of_their_own_are_counted(project: Path, tiny_model: Path) -> None:
    set_template(project, REWRITING)
    messages = in_turn("A", "b", "C" * 300, "d")
    rows = run_format(tiny_model, [{"messages": messages}, {"messages": messages[:2]}], max_length=100)
    assert [(row["source_row"], row["response"], row["truncated"]) for row in rows] == [(1, "b", True), (2, "b", False)]
    assert metrics().items() >= {"rows_in": 2, "kept": 2, "examples": 2, "truncated": 1}.items()
    assert rows[0]["example_id"] == rows[1]["example_id"]


def test_a_check_is_kept_for_the_last_answer_of_a_row_unless_it_is_truncated(project: Path, tiny_model: Path) -> None:
    set_template(project, REWRITING)
    messages = in_turn("A", "b", "C", "d", "E", "f" * 80)
    check = {"contains": "é"}
    rows = [{"messages": messages[:count], "check": check} for count in (4, 6)]
    found = run_format(tiny_model, [*rows, {"messages": messages[:2]}], max_length=70)
    assert [(row["source_row"], row["response"][:1], row["check"]) for row in found] == [
        (1, "b", None),
        (1, "d", '{"contains": "é"}'),
        (2, "b", None),
        (2, "d", None),
        (2, "f", None),
        (3, "b", None),
    ]


def test_rows_whose_own_answer_fails_their_check_are_counted_listed_and_kept(
    project: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "data/mine").mkdir()
    wrong = {**GOOD, "check": {"number": 3}}
    slow = {**GOOD, "output": "a" * 60 + "b", "check": {"regex": "(a|aa)+$"}}
    cut = {**GOOD, "output": "Blue. " * 60, "check": {"contains": "red"}}
    rows = [{**GOOD, "check": {"contains": "red"}}, wrong, cut, slow]
    (project / "data/mine/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (project / "data/mine/b.jsonl").write_text("".join(json.dumps(wrong) + "\n" for _ in range(9)))
    edit(project, dataset_file="data/mine", datasets="[{file: a.jsonl}, {file: b.jsonl}]", model_name=str(tiny_model))
    edit(project, max_length="150")
    for stage in (download_dataset, download_model, format_stage):
        stage.main()
    assert metrics().items() >= {"kept": 13, "truncated": 1, "checks_failing_own_answer": 11}.items()
    assert [part["checks_failing_own_answer"] for part in metrics()["sources"].values()] == [2, 9]
    found = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    start = found.index("checks 11 fail for the row's own answer; the first:")
    assert len([line for line in found if " fails for " in line]) == 5
    assert "data/mine/a.jsonl, row 2: {\"number\": 3} fails for 'Red.'" in found[start + 1 : start + 6]


def test_a_check_of_an_answer_with_reasoning_is_about_the_text_after_it(project: Path, tiny_model: Path) -> None:
    set_template(
        project,
        "{% for m in messages %}{{ m.role }}:{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
        "{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    )
    row = {"question": "Is it red?", "reasoning": "Not no.", "answer": "yes", "check": {"equals": "yes"}}
    (found,) = run_format(tiny_model, [row])
    assert (found["prompt"], found["response"]) == ("user:Is it red?<|end|>assistant:", "yes")
    assert metrics()["checks_failing_own_answer"] == 0


CHAT = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
MORE = [*CHAT["messages"], {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye."}]


def test_conversations_and_completions_are_formatted_like_alpaca_rows(project: Path, tiny_model: Path) -> None:
    rows = run_format(tiny_model, [GOOD, {"prompt": "Name a color.", "completion": "Red."}, CHAT, {"messages": MORE}])
    assert [row["response"] for row in rows] == ["Red.", "Red.", "Hello."]
    assert rows[0]["example_id"] == rows[1]["example_id"]
    assert rejected() == [
        (
            4,
            "not_single_turn",
            "found user, assistant, user, assistant; template alpaca takes one instruction and one response, "
            "chat takes more",
        )
    ]


def test_a_chat_template_takes_conversations_and_alpaca_rows(project: Path, tiny_model: Path) -> None:
    (project / "templates").mkdir()
    shutil.copy(USER_FILES / "templates/plain.jinja", project / "templates/mine.jinja")
    edit(project, template="templates/mine.jinja")
    system = {"role": "system", "content": "Be short."}
    rows = run_format(
        tiny_model,
        [
            {**GOOD, "input": "Not red."},
            {"messages": [system, *MORE, {"role": "user", "content": "unanswered"}]},
            CHAT,
            {"messages": [system]},
            {"messages": [*MORE[:3], {"role": "assistant", "content": " "}]},
        ],
    )
    assert [(row["prompt"], row["response"]) for row in rows] == [
        ("User: Name a color.\n\nNot red.\n\nAssistant:", "Red."),
        ("System: Be short.\n\nUser: Hi.\n\nAssistant: Hello.<|end|>\n\nUser: And?\n\nAssistant:", "Bye."),
        ("User: Hi.\n\nAssistant:", "Hello."),
    ]
    assert rejected() == [
        (4, "no_exchange", "has no user message followed by an assistant message"),
        (5, "empty_response", "message 4 (assistant) is empty"),
    ]
    # Both begin with the same question, so they must be in the same split.
    assert rows[1]["prompt_id"] == rows[2]["prompt_id"] != rows[0]["prompt_id"]
    assert rows[1]["example_id"] != rows[2]["example_id"]


@pytest.mark.parametrize("template", ["alpaca", "templates/plain.jinja"])
def test_a_tokenizer_without_a_fast_version_formats_rows(template: str, project: Path) -> None:
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=384, eos_token_id=1, **sizes)).save_pretrained("model")
    ByT5Tokenizer().save_pretrained("model")
    (project / "templates").mkdir()
    shutil.copy(USER_FILES / "templates/plain.jinja", project / "templates")
    edit(project, template=template)
    (row,) = run_format(Path("model"), [GOOD])
    assert (
        bytes(token - 3 for token in row["input_ids"][:-1]).decode()
        == f"{row['prompt']}{'' if template == 'alpaca' else ' '}Red."
    )
    assert row["input_ids"][-1] == row["labels"][-1] == 1
    assert row["labels"].count(-100) == len(row["prompt"])


def test_each_source_has_its_own_counts(project: Path, tiny_model: Path) -> None:
    (project / "data/mine").mkdir()
    (project / "data/mine/a.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (GOOD, {**GOOD, "output": ""}))
    )
    (project / "data/mine/b.jsonl").write_text(json.dumps(CHAT) + "\n")
    edit(project, dataset_file="data/mine", datasets="[{file: a.jsonl}, {file: b.jsonl}]", model_name=str(tiny_model))
    for stage in (download_dataset, download_model, format_stage):
        stage.main()
    metrics = json.loads(Path("metrics/format.json").read_text())
    a, b = metrics["sources"]["data/mine/a.jsonl"], metrics["sources"]["data/mine/b.jsonl"]
    assert (a["rows_in"], a["kept"], a["left_out"]) == (2, 1, 1)
    assert (b["rows_in"], b["kept"], b["left_out"]) == (1, 1, 0)
    assert a["tokens"] + b["tokens"] == metrics["tokens"]
    assert b["supervised_tokens"] == 6  # H e l lo . and the EOS token
