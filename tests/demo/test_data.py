"""The bundled data: enough rows, varied, without duplicates, and correct if a computation can check it."""

import collections
import json
import re
from typing import Any

from stages.checks.kinds import passes, validate_check
from tests.clone import ROOT

ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in (ROOT / "data/instructions.jsonl").read_text(encoding="utf-8").splitlines()
]
CHECKED = [row for row in ROWS if "check" in row]


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


def test_at_least_half_of_the_rows_have_a_check() -> None:
    assert len(CHECKED) >= 0.5 * len(ROWS)
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


def test_checks_accept_the_answers_of_the_data_and_reject_empty_and_evasive_ones() -> None:
    for row in CHECKED:
        validate_check(row["check"])
        answers = [row["output"], "", "I do not know."]
        assert [passes(row["check"], answer) for answer in answers] == [True, False, False], row


def test_checks_reject_other_numbers() -> None:
    kinds = {"arithmetic", "word_problems", "percentages", "unit_conversion", "number_sequences_and_bases"}
    rows = [row for row in CHECKED if row["kind"] in kinds and re.search(r"\d", row["output"])]
    others = [re.sub(r"\d+", lambda number: str(int(number[0]) + 3), row["output"]) for row in rows]
    accepted = [row["instruction"] for row, other in zip(rows, others, strict=True) if passes(row["check"], other)]
    # The result of some is not a number, such as "FF" or "No".
    assert len(accepted) <= 0.05 * len(rows), accepted
