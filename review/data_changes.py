"""Which rows were added, removed and edited between two revisions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from review.revisions import Revision
from stages.checks.near_duplicates import jaccard, shingles
from stages.templates.alpaca import ALPACA, ALPACA_WITH_INPUT

TEST = "data/test.parquet"
SPLITS = {"train": "data/train.parquet", "validation": "data/validation.parquet", "test": TEST}
SPLITS["retention"] = "data/retention.parquet"
COLUMNS = ["example_id", "prompt_id", "prompt", "response", "source", "slice"]
CHANGES = ["added", "removed", "edited", "moved"]
NUM_EXAMPLES = 5  # of each kind of change
MAX_NEW = 20_000  # so that a review of a large new dataset does not take minutes
TEMPLATE_LINES = {*ALPACA.splitlines(), *ALPACA_WITH_INPUT.splitlines()}
MIN_SIMILARITY = 0.2  # of a training prompt that is worth showing next to a test prompt


@dataclass(frozen=True)
class DataChanges:
    """The rows that differ between the revisions.

    rows: with `COLUMNS`, the split and the change, one of `CHANGES`; removed rows are from `before`.
        An edited row has a prompt that both revisions have, with another response. A moved row is in another split.
    is_known: False if a split of a revision is not available.
    """

    rows: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=[*COLUMNS, "split", "change"]))
    is_known: bool = True

    def counts(self, *by: str) -> pd.DataFrame:
        """The number of rows with each change, for each value of some columns."""
        table = self.rows.groupby([*by, "change"], dropna=False).size().unstack(fill_value=0)
        return table.reindex(columns=CHANGES, fill_value=0).reset_index()

    def examples(self, change: str) -> pd.DataFrame:
        """The first rows with a change."""
        return self.rows[self.rows["change"] == change].head(NUM_EXAMPLES)

    def nearest_new_prompts(self, prompts: Sequence[str]) -> list[str | None]:
        """For each prompt, the most similar one of the first `MAX_NEW` new training rows; None if none is similar."""
        is_new = (self.rows["split"] == "train") & (self.rows["change"] != "removed")
        new = [(shingles(without_template(prompt)), prompt) for prompt in self.rows[is_new]["prompt"].head(MAX_NEW)]

        def nearest(prompt: str) -> str | None:
            words = shingles(without_template(prompt))
            nearest = max(((jaccard(words, other), text) for other, text in new if words or other), default=(0.0, ""))
            return nearest[1] if nearest[0] >= MIN_SIMILARITY else None

        return [nearest(prompt) for prompt in prompts]


def changed_data(before: Revision, after: Revision, hashes: Sequence[Mapping[str, str]]) -> DataChanges:
    """The changes of all splits.

    Args:
        hashes: of the outputs in `dvc.lock`, so that equal data is not read.
    """
    if all(hashes[0].get(path) == hashes[1].get(path) for path in SPLITS.values()):
        return DataChanges()
    rows_of_sides = []
    for revision, side_hashes in zip((before, after), hashes, strict=True):
        # A revision that is older than the retention set does not have it.
        paths = {split: path for split, path in SPLITS.items() if split != "retention" or path in side_hashes}
        tables = {split: revision.read_table(path, COLUMNS) for split, path in paths.items()}
        if any(table is None for table in tables.values()):
            return DataChanges(is_known=False)
        rows = pd.concat([table.assign(split=split) for split, table in tables.items() if table is not None])
        rows_of_sides.append(rows.fillna("").drop_duplicates("example_id"))
    first, second = rows_of_sides
    removed = first[~first["example_id"].isin(second["example_id"])]
    added = second[~second["example_id"].isin(first["example_id"])]
    is_edited = (added["prompt_id"] != "") & added["prompt_id"].isin(removed["prompt_id"])
    removed = removed[~removed["prompt_id"].isin(added[is_edited]["prompt_id"])]
    added = added.assign(change=is_edited.map({True: "edited", False: "added"}))
    splits = second["example_id"].map(first.set_index("example_id")["split"])
    moved = second[splits.notna() & (splits != second["split"])].assign(change="moved")
    return DataChanges(
        pd.concat([added, moved, removed.assign(change="removed")]).reindex(columns=[*COLUMNS, "split", "change"])
    )


def without_template(prompt: str) -> str:
    """A prompt without the lines of Alpaca's template."""
    return "\n".join(line for line in prompt.splitlines() if line not in TEMPLATE_LINES)
