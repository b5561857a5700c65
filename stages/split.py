"""Drop duplicates and split by prompt: `data/formatted.parquet` → train, validation, test and retention.

The split of a row depends on a seeded hash of its normalized prompt alone. Adding rows never moves others, and the
hash never puts equal prompts in different splits. Rows of a dataset with `use` belong to that split instead. Training
examples with a user message that equals or nearly matches one of the test split or the retention set are counted, and
dropped if `drop_near_duplicates` is set. `train_fraction` and `drop_worst_fraction` leave out a part of the
training split. `data/scoring.parquet` has what is needed to score the answers.

The rows are read twice, because the user messages of these splits must be known before the first training row is
written. One process per CPU core works on the shards of a large table.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.checks.near_duplicates import QUESTION_FIELDS, NearDuplicates, list_questions
from stages.data.examples import SCORING_SCHEMA, SPLIT_SCHEMA
from stages.data.files import remove, write_json
from stages.data.splits import SPLITS, choose_splits, hash_position
from stages.data.tables import read_batches, read_table, shard_writer, sharded, shards
from stages.runtime.errors import UserError
from stages.runtime.parallel import map_processes
from stages.runtime.params import SplitParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import summary

FORMATTED, METRICS = Path("data/formatted.parquet"), Path("metrics/split.json")
SCORING = Path("data/scoring.parquet")
EVALUATED = ("test", "retention")  # the splits that a model answers
INDEX = Path(".scratch/.questions.partial")  # of the evaluated splits; exists only while the stage runs
LOCATION = ("source", "source_row")
QUESTIONS_SCHEMA = pa.schema(
    [*QUESTION_FIELDS, ("split", pa.string()), *(SPLIT_SCHEMA.field(name) for name in LOCATION)]
)
SCORES = Path("data/train_scores.parquet")
LEAKAGE = ("near_duplicates", "retention_near_duplicates", "equal_questions", "leaked_rows_in_train")
LEFT_OUT = ("left_out_by_fraction", "dropped_by_score")  # reasons for which rows are not trained on
Nearest = tuple[float, str]  # the similarity of the most similar questions, and their rows in the sources


def main() -> None:
    params = load_params(SplitParams)
    formatted = shards(FORMATTED)
    counts: Counter[str] = Counter()
    nearest: Nearest = (0.0, "")
    with ExitStack() as files:
        files.callback(remove, INDEX)
        duplicates = scan_shards(params, formatted)
        folders = {path: files.enter_context(sharded(path)) for path in (*SPLITS.values(), SCORING)}
        split_one = partial(split_shard, params, folders, find_worst_rows(params))
        for shard_counts, match in map_processes(split_one, range(len(formatted)), formatted, duplicates, desc="split"):
            counts.update(shard_counts)
            nearest = max(nearest, match, key=lambda match: match[0])
        check_counts(counts, params)
    write_json(METRICS, {name: counts[name] for name in ("rows_in", "duplicates", *LEFT_OUT, *LEAKAGE, *SPLITS)})
    listed = ", ".join(f"{counts[name]:,} {name}" for name in SPLITS)
    summary(
        {
            "examples": f"{counts['rows_in']:,} → {listed}; {counts['duplicates']:,} duplicates dropped",
            "left out": f"training rows: {counts['left_out_by_fraction']:,} by train_fraction, "
            f"{counts['dropped_by_score']:,} by their score",
            "leakage": describe_leakage(counts, nearest),
        },
        wrote=[*SPLITS.values(), SCORING, METRICS],
        then="dvc repro",
    )


def describe_leakage(counts: Counter[str], nearest: Nearest) -> str:
    """How many training examples have an evaluated question, and what to do about it."""
    text = f"training examples with a question of the test split: {counts['near_duplicates']:,}, of the retention set: "
    text += f"{counts['retention_near_duplicates']:,}"
    if nearest[0]:
        text += f"; {counts['equal_questions']:,} of them equal; nearest: {nearest[1]}, similarity {nearest[0]:.2f}"
        remaining = counts["leaked_rows_in_train"]
        advice = f"still in train: {remaining:,}; to drop them, set drop_near_duplicates: true"
        text += f"; {advice if remaining else 'all dropped'}"
    return text


def scan_shards(params: SplitParams, formatted: list[Path]) -> list[npt.NDArray[np.int64]]:
    """For each shard, the rows that repeat an earlier row of their split. Also indexes the questions of `EVALUATED`.

    Memory: 24 bytes per row, and about 80 while they are sorted.
    """
    ids: list[npt.NDArray[np.uint64]] = []

    def evaluated_questions() -> Iterator[pa.Table]:
        """The questions of each shard. Its example ids are collected on the way, so that the scan reads it once."""
        for shard_ids, questions in map_processes(partial(scan_shard, params), formatted, desc="scan"):
            ids.append(shard_ids)
            yield questions

    NearDuplicates.build(INDEX, evaluated_questions(), QUESTIONS_SCHEMA)
    all_ids = np.concatenate(ids)
    order = np.lexsort(all_ids.T)  # stable, so the first of several equal rows stays first
    ordered = all_ids[order]
    repeats = np.zeros(len(order), bool)
    repeats[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    ends = np.cumsum([len(part) for part in ids])
    return [np.flatnonzero(part) for part in np.split(repeats, ends[:-1])]


def scan_shard(params: SplitParams, shard: Path) -> tuple[npt.NDArray[np.uint64], pa.Table]:
    """The split and the example id of each row of a shard, uint64 (rows, 3), and its distinct evaluated questions."""
    ids, rows = [np.empty((0, 3), np.uint64)], []
    for batch in read_batches(shard, ["example_id", "prompt_id", "use", "questions", *LOCATION]):
        digits = "".join(batch["example_id"].to_pylist())  # 32 hexadecimal digits each, which are two integers
        splits = choose_splits(batch, params)
        numbers = np.array([[list(SPLITS).index(split)] for split in splits], np.uint64).reshape(-1, 1)
        ids.append(np.hstack([numbers, np.frombuffer(bytes.fromhex(digits), np.uint64).reshape(-1, 2)]))
        evaluated = pa.array([split in EVALUATED for split in splits], pa.bool_())
        rows += batch.append_column("split", pa.array(splits, pa.string())).filter(evaluated).to_pylist()
    return np.concatenate(ids), list_questions(rows, QUESTIONS_SCHEMA)


def find_worst_rows(params: SplitParams) -> frozenset[str]:
    """The example ids of the training rows with the lowest PMI, a part `drop_worst_fraction` of those that have one.

    Raises:
        UserError: no row has one.
    """
    if not params.drop_worst_fraction:
        return frozenset()
    scores = read_table(SCORES, ["example_id", "pmi"]).to_pandas().dropna()
    if scores.empty:
        raise UserError("drop_worst_fraction: found rows of plain text only, which have no PMI; must be 0")
    ordered = scores.sort_values(["pmi", "example_id"])["example_id"]
    return frozenset(ordered.head(round(params.drop_worst_fraction * len(ordered))))


def reason_to_leave_out(example_id: str, prompt_id: str, params: SplitParams, worst: frozenset[str]) -> str | None:
    """Why a training row is left out; None if it is not. A larger `train_fraction` has all rows of a smaller one."""
    if params.train_fraction < 1 and hash_position(f"train:{params.split_seed}", prompt_id) >= params.train_fraction:
        return "left_out_by_fraction"
    return "dropped_by_score" if example_id in worst else None


def split_shard(
    params: SplitParams,
    folders: dict[Path, Path],
    worst: frozenset[str],
    number: int,
    shard: Path,
    duplicates: npt.NDArray[np.int64],
) -> tuple[Counter[str], Nearest]:
    """Write one shard of each split; returns its counts and its nearest pair of questions."""
    evaluated, duplicate = NearDuplicates(INDEX), set(duplicates.tolist())
    counts = Counter(duplicates=len(duplicate))
    nearest: Nearest = (0.0, "")
    with ExitStack() as files:
        writers = {
            name: files.enter_context(shard_writer(folders[path], SPLIT_SCHEMA, number))
            for name, path in SPLITS.items()
        }
        scoring = files.enter_context(shard_writer(folders[SCORING], SCORING_SCHEMA, number))
        for batch in read_batches(shard):
            members: dict[str, list[int]] = {name: [] for name in SPLITS}
            example_ids, prompt_ids = batch["example_id"].to_pylist(), batch["prompt_id"].to_pylist()
            for row, split in enumerate(choose_splits(batch, params)):
                if counts["rows_in"] + row in duplicate:
                    continue
                reason = reason_to_leave_out(example_ids[row], prompt_ids[row], params, worst)
                if split == "train" and reason:
                    counts[reason] += 1
                else:
                    members[split].append(row)
            counts["rows_in"] += len(batch)

            train = batch.select(["questions", *LOCATION]).take(pa.array(members["train"], pa.int64()))
            matches = evaluated.find(train["questions"].to_pylist())
            for at, match in enumerate(matches):
                if match:
                    split = evaluated.questions["split"][match[1]].as_py()
                    counts["near_duplicates" if split == "test" else "retention_near_duplicates"] += 1
                    counts["equal_questions"] += match[0] == 1
                    counts["leaked_rows_in_train"] += not params.drop_near_duplicates
                    if match[0] > nearest[0]:
                        locations = _location(train, at), _location(evaluated.questions, match[1])
                        nearest = match[0], "{} in train to {} in {}".format(*locations, split)
            if params.drop_near_duplicates:
                pairs = zip(members["train"], matches, strict=True)
                members["train"] = [row for row, match in pairs if not match]
            for name, rows in members.items():
                part = batch.take(pa.array(rows, pa.int64()))
                writers[name].write(part.select(SPLIT_SCHEMA.names))
                if name in EVALUATED:
                    names = pa.array([name] * len(part), pa.string())
                    scoring.write(part.append_column("split", names).select(SCORING_SCHEMA.names))
        counts.update({name: writer.num_rows for name, writer in writers.items()})
    return counts, nearest


def _location(rows: pa.Table, at: int) -> str:
    return f"{rows['source'][at]}, row {rows['source_row'][at].as_py():,}"


def check_counts(counts: Counter[str], params: SplitParams) -> None:
    """Check that no row was lost and that no split is empty, except the retention set.

    Raises:
        UserError: a split is empty.
    """
    dropped = counts["near_duplicates"] + counts["retention_near_duplicates"] if params.drop_near_duplicates else 0
    left_out = sum(counts[name] for name in LEFT_OUT)
    num_examples = counts["rows_in"] - counts["duplicates"] - counts["retention"]
    num_written = sum(counts[name] for name in SPLITS)
    assert counts["rows_in"] == counts["duplicates"] + dropped + left_out + num_written, "a row vanished"  # noqa: S101
    for name in SPLITS:
        if counts[name] == 0 and name != "retention":
            if name != "train":
                advice = f"raise {name}_fraction"
            else:
                advice = "lower validation_fraction or test_fraction"
                advice = "set drop_near_duplicates: false" if dropped else advice
                advice = "raise train_fraction or lower drop_worst_fraction" if left_out else advice
            raise UserError(
                f"the {name} split is empty: found {num_examples:,} examples, "
                + (f"{dropped:,} of them dropped as near-duplicates, " if dropped else "")
                + (f"{left_out:,} left out by train_fraction or their score, " if left_out else "")
                + f"validation_fraction = {params.validation_fraction}, test_fraction = {params.test_fraction}; "
                f"{advice}, or list a dataset with `use: {name}`, or add rows to the dataset"
            )


if __name__ == "__main__":
    run(main)
