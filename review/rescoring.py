"""Score the answers of both revisions in the same way: by the checks, and if possible the scorers, of the reviewed one.

A review never runs code of a revision. So `scorers.py` is run only if the reviewed revision is the workspace.
Otherwise, scores by different files are not comparable.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from review.revisions import WORKSPACE, Revision, hashes, output_hashes
from stages.data.examples import SCORING_SCHEMA
from stages.evaluate import EXAMPLE_COLUMNS, PREDICTIONS_SCHEMA, SPLITS, score_row
from stages.runtime.errors import UserError
from stages.scoring.scorers import PREFIX, SCORERS, Scorer, load_scorers

SCORING = "data/scoring.parquet"
SCORED = ("checked", "passed", "exact_match", "rouge_l", "repetition")  # columns that depend on checks and code
SCORING_CODE = (str(SCORERS), "stages/evaluate.py", "stages/data", "stages/checks", "stages/scoring")
Key = tuple[str, str]  # split and example id
Answers = tuple[list[str], list[bool]]  # all answers to an example, and whether the reasoning of each never closes


@dataclass(frozen=True)
class Rescoring:
    """How stored answers are scored again; by default, they are not.

    names: the revisions whose answers are.
    rows: columns of the reviewed revision that scoring needs, by key; empty if they are not available.
    scorers: those of the workspace; none if the workspace is not reviewed.
    not_comparable: the revisions whose stored scores are of another `scorers.py`.
    notes: sentences for the report.
    """

    names: set[str] = field(default_factory=set)
    rows: dict[Key, dict[str, Any]] = field(default_factory=dict)
    scorers: dict[str, Scorer] = field(default_factory=dict)
    not_comparable: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    scored: dict[tuple[str, str], pd.DataFrame] = field(default_factory=dict)  # so that no table is scored twice

    def apply(self, revision: Revision, path: str, predictions: pd.DataFrame) -> pd.DataFrame:
        """The predictions at `path` with new scores; empty ones where a row can't be scored again."""
        if revision.name not in self.names:
            return predictions
        if (revision.name, path) not in self.scored:
            if revision.name in self.not_comparable:
                predictions = predictions[[name for name in predictions if not name.startswith(PREFIX)]]
            rows, answers = _records(predictions), _answers(revision, path, predictions)
            try:
                scores = [self._score(row, answers, self.scorers) for row in rows]
            except UserError as error:  # a function of scorers.py fails for an answer
                self.notes.append(f"The answers of {revision.name} are not scored by {SCORERS}: {error}")
                scores = [self._score(row, answers, {}) for row in rows]
            self.scored[revision.name, path] = pd.DataFrame(
                [{**row, **new} for row, new in zip(rows, scores, strict=True)]
            )
        return self.scored[revision.name, path]

    def _score(
        self, row: Mapping[str, Any], answers: Mapping[Key, Answers], scorers: Mapping[str, Scorer]
    ) -> dict[str, Any]:
        key = _key(row)
        if key not in self.rows or key not in answers:
            return {"passed": None, **dict.fromkeys(PREFIX + name for name in scorers)}
        unused: dict[str, Any] = {"answer_tokens": [], "stopped": [], "reasoning": [None], "calls": [None]}
        inputs = dict.fromkeys(PREDICTIONS_SCHEMA.names) | unused | self.rows[key]
        inputs["answers"], inputs["open_reasoning"] = answers[key]
        scores = score_row(inputs, scorers)
        return {name: scores[name] for name in (*SCORED, *(PREFIX + name for name in scorers))}


def find_rescoring(before: Revision, after: Revision) -> Rescoring:
    """How the answers must be scored again; not at all if the same code and the same checks scored both sides."""
    scored_by = [_scored_by(side.read_yaml("dvc.lock")) for side in (before, after)]
    if scored_by[0] == scored_by[1]:
        return Rescoring()
    rows, notes = _rows(after), [f"Answers of both sides are scored by the checks of {after.name}."]
    if after.name != WORKSPACE:
        has_same_scorers = scored_by[0].get(str(SCORERS)) == scored_by[1].get(str(SCORERS))
        return Rescoring({before.name, after.name}, rows, {}, set() if has_same_scorers else {before.name}, notes)
    try:
        scorers = load_scorers()
    except UserError as error:
        scorers, notes = {}, [*notes, str(error)]
    return Rescoring({before.name}, rows, scorers, {before.name}, notes)


def _scored_by(lock: Mapping[str, Any]) -> dict[str, str]:
    """The MD5 of everything but the answers that scores depend on."""
    deps = hashes(((lock.get("stages") or {}).get("evaluate@tuned") or {}).get("deps", []))
    return {path: md5 for path, md5 in (deps | output_hashes(lock)).items() if path in (*SCORING_CODE, SCORING)}


def read_checks(revision: Revision) -> dict[str, str | None]:
    """The check of each test and retention example, as JSON text; empty if they are not available."""
    table = revision.read_table(SCORING, ["example_id", "check"])
    return {} if table is None else {row["example_id"]: row["check"] for row in _records(table)}


def _rows(revision: Revision) -> dict[Key, dict[str, Any]]:
    scoring = revision.read_table(SCORING, SCORING_SCHEMA.names)
    examples = [(split, revision.read_table(f"data/{split}.parquet", EXAMPLE_COLUMNS)) for split in SPLITS]
    parts = [table.assign(split=split) for split, table in examples if table is not None]
    if scoring is None or not parts:
        return {}
    return {_key(row): row for row in _records(pd.concat(parts).merge(scoring, on=["split", "example_id"]))}


def _answers(revision: Revision, path: str, predictions: pd.DataFrame) -> dict[Key, Answers]:
    """All answers to each example. Predictions have only the first one. Older ones do not tell reasoning apart."""
    if (predictions["num_answers"] == 1).all():
        return {_key(row): ([row["answer"]], [bool(row.get("open_reasoning"))]) for row in _records(predictions)}
    columns = ["split", "example_id", "answers", "open_reasoning"]
    table = revision.read_table(path.replace("predictions", "answers", 1), columns)
    answers = {}
    for row in [] if table is None else _records(table):
        texts, is_open = row["answers"], row["open_reasoning"]
        answers[_key(row)] = [*texts], [False] * len(texts) if is_open is None else [*is_open]
    return answers


def _key(row: Mapping[str, Any]) -> Key:
    return row["split"], row["example_id"]


def _records(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """The rows, with None for missing values."""
    rows: list[dict[Any, Any]] = table.astype(object).where(table.notna(), None).to_dict("records")
    return rows
