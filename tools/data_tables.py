"""The tables of the last `dvc repro` for `make data`: a row of numbers per example, and the texts of a few."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.data.splits import SPLITS, normalize
from stages.data.tables import read_batches, read_table, shards
from stages.format import FORMATTED, RAW, REJECTED
from stages.runtime.errors import UserError, user_errors
from stages.split import SCORES

LOCATION = ["source", "source_row"]
NUMBERS = ["example_id", *LOCATION, "slice", "truncated", "prompt_tokens", "answer_tokens"]
TEXTS = ["prompt", "response", "questions"]
SHOWN, TOKENS = [*LOCATION, "prompt", "response"], ["input_ids", "labels"]
MAX_SAMPLE = 50_000  # rows whose texts are compared; the page says so if there are more
MAX_TEXT = 2000  # characters of each of these texts
SCORE_COLUMNS = ["example_id", "loss", "pmi", "eos_loss"]
# Kinds of rows, and regular expressions for the JSON text of their messages. A quote inside a text would be escaped.
MARKS = {"reasoning": '"reasoning_content": "', "tools": r'"tool_calls": \[', "answer not trained": '"train": false'}
NO_SLICE = "(not readable)"


@dataclass(frozen=True)
class Tables:
    """The rows of all tables, without their texts.

    raw: a row per row that could be read, with its location, slice, and whether it has each of `MARKS`.
    rejected: with `REJECTED_SCHEMA` and the slice.
    rows: a row per example, in the order of the formatted table, so that its index is a position there. It has
        `NUMBERS`; the number of questions; `prompt_key` and `answer_key`, which are equal for texts that differ only in
        case, whitespace and Unicode form; and `split`: the name of one, "duplicate" or "left out".
    sample: the beginnings of the questions and of the answer of about `MAX_SAMPLE` rows, chosen by a hash, by position.
    scores: of training rows, with `SCORE_COLUMNS` and the position; None if there is no such table.
    """

    raw: pd.DataFrame
    rejected: pd.DataFrame
    rows: pd.DataFrame
    sample: dict[int, tuple[list[str], str]]
    scores: pd.DataFrame | None

    @property
    def used(self) -> pd.DataFrame:
        """The examples that are in a split."""
        return self.rows[self.rows["split"].isin([*SPLITS])]


def read_tables() -> Tables:
    """Read all tables.

    Raises:
        UserError: a table is missing, or an older version of the pipeline has written it.
    """
    needed = {RAW: ["messages"], REJECTED: ["reason"], FORMATTED: TEXTS + NUMBERS}
    for path, columns in (needed | {path: ["example_id", *LOCATION] for path in SPLITS.values()}).items():
        check_table(path, columns)
    rows, sample = read_formatted()
    # By location, too, because equal rows can be in several splits.
    key = ["example_id", *LOCATION]
    written = pd.concat([read_table(path, key).to_pandas().assign(split=name) for name, path in SPLITS.items()])
    unused = rows["example_id"].duplicated().map({True: "duplicate", False: "left out"})
    rows["split"] = rows[key].merge(written, "left", key)["split"].fillna(unused)
    raw = pd.concat([describe_raw(batch) for batch in read_batches(RAW, [*LOCATION, "slice", "messages", "tools"])])
    rejected = read_table(REJECTED, [*LOCATION, "reason", "detail"]).to_pandas()
    rejected = rejected.merge(raw[[*LOCATION, "slice"]], "left", LOCATION).fillna({"slice": NO_SLICE})
    return Tables(raw, rejected, rows, sample, read_scores(rows))


def check_table(path: Path, columns: list[str]) -> None:
    if not path.exists():
        raise UserError(f"{path}: not found; run `dvc repro`, which writes the tables that the page shows")
    for shard in shards(path):
        with user_errors(shard):
            missing = {*columns} - {*pq.read_schema(shard).names}
        if missing:
            raise UserError(
                f"{path}: has no column {', '.join(sorted(missing))}; run `dvc repro`, which writes it again"
            )


def read_formatted() -> tuple[pd.DataFrame, dict[int, tuple[list[str], str]]]:
    """`Tables.rows` without the splits, and `Tables.sample`."""
    num_rows = sum(pq.read_metadata(shard).num_rows for shard in shards(FORMATTED))
    # Ids are hashes, so those below a bound are a sample that added rows hardly change.
    bound = f"{int(min(1, MAX_SAMPLE / num_rows) * 16**8):09x}"
    parts, sample, start = [], dict[int, tuple[list[str], str]](), 0
    for batch in read_batches(FORMATTED, NUMBERS + TEXTS):
        part = batch.select(NUMBERS).to_pandas()
        prompts, responses = (batch[name].to_pylist() for name in ("prompt", "response"))
        part["prompt_key"] = [hash(normalize(prompt)) for prompt in prompts]
        part["answer_key"] = [hash(normalize(response)) for response in responses]
        part["num_questions"] = pc.list_value_length(batch["questions"]).to_numpy()
        chosen = [row for row, key in enumerate(batch["example_id"].to_pylist()) if f"0{key[:8]}" < bound]
        questions = batch["questions"].take(pa.array(chosen, pa.int64())).to_pylist()
        for row, texts in zip(chosen, questions, strict=True):
            sample[start + row] = [text[:MAX_TEXT] for text in texts], responses[row][:MAX_TEXT]
        parts.append(part)
        start += len(batch)
    return pd.concat(parts, ignore_index=True), sample


def describe_raw(batch: pa.Table) -> pd.DataFrame:
    rows = batch.select([*LOCATION, "slice"]).to_pandas()
    for kind, mark in MARKS.items():
        # 9 times as fast as `match_substring`.
        rows[kind] = pc.match_substring_regex(batch["messages"], mark).to_numpy()
    rows["tools"] |= batch["tools"].is_valid().to_numpy()
    return rows


def read_scores(rows: pd.DataFrame) -> pd.DataFrame | None:
    """The scores of training rows; None if they were never computed, or the table is empty."""
    if not SCORES.exists():
        return None
    check_table(SCORES, SCORE_COLUMNS)
    scores = read_table(SCORES, SCORE_COLUMNS).to_pandas()
    scored = rows[~rows["split"].isin([*SPLITS.keys() - {"train"}])]  # an equal row can be in another split
    positions = pd.Series(scored.index, scored["example_id"])
    scores["position"] = scores["example_id"].map(positions[~positions.index.duplicated()])
    return scores[scores["position"].notna()].astype({"position": int}) if len(scores) else None


def take_rows(positions: Iterable[int], columns: list[str]) -> dict[int, dict[str, Any]]:
    """The rows at some positions of the formatted table. Row groups without them are not read."""
    wanted, rows, start = sorted(set(positions)), dict[int, dict[str, Any]](), 0
    for shard in shards(FORMATTED):
        with user_errors(shard), pq.ParquetFile(shard) as file:
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                in_group = [position for position in wanted if start <= position < end]
                if in_group:
                    table = file.read_row_group(group, columns).take([position - start for position in in_group])
                    rows |= zip(in_group, table.to_pylist(), strict=True)
                start = end
    return rows


def take_raw(locations: set[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """The messages of some raw rows, as JSON text, by location."""
    messages: dict[tuple[str, int], str] = {}
    for batch in read_batches(RAW, [*LOCATION, "messages"]) if locations else ():
        rows = batch.to_pandas().set_index(LOCATION)["messages"]
        messages |= rows[rows.index.isin(locations)].to_dict()
    return messages
