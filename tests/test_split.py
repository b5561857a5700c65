"""Splits by content: who goes where never depends on who else is there."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import split
from stages.shared.errors import UserError
from stages.shared.examples import FORMATTED
from stages.shared.files import parquet_writer
from stages.shared.params import SplitParams
from tests.test_params import edit

PARAMS = SplitParams(validation_fraction=0.1, test_fraction=0.2, seed=42)


def formatted(name: str, prompt_id: str, example_id: str | None = None) -> dict[str, Any]:
    return {
        "example_id": example_id or f"{prompt_id}-{name}",
        "prompt_id": prompt_id,
        "source_row": 1,
        "prompt": "p",
        "response": "r",
        "input_ids": [1, 2],
        "labels": [-100, 2],
        "truncated": False,
    }


def run_split(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    with parquet_writer(Path("data/formatted.parquet"), FORMATTED) as writer:
        writer.write(rows)
    split.main()
    names = ("train", "validation", "test")
    return {name: pq.read_table(f"data/{name}.parquet").column("example_id").to_pylist() for name in names}


def test_the_place_of_a_prompt_is_fixed() -> None:
    places = [split.choose_split(prompt, PARAMS) for prompt in ("a", "b", "f", "1", "2", "3")]
    assert places == ["train", "train", "validation", "test", "train", "train"]


def test_fractions_are_kept_to_chance() -> None:
    places = [split.choose_split(str(i), PARAMS) for i in range(20_000)]
    assert places.count("test") == pytest.approx(4000, abs=250)
    assert places.count("validation") == pytest.approx(2000, abs=200)


def test_another_seed_is_another_split() -> None:
    other = SplitParams(validation_fraction=0.1, test_fraction=0.2, seed=43)
    prompts = [str(i) for i in range(200)]
    assert [split.choose_split(p, PARAMS) for p in prompts] != [split.choose_split(p, other) for p in prompts]


@given(prompt=st.text(), larger=st.floats(0.2, 0.8))
def test_a_larger_test_split_takes_from_the_others_and_gives_nothing_up(prompt: str, larger: float) -> None:
    grown = SplitParams(validation_fraction=0.1, test_fraction=larger, seed=42)
    if split.choose_split(prompt, PARAMS) == "test":
        assert split.choose_split(prompt, grown) == "test"


def test_added_rows_never_move_the_old_ones(project: Path) -> None:
    old = [formatted("x", f"prompt {i}") for i in range(100)]
    before = run_split(old)
    after = run_split([formatted("x", f"new {i}") for i in range(50)] + old)
    for name in before:
        assert [row for row in after[name] if row.startswith("prompt")] == before[name]


def test_equal_prompts_lie_in_one_split_and_equal_examples_once(project: Path) -> None:
    rows = [formatted(answer, f"prompt {i}") for i in range(60) for answer in ("x", "y", "x")]
    splits = run_split(rows)
    prompts = {name: {row.rsplit("-")[0] for row in splits[name]} for name in splits}
    assert prompts["train"] | prompts["validation"] | prompts["test"] == {f"prompt {i}" for i in range(60)}
    assert len(prompts["train"]) + len(prompts["validation"]) + len(prompts["test"]) == 60
    metrics = json.loads(Path("metrics/split.json").read_text())
    assert metrics == {"rows_in": 180, "duplicates": 60, **{name: len(splits[name]) for name in splits}}
    assert sum(map(len, splits.values())) == 120


def test_an_empty_split_names_the_fraction_to_change(project: Path) -> None:
    edit(project, validation_fraction="0.001")
    with pytest.raises(UserError) as error:
        run_split([formatted("x", f"prompt {i}") for i in range(30)])
    assert str(error.value) == (
        "the validation split is empty: found 30 examples, validation_fraction = 0.001, test_fraction = 0.1; "
        "raise validation_fraction, or bring more rows"
    )
    assert [path.name for path in Path("data").iterdir()] == ["formatted.parquet"]
