"""Some of the templates of `make templates`, and the table of all in docs/templates.md."""

import pytest

from tests.templates import ROWS, Cell, cases, try_template

REASONING = ["reasoning", "reasoning in two turns", "reasoning and call"]
CALLS = ["call", "call and answer", "parallel calls"]
# The kinds of rows that are rejected, with their reasons.
EXPECTED: dict[str, dict[str, list[str]]] = {
    "nemotron_3_nano": {},
    "glm4moe": {},
    "gemma4_v5": {},
    "qwen3_8": {},
    "gptoss": {"not_rendered": ["parallel calls"]},
    "llama3_1": {"not_rendered": REASONING, "refused_by_template": ["parallel calls"]},
    "qwen3_5_nothink": {"inexact_mask": [*REASONING, "reasoning in the text"]},
    "qwen3_5_nothink, enable_thinking: true": {},
    'deepseekv3, reasoning_end: "\\n</think>\\n\\n"': {
        "not_rendered": [*CALLS, "reasoning and call", "tools without a call"]
    },
    "smolvlm": {"not_rendered": [*CALLS, *REASONING, "tools without a call"]},
}


@pytest.mark.parametrize("label", EXPECTED)
def test_each_row_is_exact_or_rejected_with_its_reason(label: str) -> None:
    found = try_template(*cases()[label])
    reasons = {kind: reason for reason, kinds in EXPECTED[label].items() for kind in kinds}
    assert {kind: (cell.outcome, cell.detail) for kind, cell in found.items()} == {
        kind: (reasons.get(kind, "exact"), "") for kind in ROWS
    }


def test_masks_are_those_of_trl_where_the_generation_prompt_is() -> None:
    found = try_template("glm4moe", {})
    assert set(found.values()) == {Cell("exact", trl="the same")}
