"""Must-pass examples: test rows that a change must not break, from `must_pass.yaml` (docs/review.md)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from review.data_changes import TEST, without_template
from review.rescoring import Rescoring
from review.revisions import Revision
from review.runs import METRICS_FILE, read_answers
from stages.data.splits import content_hash, normalize

STATES = ("not in the test split", "without a check", "broken", "still failing", "fixed", "passing")
BAD = STATES[:3]  # with these, the gate fails


@dataclass(frozen=True)
class MustPass:
    """A must-pass example in both revisions, or an entry that is none.

    state: one of `STATES`. An example that is new and fails is still failing.
    """

    state: str
    prompt: str
    answer_before: str = ""
    answer_after: str = ""


def compare_must_pass(
    entries: Sequence[str], before: Revision, after: Revision, rescoring: Rescoring
) -> list[MustPass] | None:
    """The must-pass examples, those that need attention first; None if the predictions of a side are not available."""
    test = after.read_table(TEST, ["example_id", "prompt_id", "prompt"])
    old_answers, answers = (read_answers(side, rescoring) for side in (before, after))
    if test is None or not answers or (before.read_json(METRICS_FILE) and not old_answers):
        return None
    examples: dict[str, MustPass] = {}
    for entry in entries:
        ids = {entry, *prompt_ids(entry)}
        rows = test[(test["example_id"].isin(ids) | test["prompt_id"].isin(ids)) & test["example_id"].isin(answers)]
        checked = [row for row in rows.itertuples() if passes(answers[row.example_id]) is not None]
        if not checked:
            examples[entry] = MustPass("not in the test split" if rows.empty else "without a check", entry)
        for row in checked:
            new, old = answers[row.example_id], old_answers.get(row.example_id, {})
            if passes(new):
                state = "fixed" if passes(old) is False else "passing"
            else:
                state = "broken" if passes(old) else "still failing"
            prompt = without_template(row.prompt) or row.example_id
            examples[row.example_id] = MustPass(state, prompt, old.get("answer", ""), new["answer"])
    return sorted(examples.values(), key=lambda example: STATES.index(example.state))


def passes(row: Mapping[str, Any]) -> bool | None:
    """Whether all answers to an example pass its check; None if it did not judge them, as in older predictions."""
    if row.get("checked") != True or pd.isna(row["passed"]):  # noqa: E712 (it can be NaN or missing)
        return None
    return bool(row["passed"] == row["num_answers"])


def prompt_ids(text: str) -> set[str]:
    """The prompt ids that a text can have: all of it is the question, or its last lines are the input."""
    lines = text.split("\n")
    parts = (("\n".join(lines[:at]), "\n".join(lines[at:])) for at in range(1, len(lines) + 1))
    return {content_hash(normalize(question), normalize(given)) for question, given in parts}


def counted(examples: Sequence[MustPass]) -> str:
    """Such as "1 broken, 3 passing"."""
    counts = Counter(example.state for example in examples)
    return ", ".join(f"{counts[state]:,} {state}" for state in STATES if counts[state])
