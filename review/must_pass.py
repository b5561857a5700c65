"""Must-pass examples: test rows that a change must not break, from `must_pass.yaml` (docs/review.md)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from review.data_changes import TEST, without_template
from review.revisions import Revision
from review.runs import METRICS_FILE, read_answers
from stages.data.conversations import content_hash, normalize
from stages.runtime.errors import UserError
from stages.runtime.yaml12 import YAMLError, parse_yaml

MUST_PASS = Path("must_pass.yaml")
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


def read_must_pass(path: Path = MUST_PASS) -> list[str]:
    """The entries, which are prompts or ids of test rows; none if there is no file.

    Raises:
        UserError: the file is not a YAML list of texts.
    """
    if not path.exists():
        return []
    try:
        return TypeAdapter(list[str]).validate_python(parse_yaml(path.read_text(encoding="utf-8")) or [])
    except ValidationError as errors:
        found = "; ".join(f"{error['input']!r:.100}: {error['msg']}" for error in errors.errors())
        raise UserError(f"{path}: found {found}; must be a list of prompts or ids of test rows, as text") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None


def compare_must_pass(entries: Sequence[str], before: Revision, after: Revision) -> list[MustPass] | None:
    """The must-pass examples, those that need attention first; None if the predictions of a side are not available."""
    test = after.read_table(TEST, ["example_id", "prompt_id", "prompt"])
    answers, old_answers = read_answers(after), read_answers(before)
    if test is None or not answers or (before.read_json(METRICS_FILE) and not old_answers):
        return None
    found: dict[str, MustPass] = {}
    for entry in entries:
        ids = {entry, *prompt_ids(entry)}
        rows = test[(test["example_id"].isin(ids) | test["prompt_id"].isin(ids)) & test["example_id"].isin(answers)]
        checked = [row for row in rows.itertuples() if answers[row.example_id]["checked"]]
        if not checked:
            found[entry] = MustPass("not in the test split" if rows.empty else "without a check", entry)
        for row in checked:
            own, old = answers[row.example_id], old_answers.get(row.example_id, {})
            passed_before = all_passed(old) if old.get("checked") else None
            if all_passed(own):
                state = "fixed" if passed_before is False else "passing"
            else:
                state = "broken" if passed_before else "still failing"
            prompt = without_template(row.prompt) or row.example_id
            found[row.example_id] = MustPass(state, prompt, old.get("answer", ""), own["answer"])
    return sorted(found.values(), key=lambda example: STATES.index(example.state))


def all_passed(row: Mapping[str, Any]) -> bool:
    """Whether all answers to an example pass its check."""
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
