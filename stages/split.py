"""`data/formatted.parquet` → train, validation and test, without duplicates.

Membership depends on a seeded hash of the normalised prompt alone: added rows never move the old ones, and equal
prompts never lie in two splits. Prompts that are nearly equal may: those of train are counted, and left out on demand.

The rows are read twice: what is in test must be known before the first row of train is written.
"""

import hashlib
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.shared.errors import UserError
from stages.shared.examples import FORMATTED
from stages.shared.files import parquet_writer, read_batches, write_json
from stages.shared.near_duplicates import NearDuplicates
from stages.shared.params import SplitParams, load_params
from stages.shared.run import run
from stages.shared.terminal import summary

FORMATTED_FILE = Path("data/formatted.parquet")
SPLITS = ("train", "validation", "test")


def main() -> None:
    params = load_params(SplitParams)
    repeated, test = look_ahead(params)
    near_test = NearDuplicates(list(test))
    test_rows = list(test.values())
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    nearest = (0.0, 0, 0)  # similarity, source rows in train and in test

    with ExitStack() as files:
        writers = {
            name: files.enter_context(parquet_writer(Path(f"data/{name}.parquet"), FORMATTED)) for name in SPLITS
        }
        for batch in read_batches(FORMATTED_FILE):
            members: dict[str, list[int]] = {name: [] for name in SPLITS}
            ids = zip(batch["example_id"].to_pylist(), batch["prompt_id"].to_pylist(), strict=True)
            for row, (example_id, prompt_id) in enumerate(ids):
                counts["rows_in"] += 1
                if hash(example_id) in repeated:
                    if example_id in seen:
                        counts["duplicates"] += 1
                        continue
                    seen.add(example_id)
                members[choose_split(prompt_id, params)].append(row)

            train = batch.select(["source_row", "prompt"]).take(pa.array(members["train"], pa.int64())).to_pydict()
            matches = near_test.find(train["prompt"])
            for source_row, match in zip(train["source_row"], matches, strict=True):
                if match:
                    counts["near_duplicates"] += 1
                    nearest = max(nearest, (match[0], source_row, test_rows[match[1]]), key=lambda pair: pair[0])
            if params.drop_near_duplicates:
                pairs = zip(members["train"], matches, strict=True)
                members["train"] = [row for row, match in pairs if not match]
            for name, rows in members.items():
                writers[name].write(batch.take(pa.array(rows, pa.int64())))

        sizes = {name: writers[name].num_rows for name in SPLITS}
        dropped = counts["near_duplicates"] if params.drop_near_duplicates else 0
        assert counts["rows_in"] == counts["duplicates"] + dropped + sum(sizes.values()), "a row vanished"  # noqa: S101
        for name, size in sizes.items():
            if size == 0:
                raise UserError(_empty_split(name, counts["rows_in"] - counts["duplicates"], dropped, params))

    metrics = {name: counts[name] for name in ("rows_in", "duplicates", "near_duplicates")}
    write_json(Path("metrics/split.json"), {**metrics, **sizes})
    listed = ", ".join(f"{size:,} {name}" for name, size in sizes.items())
    near = f"{counts['near_duplicates']:,} of train are nearly in test"
    if counts["near_duplicates"]:
        near += ", dropped" if params.drop_near_duplicates else ", kept"
        near += "; nearest: row {1} in train to row {2} in test, similarity {0:.2f}".format(*nearest)
    summary(
        {
            "examples": f"{counts['rows_in']:,} → {listed}; {counts['duplicates']:,} duplicates dropped",
            "near-duplicates": near,
        },
        wrote=[*(f"data/{name}.parquet" for name in SPLITS), "metrics/split.json"],
        then="dvc repro",
    )


def look_ahead(params: SplitParams) -> tuple[set[int], dict[str, int]]:
    """Hashes of example ids that occur more than once, and the prompts of test, each with the first row that has it.

    An id costs 16 bytes here, and nothing later unless it is repeated: a set of all of them would cost more than 110.
    """
    hashes: list[npt.NDArray[np.int64]] = []
    test: dict[str, int] = {}
    for batch in read_batches(FORMATTED_FILE, ["example_id", "prompt_id", "source_row", "prompt"]):
        hashes.append(np.array([hash(example_id) for example_id in batch["example_id"].to_pylist()], np.int64))
        places = [choose_split(prompt_id, params) == "test" for prompt_id in batch["prompt_id"].to_pylist()]
        rows = batch.filter(pa.array(places, pa.bool_()))
        for prompt, source_row in zip(rows["prompt"].to_pylist(), rows["source_row"].to_pylist(), strict=True):
            test.setdefault(prompt, source_row)
    ordered = np.concatenate(hashes) if hashes else np.empty(0, np.int64)
    ordered.sort()
    return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist()), test


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
