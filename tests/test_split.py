"""Splits: the split of a row depends on its prompt and the seed, never on other rows."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages import split
from stages.data.examples import FORMATTED_SCHEMA
from stages.data.splits import choose_split, content_hash
from stages.data.tables import parquet_writer, write_parquet
from stages.runtime.errors import UserError
from stages.runtime.params import SplitFractions
from stages.score_rows import SCORES_SCHEMA
from tests.clone import edit

NOTHING_LEFT_OUT = {"left_out_by_fraction": 0, "dropped_by_score": 0}  # in the metrics
NO_LEAKAGE = NOTHING_LEFT_OUT | {
    "near_duplicates": 0,
    "retention_near_duplicates": 0,
    "equal_questions": 0,
    "leaked_rows_in_train": 0,
}
PARAMS = SplitFractions(validation_fraction=0.1, test_fraction=0.2, split_seed=42)


def formatted(
    name: str, prompt_id: str, question: str | None = None, source_row: int = 1, use: str | None = None, *later: str
) -> dict[str, Any]:
    """A row of `formatted.parquet`. Equal names and prompt ids give equal examples.

    later: user messages after the first one.
    """
    return {
        "example_id": content_hash(prompt_id, name),
        "prompt_id": prompt_id,
        "source": "a.jsonl",
        "source_row": source_row,
        "slice": "a.jsonl",
        "use": use,
        "prompt": f"Instruction: {question or prompt_id} Response:",
        "questions": [question or prompt_id, *later],
        "response": f"{prompt_id}-{name}",
        "input_ids": [1, 2],
        "labels": [-100, 2],
        "truncated": False,
    }


def run_split(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Run the stage on these formatted rows; returns the responses in each split."""
    with parquet_writer(Path("data/formatted.parquet"), FORMATTED_SCHEMA) as writer:
        writer.write(rows)
    split.main()
    names = ("train", "validation", "test")
    return {name: pq.read_table(f"data/{name}.parquet").column("response").to_pylist() for name in names}


def test_the_split_of_a_prompt_is_fixed() -> None:
    splits = [choose_split(prompt, PARAMS) for prompt in ("a", "b", "f", "1", "2", "3")]
    assert splits == ["train", "train", "validation", "test", "train", "train"]


def test_checks_and_other_columns_are_in_a_table_of_their_own(project: Path) -> None:
    rows = [formatted("x", str(n)) for n in range(60)] + [formatted("x", "kept", use="retention")]
    scored = [row | {"check": '{"number": 1}', "other_columns": '{"kind": "a"}'} for row in rows]
    run_split(scored)
    scoring = pq.read_table("data/scoring.parquet").to_pylist()
    names = pq.read_table("data/test.parquet")["example_id"].to_pylist()
    assert [row["example_id"] for row in scoring if row["split"] == "test"] == names
    assert scoring[-1] == {
        "split": "retention",
        "example_id": rows[-1]["example_id"],
        "check": '{"number": 1}',
        "other_columns": '{"kind": "a"}',
    }
    splits = [Path(f"data/{name}.parquet") for name in ("train", "validation", "test", "retention")]
    before = [path.read_bytes() for path in splits]
    run_split([row | {"check": '{"number": 2}'} for row in scored])
    assert [path.read_bytes() for path in splits] == before  # so nothing is trained or generated again


def test_training_examples_that_nearly_match_the_retention_set_are_counted(project: Path) -> None:
    text = "Name the largest planet of our solar system in one short sentence please"
    rows = [formatted("x", str(n), f"Question {n} about {n * n} things") for n in range(60)]
    rows += [formatted("x", "kept", text, use="retention"), formatted("x", "near", f"{text} now", use="train")]
    run_split(rows)
    metrics = json.loads(Path("metrics/split.json").read_text())
    assert metrics["retention"] == 1
    assert metrics.items() >= (NO_LEAKAGE | {"retention_near_duplicates": 1, "leaked_rows_in_train": 1}).items()
    edit(project, drop_near_duplicates="true")
    assert "near-x" not in run_split(rows)["train"]


def harbour(number: int) -> str:
    return f"Which harbour town did captain Morland number {number} sail from in spring?"


@pytest.mark.parametrize("conversations_in", ["train", "test", "retention"])
def test_questions_inside_conversations_are_found_and_dropped(project: Path, conversations_in: str) -> None:
    edit(project, test_fraction="0")
    single_use, use = ("test", "train") if conversations_in == "train" else ("train", conversations_in)
    rows = [formatted("x", f"single {n}", harbour(n), 1, single_use) for n in range(12)]
    rows += [formatted("x", f"talk {n}", f"Hello there. {n}", 1, use, harbour(n)) for n in range(12)]
    rows += [formatted("x", str(n), f"Which lake is {n} m deep?") for n in range(60)]
    rows += [formatted("x", "evaluated", "Name a tree.", use="test")]
    leaks = "retention_near_duplicates" if use == "retention" else "near_duplicates"
    for drop, remaining in (("false", 12), ("true", 0)):
        edit(project, drop_near_duplicates=drop)
        train = run_split(rows)["train"]
        found = {leaks: 12, "equal_questions": 12, "leaked_rows_in_train": remaining}
        assert json.loads(Path("metrics/split.json").read_text()).items() >= (NO_LEAKAGE | found).items()
        assert sum(row.startswith(("single", "talk")) for row in train) == remaining


def test_questions_inside_conversations_that_the_hash_puts_in_train_are_found(project: Path) -> None:
    edit(project, test_fraction="0.2", drop_near_duplicates="true")
    # "1" is in test, "f" in validation, the others in train.
    talks = [formatted("x", "a", "Hi", 1, None, harbour(1)), formatted("x", "b", "Hi", 1, None, harbour(2))]
    rows = [formatted("x", "1", harbour(1)), formatted("x", "f"), *talks]
    assert run_split(rows) == {"train": ["b-x"], "validation": ["f-x"], "test": ["1-x"]}


def test_equal_rows_are_found_although_all_of_their_words_are_common(project: Path) -> None:
    edit(project, test_fraction="0", drop_near_duplicates="true")
    sums = [f"What is {a} + {b}?" for a in range(1, 10) for b in range(1, 10)]
    rows = [formatted("x", text, text, 1, use) for text in sums for use in ("train", "test")]
    rows += [formatted("x", str(n), f"What is {n} + 10?") for n in range(20)]
    train = run_split(rows)["train"]
    found = {"near_duplicates": 81, "equal_questions": 81, "leaked_rows_in_train": 0}
    assert json.loads(Path("metrics/split.json").read_text()).items() >= (NO_LEAKAGE | found).items()
    assert train
    assert not set(train) & {f"{text}-x" for text in sums}


def test_the_sizes_of_the_splits_are_random_around_their_fractions() -> None:
    splits = [choose_split(str(i), PARAMS) for i in range(20_000)]
    assert splits.count("test") == pytest.approx(4000, abs=250)
    assert splits.count("validation") == pytest.approx(2000, abs=200)


def test_another_seed_gives_another_split() -> None:
    other = PARAMS.model_copy(update={"split_seed": 43})
    prompts = [str(i) for i in range(200)]
    assert [choose_split(p, PARAMS) for p in prompts] != [choose_split(p, other) for p in prompts]


@given(prompt=st.text(), larger=st.floats(0.2, 0.8))
def test_a_larger_test_fraction_keeps_all_prompts_of_the_test_split(prompt: str, larger: float) -> None:
    params = PARAMS.model_copy(update={"test_fraction": larger})
    if choose_split(prompt, PARAMS) == "test":
        assert choose_split(prompt, params) == "test"


def test_added_rows_never_move_existing_ones(project: Path) -> None:
    existing = [formatted("x", f"prompt {i}") for i in range(100)]
    before = run_split(existing)
    after = run_split([formatted("x", f"new {i}") for i in range(50)] + existing)
    for name in before:
        assert [row for row in after[name] if row.startswith("prompt")] == before[name]


def test_equal_prompts_are_in_one_split_and_equal_examples_are_kept_once(project: Path) -> None:
    rows = [formatted(answer, f"prompt {i}") for i in range(60) for answer in ("x", "y", "x")]
    splits = run_split(rows)
    prompts = {name: {row.rsplit("-")[0] for row in splits[name]} for name in splits}
    assert prompts["train"] | prompts["validation"] | prompts["test"] == {f"prompt {i}" for i in range(60)}
    assert len(prompts["train"]) + len(prompts["validation"]) + len(prompts["test"]) == 60
    metrics = json.loads(Path("metrics/split.json").read_text())
    counts = {"rows_in": 180, "duplicates": 60, "retention": 0}
    assert metrics == counts | NO_LEAKAGE | {name: len(splits[name]) for name in splits}
    assert sum(map(len, splits.values())) == 120


def test_rows_of_a_dataset_with_a_use_are_in_that_split_for_any_data_and_seed(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [formatted("x", f"test {i}", use="test") for i in range(4)]
    own += [formatted("x", "own validation", use="validation"), formatted("x", "1", use="train")]
    equal = formatted("x", "test 2", source_row=7)  # it is not a duplicate, because it is in another split
    for seed, others in ((1, [formatted("x", f"prompt {i}") for i in range(9)]), (2, [])):
        edit(project, test_fraction="0", validation_fraction="0", split_seed=str(seed))
        splits = run_split([equal, *others, *own, own[0]])
        assert splits["test"] == ["test 0-x", "test 1-x", "test 2-x", "test 3-x"]
        assert splits["validation"] == ["own validation-x"]
        assert splits["train"] == ["test 2-x", *(row["response"] for row in others), "1-x"]
        metrics = json.loads(Path("metrics/split.json").read_text())
        assert (metrics["duplicates"], metrics["near_duplicates"]) == (1, 1)
    assert "nearest: a.jsonl, row 7 in train to a.jsonl, row 1 in test, similarity 1.00" in capsys.readouterr().out
    edit(project, drop_near_duplicates="true")
    assert run_split([equal, *own])["train"] == ["1-x"]


def test_the_error_of_an_empty_split_names_the_fraction_to_change(project: Path) -> None:
    edit(project, validation_fraction="0.001")
    with pytest.raises(UserError) as error:
        run_split([formatted("x", f"prompt {i}") for i in range(30)])
    assert str(error.value) == (
        "the validation split is empty: found 30 examples, validation_fraction = 0.001, test_fraction = 0.1; "
        "raise validation_fraction, or list a dataset with `use: validation`, or add rows to the dataset"
    )
    assert sorted(path.name for path in Path("data").iterdir()) == [
        "formatted.parquet",
        "retention.jsonl",
        "template.jinja",
    ]


# Prompt id "1" is in test, "f" in validation and the others in train: see `test_the_split_of_a_prompt_is_fixed`.
LEAKY = [
    formatted("x", "a", "Name three tall trees that grow in Norway.", 11),
    formatted("x", "1", "name three tall trees, that grow in Norway!", 12),
    formatted("x", "b", "How deep is the Baltic Sea at its deepest place?", 13),
    formatted("x", "f", "Name three tall trees that grow in Norway;", 14),
    formatted("x", "a", "Name three tall trees that grow in Norway.", 15),
]
LEAKY_COUNTS = {"rows_in": 5, "duplicates": 1, "validation": 1, "test": 1, "retention": 0}


def test_training_examples_with_a_test_question_are_counted_and_the_nearest_is_named(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(project, test_fraction="0.2")
    assert run_split(LEAKY) == {"train": ["a-x", "b-x"], "validation": ["f-x"], "test": ["1-x"]}
    found = {"near_duplicates": 1, "equal_questions": 1, "leaked_rows_in_train": 1, "train": 2}
    assert json.loads(Path("metrics/split.json").read_text()) == LEAKY_COUNTS | NO_LEAKAGE | found
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "training examples with a question of the test split: 1, of the retention set: 0; 1 of them equal; "
        "nearest: a.jsonl, row 11 in train to a.jsonl, row 12 in test, similarity 1.00; "
        "still in train: 1; to drop them, set drop_near_duplicates: true"
    ) in printed


def test_near_duplicates_are_dropped_from_train_only(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(project, test_fraction="0.2", drop_near_duplicates="true")
    assert run_split(LEAKY) == {"train": ["b-x"], "validation": ["f-x"], "test": ["1-x"]}
    found = {"near_duplicates": 1, "equal_questions": 1, "train": 1}
    assert json.loads(Path("metrics/split.json").read_text()) == LEAKY_COUNTS | NO_LEAKAGE | found
    assert "similarity 1.00; all dropped" in " ".join(capsys.readouterr().out.split())


def test_the_error_of_a_train_split_with_only_near_duplicates_names_the_parameter_that_keeps_them(
    project: Path,
) -> None:
    edit(project, test_fraction="0.2", drop_near_duplicates="true")
    with pytest.raises(UserError) as error:
        run_split([row for row in LEAKY if row["prompt_id"] != "b"])
    assert str(error.value) == (
        "the train split is empty: found 3 examples, 1 of them dropped as near-duplicates, validation_fraction = 0.1, "
        "test_fraction = 0.2; set drop_near_duplicates: false, or list a dataset with `use: train`, or add rows to the "
        "dataset"
    )


# Different texts from few words, so that many are near-duplicates of each other.
TEXTS = st.tuples(
    st.lists(st.sampled_from(["oak", "elm", "fir", "ash"]), min_size=1, max_size=4).map(" ".join),
    st.sampled_from(["", "!", "?", " ,"]),
).map("".join)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=st.lists(TEXTS, min_size=20, max_size=40, unique=True), data=st.data())
def test_dropping_affects_only_train_and_does_not_depend_on_the_order_of_rows(
    project: Path, prompts: list[str], data: st.DataObject
) -> None:
    rows = [formatted("x", prompt, prompt) for prompt in prompts]
    others = [formatted("x", prompt_id, "a separate prompt: " + prompt_id) for prompt_id in ("a", "f", "1")]
    edit(project, test_fraction="0.2", drop_near_duplicates="false")
    kept = run_split(rows + others)
    num_near = json.loads(Path("metrics/split.json").read_text())["near_duplicates"]
    edit(project, drop_near_duplicates="true")
    dropped = run_split(rows + others)
    shuffled = run_split(data.draw(st.permutations(rows)) + others)
    assert (dropped["validation"], dropped["test"]) == (kept["validation"], kept["test"])
    assert set(dropped["train"]) <= set(kept["train"])
    assert len(dropped["train"]) == len(kept["train"]) - num_near
    assert {name: sorted(rows) for name, rows in shuffled.items()} == {
        name: sorted(rows) for name, rows in dropped.items()
    }


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4), data=st.data())
def test_a_row_that_repeats_an_earlier_one_is_found_in_any_shard(
    project: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], data: st.DataObject
) -> None:
    monkeypatch.setattr(split, "map_processes", lambda function, *arguments, desc: map(function, *arguments))
    names = data.draw(st.lists(st.sampled_from("abcd"), min_size=sum(sizes), max_size=sum(sizes)))
    paths, expected, start = [], [], 0
    for number, size in enumerate(sizes):
        rows = [formatted(name, "p") for name in names[start : start + size]]
        paths.append(project / f"{number}.parquet")
        pq.write_table(pa.Table.from_pylist(rows, FORMATTED_SCHEMA), paths[-1])
        expected.append([at for at in range(size) if names[start + at] in names[: start + at]])
        start += size
    assert [part.tolist() for part in split.scan_shards(PARAMS, paths)] == expected


def test_ids_with_the_same_beginning_or_end_are_not_duplicates(project: Path) -> None:
    rows = [formatted("x", f"prompt {i}") for i in range(60)]
    for example_id in ("0" * 32, "0" * 16 + "1" * 16, "1" * 16 + "0" * 16):
        rows += [formatted("y", "a") | {"example_id": example_id}] * 2
    assert sum(map(len, run_split(rows).values())) == 63


def write_scores(rows: list[dict[str, Any]], pmi: list[float | None]) -> None:
    scores = [{**row, "pmi": value} for row, value in zip(rows, pmi, strict=True)]
    write_parquet(Path("data/train_scores.parquet"), scores, SCORES_SCHEMA)


def test_a_smaller_train_fraction_takes_a_part_of_a_larger_one_and_leaves_the_other_splits_alone(project: Path) -> None:
    rows = [formatted("x", str(n)) for n in range(200)] + [formatted("x", f"own {n}", use="train") for n in range(50)]
    found = {}
    for fraction in ("1.0", "0.5", "0.25", "0.125"):
        edit(project, train_fraction=fraction)
        found[fraction] = run_split(rows)
        metrics = json.loads(Path("metrics/split.json").read_text())
        assert metrics["left_out_by_fraction"] == len(found["1.0"]["train"]) - metrics["train"]
        assert found[fraction]["test"] == found["1.0"]["test"]
        assert found[fraction]["validation"] == found["1.0"]["validation"]
    half, quarter, eighth = (found[fraction]["train"] for fraction in ("0.5", "0.25", "0.125"))
    assert [row for row in found["1.0"]["train"] if row in half] == half
    assert [row for row in half if row in quarter] == quarter
    assert [row for row in quarter if row in eighth] == eighth
    assert [len(half), len(quarter), len(eighth)] == [103, 46, 21]


def test_the_training_rows_with_the_lowest_pmi_are_dropped(project: Path) -> None:
    rows = [formatted("x", str(n)) for n in range(60)]
    everything = run_split(rows)
    train = [row for row in rows if row["response"] in everything["train"]]
    write_scores(train, [5.0, None, -3.0, -4.0] + [7.0] * (len(train) - 4))
    edit(project, score_rows="true", drop_worst_fraction=str(2 / (len(train) - 1)))
    assert run_split(rows) == everything | {
        "train": [row for row in everything["train"] if row not in (train[2]["response"], train[3]["response"])]
    }
    assert json.loads(Path("metrics/split.json").read_text())["dropped_by_score"] == 2


def test_rows_of_validation_and_test_are_never_dropped_by_a_score(project: Path) -> None:
    rows = [formatted("x", str(n)) for n in range(60)]
    everything = run_split(rows)
    write_scores(rows, [float(row["response"] in everything["train"]) for row in rows])  # the others are worse
    edit(project, score_rows="true", drop_worst_fraction="0.1")
    assert run_split(rows) == everything


def test_the_error_of_a_selection_that_leaves_nothing_names_its_parameters(project: Path) -> None:
    edit(project, train_fraction="0.000001")
    with pytest.raises(UserError) as error:
        run_split([formatted("x", str(n)) for n in range(60)])
    assert str(error.value) == (
        "the train split is empty: found 60 examples, 48 left out by train_fraction or their score, "
        "validation_fraction = 0.1, test_fraction = 0.1; raise train_fraction or lower drop_worst_fraction, or list a "
        "dataset with `use: train`, or add rows to the dataset"
    )


def test_rows_of_plain_text_cannot_be_selected_by_their_scores(project: Path) -> None:
    rows = [formatted("x", str(n)) for n in range(60)]
    write_scores(rows, [None] * 60)
    edit(project, score_rows="true", drop_worst_fraction="0.1")
    with pytest.raises(UserError, match="drop_worst_fraction: found rows of plain text only, which have no PMI; must"):
        run_split(rows)
