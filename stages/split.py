"""`data/formatted.parquet` → train, validation and test, without duplicates.

Membership depends on a seeded hash of the normalised prompt alone: added rows never move the old ones, and equal
prompts never lie in two splits. Prompts that are nearly equal may: those of train are counted, and left out on demand.

The rows are read twice: what is in test must be known before the first row of train is written. The shards of a large
table are split by a process for each core.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.shared.errors import UserError
from stages.shared.examples import FORMATTED
from stages.shared.files import read_batches, remove, shard_writer, sharded, shards, write_json
from stages.shared.near_duplicates import NearDuplicates
from stages.shared.params import SplitParams, load_params
from stages.shared.processes import map_processes
from stages.shared.run import run
from stages.shared.terminal import summary

FORMATTED_FILE = Path("data/formatted.parquet")
SPLITS = ("train", "validation", "test")
INDEX = Path(".scratch/.test_prompts.partial")  # an index of them, while the stage runs
TEST_PROMPTS = pa.schema([FORMATTED.field(name) for name in ("prompt", "source", "source_row")])


def main() -> None:
    params = load_params(SplitParams)
    formatted = shards(FORMATTED_FILE)
    counts: Counter[str] = Counter()
    nearest = (0.0, "")  # similarity of two prompts, and where they are

    with ExitStack() as files:
        files.callback(remove, INDEX)
        duplicates = look_ahead(params, formatted)
        folders = {name: files.enter_context(sharded(Path(f"data/{name}.parquet"))) for name in SPLITS}
        split_one = partial(split_shard, params, folders)
        for shard_counts, match in map_processes(
            split_one, range(len(formatted)), formatted, duplicates, doing="split"
        ):
            counts.update(shard_counts)
            nearest = max(nearest, match, key=lambda match: match[0])

        dropped = counts["near_duplicates"] if params.drop_near_duplicates else 0
        num_written = sum(counts[name] for name in SPLITS)
        assert counts["rows_in"] == counts["duplicates"] + dropped + num_written, "a row vanished"  # noqa: S101
        for name in SPLITS:
            if counts[name] == 0:
                raise UserError(_empty_split(name, counts["rows_in"] - counts["duplicates"], dropped, params))

    names = ("rows_in", "duplicates", "near_duplicates", *SPLITS)
    write_json(Path("metrics/split.json"), {name: counts[name] for name in names})
    listed = ", ".join(f"{counts[name]:,} {name}" for name in SPLITS)
    near = f"{counts['near_duplicates']:,} of train are nearly in test"
    if counts["near_duplicates"]:
        near += ", dropped" if params.drop_near_duplicates else ", kept"
        near += f"; nearest: {nearest[1]}, similarity {nearest[0]:.2f}"
    summary(
        {
            "examples": f"{counts['rows_in']:,} → {listed}; {counts['duplicates']:,} duplicates dropped",
            "near-duplicates": near,
        },
        wrote=[*(f"data/{name}.parquet" for name in SPLITS), "metrics/split.json"],
        then="dvc repro",
    )


def look_ahead(params: SplitParams, formatted: list[Path]) -> list[npt.NDArray[np.int64]]:
    """Of each shard the rows that are equal to an earlier one. On the way the prompts of test are indexed.

    Memory: 16 bytes a row, and some 60 while they are sorted.
    """
    ids: list[npt.NDArray[np.uint64]] = []

    def test_prompts() -> Iterator[pa.Table]:
        for shard_ids, prompts in map_processes(partial(look_into, params), formatted, doing="look ahead"):
            ids.append(shard_ids)
            yield prompts

    NearDuplicates.build(INDEX, test_prompts(), TEST_PROMPTS)
    all_ids = np.concatenate(ids)
    order = np.lexsort(all_ids.T)  # stable: of equal ids the first row stays first
    ordered = all_ids[order]
    repeats = np.zeros(len(order), bool)
    repeats[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    ends = np.cumsum([len(part) for part in ids])
    return [np.flatnonzero(part) for part in np.split(repeats, ends[:-1])]


def look_into(params: SplitParams, shard: Path) -> tuple[npt.NDArray[np.uint64], pa.Table]:
    """The example ids of a shard, uint64 (rows, 2), and the prompts that are in test, each once."""
    ids, prompts = [np.empty((0, 2), np.uint64)], [TEST_PROMPTS.empty_table()]
    for batch in read_batches(shard, ["example_id", "prompt_id", *TEST_PROMPTS.names]):
        digits = "".join(batch["example_id"].to_pylist())
        ids.append(np.frombuffer(bytes.fromhex(digits), np.uint64).reshape(-1, 2))
        in_test = [choose_split(prompt_id, params) == "test" for prompt_id in batch["prompt_id"].to_pylist()]
        prompts.append(batch.select(TEST_PROMPTS.names).filter(pa.array(in_test, pa.bool_())))
    # Equal prompts have equal keys in the index: they would take the places of others there.
    once = pa.concat_tables(prompts).group_by("prompt", use_threads=False)
    first = once.aggregate([(name, "first") for name in TEST_PROMPTS.names[1:]])
    return np.concatenate(ids), first.rename_columns(TEST_PROMPTS.names)


def split_shard(
    params: SplitParams, folders: dict[str, Path], number: int, shard: Path, duplicates: npt.NDArray[np.int64]
) -> tuple[Counter[str], tuple[float, str]]:
    """Write one shard of each split. What was counted, and the nearest pair of prompts."""
    near_test, duplicate = NearDuplicates(INDEX), set(duplicates.tolist())
    counts = Counter(duplicates=len(duplicate))
    nearest = (0.0, "")
    with ExitStack() as files:
        writers = {name: files.enter_context(shard_writer(folders[name], FORMATTED, number)) for name in SPLITS}
        for batch in read_batches(shard):
            members: dict[str, list[int]] = {name: [] for name in SPLITS}
            for row, prompt_id in enumerate(batch["prompt_id"].to_pylist()):
                if counts["rows_in"] + row not in duplicate:
                    members[choose_split(prompt_id, params)].append(row)
            counts["rows_in"] += len(batch)

            train = batch.select(TEST_PROMPTS.names).take(pa.array(members["train"], pa.int64()))
            matches = near_test.find(train["prompt"].to_pylist())
            for at, match in enumerate(matches):
                if match:
                    counts["near_duplicates"] += 1
                    if match[0] > nearest[0]:
                        places = _place(train, at), _place(near_test.prompts, match[1])
                        nearest = match[0], "{} in train to {} in test".format(*places)
            if params.drop_near_duplicates:
                pairs = zip(members["train"], matches, strict=True)
                members["train"] = [row for row, match in pairs if not match]
            for name, rows in members.items():
                writers[name].write(batch.take(pa.array(rows, pa.int64())))
        counts.update({name: writer.num_rows for name, writer in writers.items()})
    return counts, nearest


def _place(prompts: pa.Table, at: int) -> str:
    return f"{prompts['source'][at]}, row {prompts['source_row'][at].as_py():,}"


def choose_split(prompt_id: str, params: SplitParams) -> str:
    """The split of a prompt: where its seeded hash falls in [0, 1)."""
    digest = hashlib.sha256(f"{params.seed}:{prompt_id}".encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    if place < params.test_fraction:
        return "test"
    return "validation" if place < params.test_fraction + params.validation_fraction else "train"


def _empty_split(name: str, num_examples: int, num_dropped: int, params: SplitParams) -> str:
    found = f"the {name} split is empty: found {num_examples:,} examples, "
    found += f"{num_dropped:,} of them dropped as near-duplicates, " if num_dropped else ""
    found += f"validation_fraction = {params.validation_fraction}, test_fraction = {params.test_fraction}; "
    if name == "train" and num_dropped:
        return found + "set drop_near_duplicates: false, or bring more rows"
    if name == "train":
        return found + "lower validation_fraction or test_fraction, or bring more rows"
    return found + f"raise {name}_fraction, or bring more rows"


if __name__ == "__main__":
    run(main)
