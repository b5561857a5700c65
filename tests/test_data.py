"""The bundled data: enough rows, varied, without duplicates, and correct if a computation can check it."""

import ast
import collections
import datetime
import json
import math
import re
import string
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in (ROOT / "data/instructions.jsonl").read_text(encoding="utf-8").splitlines()
]
CHECKED = [row for row in ROWS if "check" in row]
NAMES = {"ast": ast, "datetime": datetime, "json": json, "math": math, "re": re, "string": string}


def passes_check(row: dict[str, Any], output: str) -> bool:
    """Whether the `check` of a row accepts an output. A check that raises rejects it."""
    scope = {**NAMES, "instruction": row["instruction"], "input": row["input"], "output": output}
    try:
        return bool(eval(row["check"], scope))
    except Exception:
        return False


def test_there_are_enough_rows_of_enough_kinds() -> None:
    kinds = collections.Counter(row["kind"] for row in ROWS)
    assert len(ROWS) >= 1000
    assert len(kinds) >= 30
    assert max(kinds.values()) <= 0.06 * len(ROWS)
    assert 0.28 <= sum(bool(row["input"]) for row in ROWS) / len(ROWS) <= 0.40


def test_no_prompt_occurs_twice() -> None:
    prompts = [" ".join((row["instruction"] + "\n" + row["input"]).casefold().split()) for row in ROWS]
    assert [prompt for prompt, count in collections.Counter(prompts).items() if count > 1] == []


def test_rows_are_clean_text() -> None:
    for row in ROWS:
        assert list(row) in (
            ["kind", "instruction", "input", "output"],
            ["kind", "instruction", "input", "output", "check"],
        )
        assert row["instruction"] and row["output"]
        for name in ("instruction", "input", "output"):
            assert row[name] == row[name].strip()
            assert not re.search(r"[\x00-\x09\x0b-\x1f‘’“”…]", row[name]), row


def test_the_sample_prompts_are_not_in_the_data() -> None:
    text = (ROOT / "params.yaml").read_text()
    samples = re.findall(r'^  - "?(.+?)"?$', text, re.MULTILINE)
    assert len(samples) == 6
    assert [row for row in ROWS if row["instruction"] in samples] == []


def test_at_least_a_quarter_of_the_rows_has_a_computed_check() -> None:
    assert len(CHECKED) >= 0.25 * len(ROWS)
    computed = {
        "arithmetic",
        "word_problems",
        "percentages",
        "unit_conversion",
        "dates_and_times",
        "sorting",
        "counting",
    }
    assert {row["kind"] for row in ROWS if "check" not in row}.isdisjoint(computed)


@pytest.mark.parametrize("row", CHECKED, ids=lambda row: row["instruction"][:40])
def test_a_checked_answer_is_correct(row: dict[str, Any]) -> None:
    assert passes_check(row, row["output"])


@pytest.mark.parametrize("row", CHECKED, ids=lambda row: row["instruction"][:40])
def test_a_check_rejects_an_empty_or_evasive_answer(row: dict[str, Any]) -> None:
    assert not passes_check(row, "")
    assert not passes_check(row, "I do not know.")


def test_checks_reject_another_number() -> None:
    kinds = {"arithmetic", "word_problems", "percentages", "unit_conversion", "number_sequences_and_bases"}
    accepted = []
    rows = [row for row in CHECKED if row["kind"] in kinds and re.search(r"\d", row["output"])]
    for row in rows:
        numbers = list(re.finditer(r"\d+", row["output"]))
        last = numbers[-1]
        wrong = row["output"][: last.start()] + str(int(last[0]) + 3) + row["output"][last.end() :]
        if passes_check(row, wrong):
            accepted.append(row["instruction"])
    # In some answers the last number is not the result, so their checks ignore it.
    assert len(accepted) <= 0.1 * len(rows), accepted
