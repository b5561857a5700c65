"""Drop duplicates and split by prompt: `data/formatted.parquet` → train, validation, test and retention.

The split of a row depends on a seeded hash of its normalized prompt alone. Adding rows never moves others, and the
hash never puts equal prompts in different splits. Rows of a dataset with `use` belong to that split instead. Training
examples that match or nearly match a prompt of the test split or the retention set are counted, and dropped if
`drop_near_duplicates` is set. `data/scoring.parquet` has what is needed to score the answers to these prompts.

The rows are read twice, because all these prompts must be known before the first training row is written. One process
per CPU core works on the shards of a large table.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.data.examples import SCORING_SCHEMA, SPLIT_SCHEMA
from stages.data.near_duplicates import NearDuplicates
from stages.data.splits import SPLITS, choose_splits
from stages.data.tables import read_batches, shard_writer, sharded, shards
from stages.runtime.errors import UserError
from stages.runtime.files import remove, write_json
from stages.runtime.parallel import map_processes
from stages.runtime.params import SplitParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import summary

FORMATTED, METRICS = Path("data/formatted.parquet"), Path("metrics/split.json")
SCORING = Path("data/scoring.parquet")
EVALUATED = ("test", "retention")  # the splits that a model answers
INDEX = Path(".scratch/.prompts.partial")  # of the evaluated splits; exists only while the stage runs
LOCATION = ("source", "source_row")
PROMPTS_SCHEMA = pa.schema(
    [SPLIT_SCHEMA.field("prompt"), ("split", pa.string()), *(SPLIT_SCHEMA.field(name) for name in LOCATION)]
)
Nearest = tuple[float, str]  # the similarity of the most similar prompts, and their rows in the sources


def main() -> None:
    params = load_params(SplitParams)
    formatted = shards(FORMATTED)
    counts: Counter[str] = Counter()
    nearest: Nearest = (0.0, "")
    with ExitStack() as files:
        files.callback(remove, INDEX)
        duplicates = scan_shards(params, formatted)
        folders = {path: files.enter_context(sharded(path)) for path in (*SPLITS.values(), SCORING)}
        split_one = partial(split_shard, params, folders)
        for shard_counts, match in map_processes(split_one, range(len(formatted)), formatted, duplicates, desc="split"):
            counts.update(shard_counts)
            nearest = max(nearest, match, key=lambda match: match[0])
        check_counts(counts, params)
    names = ("rows_in", "duplicates", "near_duplicates", "retention_near_duplicates", *SPLITS)
    write_json(METRICS, {name: counts[name] for name in names})
    listed = ", ".join(f"{counts[name]:,} {name}" for name in SPLITS)
    near = f"training examples that nearly match a prompt: {counts['near_duplicates']:,} of the test split, "
    near += f"{counts['retention_near_duplicates']:,} of the retention set"
    if nearest[0]:
        near += "; dropped" if params.drop_near_duplicates else "; kept"
        near += f"; nearest: {nearest[1]}, similarity {nearest[0]:.2f}"
    summary(
        {
            "examples": f"{counts['rows_in']:,} → {listed}; {counts['duplicates']:,} duplicates dropped",
            "near-duplicates": near,
        },
        wrote=[*SPLITS.values(), SCORING, METRICS],
        then="dvc repro",
    )


def scan_shards(params: SplitParams, formatted: list[Path]) -> list[npt.NDArray[np.int64]]:
    """For each shard, the rows that repeat an earlier row of their split. Also indexes the prompts of `EVALUATED`.

    Memory: 24 bytes per row, and about 80 while they are sorted.
    """
    ids: list[npt.NDArray[np.uint64]] = []

    def evaluated_prompts() -> Iterator[pa.Table]:
        """The prompts of each shard. Its example ids are collected on the way, so that the scan reads it once."""
        for shard_ids, prompts in map_processes(partial(scan_shard, params), formatted, desc="scan"):
            ids.append(shard_ids)
            yield prompts

    NearDuplicates.build(INDEX, evaluated_prompts(), PROMPTS_SCHEMA)
    all_ids = np.concatenate(ids)
    order = np.lexsort(all_ids.T)  # stable, so the first of several equal rows stays first
    ordered = all_ids[order]
    repeats = np.zeros(len(order), bool)
    repeats[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    ends = np.cumsum([len(part) for part in ids])
    return [np.flatnonzero(part) for part in np.split(repeats, ends[:-1])]


def scan_shard(params: SplitParams, shard: Path) -> tuple[npt.NDArray[np.uint64], pa.Table]:
    """The split and the example id of each row of a shard, uint64 (rows, 3), and its distinct evaluated prompts."""
    ids, prompts = [np.empty((0, 3), np.uint64)], [PROMPTS_SCHEMA.empty_table()]
    for batch in read_batches(shard, ["example_id", "prompt_id", "use", "prompt", *LOCATION]):
        digits = "".join(batch["example_id"].to_pylist())  # 32 hexadecimal digits each, which are two integers
        splits = choose_splits(batch, params)
        numbers = np.array([[list(SPLITS).index(split)] for split in splits], np.uint64).reshape(-1, 1)
        ids.append(np.hstack([numbers, np.frombuffer(bytes.fromhex(digits), np.uint64).reshape(-1, 2)]))
        evaluated = pa.array([split in EVALUATED for split in splits], pa.bool_())
        with_split = batch.append_column("split", pa.array(splits, pa.string()))
        prompts.append(with_split.select(PROMPTS_SCHEMA.names).filter(evaluated))
    # Equal prompts have equal keys in the index and would use up the limit of candidates per band.
    distinct = pa.concat_tables(prompts).group_by("prompt", use_threads=False)
    first = distinct.aggregate([(name, "first") for name in PROMPTS_SCHEMA.names[1:]])
    return np.concatenate(ids), first.rename_columns(PROMPTS_SCHEMA.names)


def split_shard(
    params: SplitParams, folders: dict[Path, Path], number: int, shard: Path, duplicates: npt.NDArray[np.int64]
) -> tuple[Counter[str], Nearest]:
    """Write one shard of each split; returns its counts and its nearest pair of prompts."""
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
            for row, split in enumerate(choose_splits(batch, params)):
                if counts["rows_in"] + row not in duplicate:
                    members[split].append(row)
            counts["rows_in"] += len(batch)

            train = batch.select(["prompt", *LOCATION]).take(pa.array(members["train"], pa.int64()))
            matches = evaluated.find(train["prompt"].to_pylist())
            for at, match in enumerate(matches):
                if match:
                    split = evaluated.prompts["split"][match[1]].as_py()
                    counts["near_duplicates" if split == "test" else "retention_near_duplicates"] += 1
                    if match[0] > nearest[0]:
                        locations = _location(train, at), _location(evaluated.prompts, match[1])
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


def _location(prompts: pa.Table, at: int) -> str:
    return f"{prompts['source'][at]}, row {prompts['source_row'][at].as_py():,}"


def check_counts(counts: Counter[str], params: SplitParams) -> None:
    """Check that no row was lost and that no split is empty, except the retention set.

    Raises:
        UserError: a split is empty.
    """
    dropped = counts["near_duplicates"] + counts["retention_near_duplicates"] if params.drop_near_duplicates else 0
    num_examples = counts["rows_in"] - counts["duplicates"] - counts["retention"]
    num_written = sum(counts[name] for name in SPLITS)
    assert counts["rows_in"] == counts["duplicates"] + dropped + num_written, "a row vanished"  # noqa: S101
    for name in SPLITS:
        if counts[name] == 0 and name != "retention":
            if name != "train":
                advice = f"raise {name}_fraction"
            else:
                advice = "set drop_near_duplicates: false" if dropped else "lower validation_fraction or test_fraction"
            raise UserError(
                f"the {name} split is empty: found {num_examples:,} examples, "
                + (f"{dropped:,} of them dropped as near-duplicates, " if dropped else "")
                + f"validation_fraction = {params.validation_fraction}, test_fraction = {params.test_fraction}; "
                f"{advice}, or list a dataset with `use: {name}`, or add rows to the dataset"
            )


if __name__ == "__main__":
    run(main)
