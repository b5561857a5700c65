"""Must-pass examples: which are fixed, broken and still failing, and entries that name no test row with a check."""

from collections.abc import Sequence
from typing import Any

import pytest

from review.gates import check_must_pass
from review.must_pass import MustPass, compare_must_pass, prompt_ids
from review.report import must_pass_table
from review.rescoring import Rescoring
from stages.templates.conversations import Conversation, content_ids
from tests.conftest import predictions, revision

NOT_AVAILABLE = revision(None)


def side(passed: Sequence[int], **columns: Any) -> Any:
    """A revision in which the answers to four prompts pass or not."""
    return revision(predictions([1.0] * 4, passed=passed, **columns))


def compared(before: Any, after: Any, *entries: str) -> list[MustPass] | None:
    return compare_must_pass(entries or ("id0", "id1", "id2", "id3"), before, after, Rescoring())


def test_examples_are_broken_still_failing_fixed_or_passing() -> None:
    found = compared(side([False, True, False, True]), side([True, False, False, True]))
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
    for before in (revision(None, is_measured=False), side([True] * 4, checked=False)):
        found = compared(before, side([True, False, True, True]))
        assert found
        assert [example.state for example in found] == ["still failing", "passing", "passing", "passing"]
        assert check_must_pass(found).passed


@pytest.mark.parametrize("checked", [None, float("nan")])
def test_older_predictions_without_a_value_do_not_count_as_passed(checked: float | None) -> None:
    found = compared(side([True] * 4, checked=checked), side([False] * 4), "id0")
    assert found
    assert [example.state for example in found] == ["still failing"]


def test_all_answers_to_a_prompt_must_pass() -> None:
    found = compared(side([True] * 4), side([2, 3, 3, 3], num_answers=3), "id0", "id1")
    assert found
    assert [example.state for example in found] == ["broken", "passing"]


def test_the_gate_fails_if_the_predictions_are_not_available() -> None:
    for before, after in ((side([True] * 4), NOT_AVAILABLE), (NOT_AVAILABLE, side([True] * 4))):
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
    found = compared(side([True] * 4), side([True] * 4, checked=checked), entry)
    assert found == [MustPass(state, entry)]
    gate = check_must_pass(found)
    assert (gate.passed, gate.found) == (False, f"1 {state} ({state}: {entry}); correct must_pass.yaml")
    assert f"| ✗ {state} | {entry} |" in must_pass_table(found)


def test_rows_with_the_same_prompt_count_once_and_need_one_check() -> None:
    columns = {"prompt_id": ["same", "same", "p2", "p3"], "checked": [True, False, True, True]}
    found = compared(side([False] * 4, **columns), side([True] * 4, **columns), "same", "id0")
    assert found
    assert [(example.state, example.prompt) for example in found] == [("fixed", "Say 0.")]
