"""`data/formatted.parquet` → train, validation and test, without duplicates.

Membership depends on a seeded hash of the normalised prompt alone: added rows never move the old ones, and equal
prompts never lie in two splits.
"""

import hashlib
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa

from stages.shared.errors import UserError
from stages.shared.examples import FORMATTED
from stages.shared.files import parquet_writer, read_batches, write_json
from stages.shared.params import SplitParams, load_params
from stages.shared.run import run
from stages.shared.terminal import summary

SPLITS = ("train", "validation", "test")


def main() -> None:
    params = load_params(SplitParams)
    counts: Counter[str] = Counter()
    seen: set[str] = set()

    with ExitStack() as files:
        writers = {
            name: files.enter_context(parquet_writer(Path(f"data/{name}.parquet"), FORMATTED)) for name in SPLITS
        }
        for batch in read_batches(Path("data/formatted.parquet")):
            members: dict[str, list[int]] = {name: [] for name in SPLITS}
            ids = zip(batch["example_id"].to_pylist(), batch["prompt_id"].to_pylist(), strict=True)
            for row, (example_id, prompt_id) in enumerate(ids):
                counts["rows_in"] += 1
                if example_id in seen:
                    counts["duplicates"] += 1
                    continue
                seen.add(example_id)
                members[choose_split(prompt_id, params)].append(row)
            for name, rows in members.items():
                writers[name].write(batch.take(pa.array(rows, pa.int64())))

        sizes = {name: writers[name].num_rows for name in SPLITS}
        assert counts["rows_in"] == counts["duplicates"] + sum(sizes.values()), "a row vanished"  # noqa: S101
        for name, size in sizes.items():
            if size == 0:
                raise UserError(_empty_split(name, len(seen), params))

    write_json(Path("metrics/split.json"), {"rows_in": counts["rows_in"], "duplicates": counts["duplicates"], **sizes})
    listed = ", ".join(f"{size:,} {name}" for name, size in sizes.items())
    summary(
        {"examples": f"{counts['rows_in']:,} → {listed}; {counts['duplicates']:,} duplicates dropped"},
        wrote=[*(f"data/{name}.parquet" for name in SPLITS), "metrics/split.json"],
        then="dvc repro",
    )


def choose_split(prompt_id: str, params: SplitParams) -> str:
    """The split of a prompt: where its seeded hash falls in [0, 1)."""
    digest = hashlib.sha256(f"{params.seed}:{prompt_id}".encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    if place < params.test_fraction:
        return "test"
    return "validation" if place < params.test_fraction + params.validation_fraction else "train"


def _empty_split(name: str, num_examples: int, params: SplitParams) -> str:
    found = f"the {name} split is empty: found {num_examples:,} examples, validation_fraction = "
    found += f"{params.validation_fraction}, test_fraction = {params.test_fraction}; "
    if name == "train":
        return found + "lower validation_fraction or test_fraction, or bring more rows"
    return found + f"raise {name}_fraction, or bring more rows"


if __name__ == "__main__":
    run(main)
