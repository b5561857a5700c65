"""Which rows changed between two revisions."""

from dataclasses import dataclass, field

import pandas as pd

from review.data_changes import SPLITS, DataChanges, changed_data
from review.report import data_tables
from stages.templates.alpaca import render_alpaca


@dataclass
class Splits:
    """A revision with rows (example, prompt, response, slice) in its splits; None if a split is not available."""

    rows: dict[str, list[tuple[str, str, str, str]] | None] = field(default_factory=dict)

    def read_table(self, path: str, columns: list[str]) -> pd.DataFrame | None:
        split = next(name for name, own in SPLITS.items() if own == path)
        rows = self.rows.get(split, [])
        if rows is None:
            return None
        values = [[example, prompt, prompt, response, "a.jsonl", slice_] for example, prompt, response, slice_ in rows]
        return pd.DataFrame(values, columns=columns)


HASHES = [dict.fromkeys(SPLITS.values(), "old"), dict.fromkeys(SPLITS.values(), "new")]
RED, BLUE = ("1", "Name a warm color.", "Red.", "colors"), ("2", "Name a cold color.", "Blue.", "colors")
GREEN = ("3", "Name a cold color.", "Green.", "colors")
SUM = ("4", "Add two and two.", "Four.", "math")


def changes(before: Splits, after: Splits) -> DataChanges:
    return changed_data(before, after, HASHES)  # type: ignore[arg-type]


def test_rows_are_added_removed_and_edited() -> None:
    found = changes(Splits({"train": [RED, BLUE]}), Splits({"train": [GREEN], "test": [SUM]}))
    listed = found.rows[["prompt", "response", "split", "change"]].to_numpy().tolist()
    assert listed == [
        ["Name a cold color.", "Green.", "train", "edited"],
        ["Add two and two.", "Four.", "test", "added"],
        ["Name a warm color.", "Red.", "train", "removed"],
    ]
    assert found.counts("split").to_numpy().tolist() == [["test", 1, 0, 0, 0], ["train", 0, 1, 1, 0]]
    assert found.counts("source", "slice").to_numpy().tolist() == [
        ["a.jsonl", "colors", 0, 1, 1, 0],
        ["a.jsonl", "math", 1, 0, 0, 0],
    ]


def test_row_that_moves_to_another_split_is_moved() -> None:
    found = changes(Splits({"train": [RED, BLUE]}), Splits({"train": [RED], "test": [BLUE]}))
    assert found.rows[["example_id", "split", "change"]].to_numpy().tolist() == [["2", "test", "moved"]]


def test_rows_of_the_retention_set_count_also_if_a_revision_is_older_than_it() -> None:
    older = {path: "old" for path in SPLITS.values() if "retention" not in path}
    found = changed_data(Splits(), Splits({"retention": [SUM]}), [older, HASHES[1]])  # type: ignore[arg-type]
    assert found.rows[["example_id", "split", "change"]].to_numpy().tolist() == [["4", "retention", "added"]]


def test_tables_show_five_examples_of_each_change() -> None:
    rows = [(str(n), f"Say {n}.", f"{n}.", "numbers") for n in range(7)]
    by_split, by_origin, examples = data_tables(changes(Splits(), Splits({"train": rows})))
    assert "| `train` | 7 | 0 | 0 | 0 |" in by_split
    assert "| `a.jsonl` | `numbers` | 7 | 0 | 0 | 0 |" in by_origin
    assert examples.count("| added | train |") == 5


def test_nearest_new_training_row_is_found() -> None:
    found = changes(Splits({"train": [BLUE]}), Splits({"train": [BLUE, RED, SUM], "test": [GREEN]}))
    assert found.nearest_new_prompts(["Name a very warm color.", "Who wrote Faust?"]) == ["Name a warm color.", None]
    # The template does not count.
    rendered = changes(Splits(), Splits({"train": [("1", render_alpaca("Name a warm color."), "Red.", "colors")]}))
    assert rendered.nearest_new_prompts([render_alpaca("Who wrote Faust?")]) == [None]


def test_equal_data_is_not_read_and_missing_data_is_reported() -> None:
    assert changed_data(Splits({"train": None}), Splits(), [HASHES[0]] * 2).rows.empty  # type: ignore[arg-type]
    unknown = changes(Splits({"train": None}), Splits())
    assert data_tables(unknown) == ["The data of a revision is not available, so its changes are not known."]
