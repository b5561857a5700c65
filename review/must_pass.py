"""Must-pass examples: test rows that a change must not break, from `must_pass.yaml` (docs/review.md)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from review.data_changes import TEST, without_template
from review.revisions import Revision
from review.runs import read_answers
from stages.data.conversations import content_hash, normalize
from stages.runtime.errors import UserError
from stages.runtime.yaml12 import YAMLError, parse_yaml

MUST_PASS = Path("must_pass.yaml")
STATES = ("broken", "still failing", "fixed", "passing")


@dataclass(frozen=True)
class MustPass:
    """A must-pass example in both revisions; an example passes if all its answers do.

    passed_before: None if `before` has no checked answer to it.
    """

    prompt: str
    passed_before: bool | None
    passed_after: bool
    answer_before: str | None
    answer_after: str

    @property
    def state(self) -> str:
        """One of `STATES`. An example that is new and fails is still failing."""
        if self.passed_after:
            return "fixed" if self.passed_before is False else "passing"
        return "broken" if self.passed_before else "still failing"


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
    """The must-pass examples; None if the predictions or the test split of `after` are not available.

    Raises:
        UserError: an entry is not in the test split, or its row has no check.
    """
    test = after.read_table(TEST, ["example_id", "prompt_id", "prompt"])
    answers, old_answers = read_answers(after), read_answers(before)
    if test is None or not answers:
        return None
    found = []
    for entry in entries:
        ids = {entry, *prompt_ids(entry)}
        rows = test[(test["example_id"].isin(ids) | test["prompt_id"].isin(ids)) & test["example_id"].isin(answers)]
        if rows.empty:
            raise UserError(
                f"{MUST_PASS}: {entry!r:.200} is not in the test split of {after.name}; must be a prompt or an id "
                f"(example_id or prompt_id) of {TEST}"
            )
        for row in rows.itertuples():
            own, old = answers[row.example_id], old_answers.get(row.example_id, {})
            if not own["checked"]:
                raise UserError(f"{MUST_PASS}: the row of {entry!r:.200} has no check; add one to the dataset")
            found.append(
                MustPass(
                    without_template(row.prompt) or row.example_id,
                    all_passed(old) if old.get("checked") else None,
                    all_passed(own),
                    old.get("answer"),
                    own["answer"],
                )
            )
    return sorted(found, key=lambda example: STATES.index(example.state))


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
