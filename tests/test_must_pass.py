"""Must-pass examples: which are fixed, broken and still failing, and entries that name no test row with a check."""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pytest

from review.conditions import MUST_PASS, parse
from review.gates import check_must_pass
from review.must_pass import MustPass, compare_must_pass, prompt_ids
from review.report import must_pass_table
from review.rescoring import Rescoring
from stages.runtime.errors import UserError
from stages.templates.alpaca import render_alpaca
from stages.templates.conversations import Conversation, content_ids
from tests.conftest import predictions


@dataclass
class Side:
    """A revision with a test split and predictions, for four prompts."""

    passed: list[bool] | None
    name: str = "new"
    columns: dict[str, Any] = field(default_factory=dict)
    is_measured: bool = True

    def read_json(self, path: str) -> dict[str, Any]:
        return {"loss": 1.0} if self.is_measured else {}

    def read_table(self, path: str, columns: list[str] | None = None) -> pd.DataFrame | None:
        if self.passed is None:
            return None
        rows = predictions([1.0] * 4, passed=self.passed, **self.columns)
        rows = rows.assign(prompt=[render_alpaca(f"Say {n}.") for n in range(4)])
        return rows.reindex(columns=columns) if columns else rows


def compared(before: Side, after: Side, *entries: str) -> list[MustPass] | None:
    entries = entries or ("id0", "id1", "id2", "id3")
    return compare_must_pass(entries, before, after, Rescoring())  # type: ignore[arg-type]


def test_examples_are_broken_still_failing_fixed_or_passing() -> None:
    found = compared(Side([False, True, False, True]), Side([True, False, False, True]))
    assert found
    states = [(example.state, example.prompt) for example in found]
    assert states == [("broken", "Say 1."), ("still failing", "Say 2."), ("fixed", "Say 0."), ("passing", "Say 3.")]
    gate = check_must_pass(found)
    assert (gate.passed, gate.found) == (False, "1 broken, 1 still failing, 1 fixed, 1 passing (broken: Say 1.)")
    assert must_pass_table(found).splitlines()[4:] == [
        "| ✗ broken | Say 1. | answer 1 | answer 1 |",
        "| still failing | Say 2. | answer 2 | answer 2 |",
        "| ✓ fixed | Say 0. | answer 0 | answer 0 |",
    ]


def test_an_example_that_before_has_no_answer_to_is_passing_or_still_failing() -> None:
    for before in (Side(None, is_measured=False), Side([True] * 4, columns={"checked": False})):
        found = compared(before, Side([True, False, True, True]))
        assert found
        assert [example.state for example in found] == ["still failing", "passing", "passing", "passing"]
        assert check_must_pass(found).passed


@pytest.mark.parametrize("checked", [None, float("nan")])
def test_older_predictions_without_a_value_do_not_count_as_passed(checked: float | None) -> None:
    found = compared(Side([True] * 4, columns={"checked": checked}), Side([False] * 4), "id0")
    assert found
    assert [example.state for example in found] == ["still failing"]


def test_all_answers_to_a_prompt_must_pass() -> None:
    found = compared(Side([True] * 4), Side([2, 3, 3, 3], columns={"num_answers": 3}), "id0", "id1")  # type: ignore[list-item]
    assert found
    assert [example.state for example in found] == ["broken", "passing"]


def test_the_gate_fails_if_the_predictions_are_not_available() -> None:
    for before, after in ((Side([True] * 4), Side(None)), (Side(None), Side([True] * 4))):
        gate = check_must_pass(compared(before, after))
        found = "undecided, because the predictions are not available"
        assert (gate.passed, gate.found) == (False, found)


@pytest.mark.parametrize(("question", "given"), [("Name a color.", ""), ("Sort these\nwords.", "b a\nd c")])
def test_a_prompt_may_be_followed_by_its_input(question: str, given: str) -> None:
    conversation = Conversation(
        [{"role": "user", "content": question}, {"role": "assistant", "content": "Red."}], given
    )
    prompt_id, _ = content_ids(conversation)
    assert prompt_id in prompt_ids(f"{question}\n{given}".strip())
    assert prompt_id not in prompt_ids("Name a river.")


@pytest.mark.parametrize(
    ("entry", "checked", "state"),
    [("Name a river.", True, "not in the test split"), ("id1", False, "without a check")],
)
def test_an_entry_that_is_not_a_test_row_with_a_check_fails_the_gate(entry: str, checked: bool, state: str) -> None:
    found = compared(Side([True] * 4), Side([True] * 4, columns={"checked": checked}), entry)
    assert found == [MustPass(state, entry)]
    gate = check_must_pass(found)
    assert (gate.passed, gate.found) == (False, f"1 {state} ({state}: {entry}); correct must_pass.yaml")
    assert f"| ✗ {state} | {entry} |" in must_pass_table(found)


def test_rows_with_the_same_prompt_count_once_and_need_one_check() -> None:
    columns = {"prompt_id": ["same", "same", "p2", "p3"], "checked": [True, False, True, True]}
    sides = Side([False] * 4, columns=columns), Side([True] * 4, columns=columns)
    found = compared(*sides, "same", "id0")
    assert found
    assert [(example.state, example.prompt) for example in found] == [("fixed", "Say 0.")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "id: 3",
            "must_pass.yaml:\n  content: found {'id': 3}: Input should be a valid list\n  as text",
        ),
        (
            "- 3",
            "must_pass.yaml:\n  0: found 3: Input should be a valid string\n  as text",
        ),
        ("- [", "must_pass.yaml: not valid YAML: "),
    ],
)
def test_an_invalid_file_is_reported(content: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(content.encode(), str(MUST_PASS), list[str], "as text")
    assert str(error.value).startswith(message)
