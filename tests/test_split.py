"""Splits by content: who goes where never depends on who else is there."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages import split
from stages.format import content_hash
from stages.shared.errors import UserError
from stages.shared.examples import FORMATTED
from stages.shared.files import parquet_writer
from stages.shared.params import SplitParams
from tests.test_params import edit

PARAMS = SplitParams(validation_fraction=0.1, test_fraction=0.2, drop_near_duplicates=False, seed=42)


def formatted(name: str, prompt_id: str, prompt: str | None = None, source_row: int = 1) -> dict[str, Any]:
    return {
        "example_id": content_hash(prompt_id, name),
        "prompt_id": prompt_id,
        "source": "a.jsonl",
        "source_row": source_row,
        "prompt": prompt or prompt_id,
        "response": f"{prompt_id}-{name}",
        "input_ids": [1, 2],
        "labels": [-100, 2],
        "truncated": False,
    }


def run_split(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    with parquet_writer(Path("data/formatted.parquet"), FORMATTED) as writer:
        writer.write(rows)
    split.main()
    names = ("train", "validation", "test")
    return {name: pq.read_table(f"data/{name}.parquet").column("response").to_pylist() for name in names}


def test_the_place_of_a_prompt_is_fixed() -> None:
    places = [split.choose_split(prompt, PARAMS) for prompt in ("a", "b", "f", "1", "2", "3")]
    assert places == ["train", "train", "validation", "test", "train", "train"]


def test_fractions_are_kept_to_chance() -> None:
    places = [split.choose_split(str(i), PARAMS) for i in range(20_000)]
    assert places.count("test") == pytest.approx(4000, abs=250)
    assert places.count("validation") == pytest.approx(2000, abs=200)


def test_another_seed_is_another_split() -> None:
    other = PARAMS.model_copy(update={"seed": 43})
    prompts = [str(i) for i in range(200)]
    assert [split.choose_split(p, PARAMS) for p in prompts] != [split.choose_split(p, other) for p in prompts]


@given(prompt=st.text(), larger=st.floats(0.2, 0.8))
def test_a_larger_test_split_takes_from_the_others_and_gives_nothing_up(prompt: str, larger: float) -> None:
    grown = PARAMS.model_copy(update={"test_fraction": larger})
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
    counts = {"rows_in": 180, "duplicates": 60, "near_duplicates": 0}
    assert metrics == counts | {name: len(splits[name]) for name in splits}
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


# By the hash of `test_the_place_of_a_prompt_is_fixed`: "1" lies in test, "f" in validation, the others in train.
LEAKY = [
    formatted("x", "a", "Instruction: Name three tall trees that grow in Norway. Response:", 11),
    formatted("x", "1", "Instruction: name three tall trees, that grow in Norway! Response:", 12),
    formatted("x", "b", "Instruction: How deep is the Baltic Sea at its deepest place? Response:", 13),
    formatted("x", "f", "Instruction: Name three tall trees that grow in Norway; Response:", 14),
    formatted("x", "a", "Instruction: Name three tall trees that grow in Norway. Response:", 15),
]


def test_training_examples_that_are_nearly_in_test_are_counted_and_named(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(project, test_fraction="0.2")
    assert run_split(LEAKY) == {"train": ["a-x", "b-x"], "validation": ["f-x"], "test": ["1-x"]}
    counts = {"rows_in": 5, "duplicates": 1, "near_duplicates": 1, "train": 2, "validation": 1, "test": 1}
    assert json.loads(Path("metrics/split.json").read_text()) == counts
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of train are nearly in test, kept; nearest: a.jsonl, row 11 in train to a.jsonl, row 12 in" in printed
    assert "in test, similarity 1.00" in printed


def test_near_duplicates_are_dropped_from_train_alone(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(project, test_fraction="0.2", drop_near_duplicates="true")
    assert run_split(LEAKY) == {"train": ["b-x"], "validation": ["f-x"], "test": ["1-x"]}
    counts = {"rows_in": 5, "duplicates": 1, "near_duplicates": 1, "train": 1, "validation": 1, "test": 1}
    assert json.loads(Path("metrics/split.json").read_text()) == counts
    assert "1 of train are nearly in test, dropped" in capsys.readouterr().out


def test_a_train_split_of_near_duplicates_alone_says_what_emptied_it(project: Path) -> None:
    edit(project, test_fraction="0.2", drop_near_duplicates="true")
    with pytest.raises(UserError) as error:
        run_split([row for row in LEAKY if row["prompt_id"] != "b"])
    assert str(error.value) == (
        "the train split is empty: found 3 examples, 1 of them dropped as near-duplicates, validation_fraction = 0.1, "
        "test_fraction = 0.2; set drop_near_duplicates: false, or bring more rows"
    )


# Texts that differ, of few words: many are near-duplicates of each other.
TEXTS = st.tuples(
    st.lists(st.sampled_from(["oak", "elm", "fir", "ash"]), min_size=1, max_size=4).map(" ".join),
    st.sampled_from(["", "!", "?", " ,"]),
).map("".join)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=st.lists(TEXTS, min_size=20, max_size=40, unique=True), data=st.data())
def test_dropping_is_of_train_alone_and_whatever_the_order_of_rows(
    project: Path, prompts: list[str], data: st.DataObject
) -> None:
    rows = [formatted("x", prompt, prompt) for prompt in prompts]
    edges = [formatted("x", prompt_id, "a prompt of its own: " + prompt_id) for prompt_id in ("a", "f", "1")]
    edit(project, test_fraction="0.2", drop_near_duplicates="false")
    kept = run_split(rows + edges)
    num_near = json.loads(Path("metrics/split.json").read_text())["near_duplicates"]
    edit(project, drop_near_duplicates="true")
    dropped = run_split(rows + edges)
    shuffled = run_split(data.draw(st.permutations(rows)) + edges)
    assert (dropped["validation"], dropped["test"]) == (kept["validation"], kept["test"])
    assert set(dropped["train"]) <= set(kept["train"])
    assert len(dropped["train"]) == len(kept["train"]) - num_near
    assert {name: sorted(rows) for name, rows in shuffled.items()} == {
        name: sorted(rows) for name, rows in dropped.items()
    }


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4), data=st.data())
def test_a_row_that_an_earlier_one_equals_is_found_in_whatever_shard_that_lies(
    project: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], data: st.DataObject
) -> None:
    monkeypatch.setattr(split, "map_processes", lambda function, *arguments, doing: map(function, *arguments))
    names = data.draw(st.lists(st.sampled_from("abcd"), min_size=sum(sizes), max_size=sum(sizes)))
    paths, expected, start = [], [], 0
    for number, size in enumerate(sizes):
        rows = [formatted(name, "p") for name in names[start : start + size]]
        paths.append(project / f"{number}.parquet")
        pq.write_table(pa.Table.from_pylist(rows, FORMATTED), paths[-1])
        expected.append([at for at in range(size) if names[start + at] in names[: start + at]])
        start += size
    assert [part.tolist() for part in split.look_ahead(PARAMS, paths)] == expected


def test_ids_that_begin_or_end_alike_are_not_duplicates(project: Path) -> None:
    rows = [formatted("x", f"prompt {i}") for i in range(60)]
    for example_id in ("0" * 32, "0" * 16 + "1" * 16, "1" * 16 + "0" * 16):
        rows += [formatted("y", "a") | {"example_id": example_id}] * 2
    assert sum(map(len, run_split(rows).values())) == 63
