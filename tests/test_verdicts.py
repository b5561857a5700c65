"""Verdicts on pairs of revisions whose true difference is known."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest

from review.runs import RevisionRuns, find_problem, find_runs
from review.verdicts import Results, compare_runs, describe_difference
from tests.conftest import predictions

NUM = 100
LOSSES = np.linspace(1, 3, NUM)
ALTERNATING = np.tile([0.5, -0.5], NUM // 2)  # differences of single examples
NOISE = {42: 0.0, 1: 0.03, 2: -0.03}  # of the test loss, by training seed
MARGINS = {"loss": 0.05}


def table(losses: Any = LOSSES, **columns: Any) -> pd.DataFrame:
    return predictions(losses, **columns).set_index("example_id")


def side(change: Any = 0.0, seeds: tuple[int, ...] = (42,), **columns: Any) -> RevisionRuns:
    """Runs of some seeds, whose losses differ from `LOSSES` by a change and by the noise of the seed."""
    return RevisionRuns(tables={seed: table(LOSSES + change + NOISE[seed], **columns) for seed in seeds})


def compared(before: RevisionRuns, after: RevisionRuns) -> Results:
    return compare_runs(before, after, ("main", "new"), MARGINS)


def verdict(before: RevisionRuns, after: RevisionRuns, name: str = "loss") -> str:
    return next(result.verdict for result in compared(before, after).metrics if result.metric.name == name)


ALL = (42, 1, 2)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (side(seeds=ALL), side(-0.2 + ALTERNATING * 0.3, ALL), "better"),
        (side(-0.2 + ALTERNATING * 0.3, ALL), side(seeds=ALL), "worse"),
        (side(seeds=ALL), side(-0.005 + ALTERNATING * 0.01, ALL), "better"),  # runs of the same seed are paired
        (side(seeds=ALL), side(ALTERNATING * 0.02, ALL), "equivalent"),  # within ±0.05
        (side(seeds=ALL), side(ALTERNATING, ALL), "undecided"),  # the interval is wider than ±0.05
        (side(), side(-0.2 + ALTERNATING * 0.3), "unknown"),  # a single run of each
        (side(seeds=ALL), side(0.03), "undecided"),  # another seed could explain it
        (side(seeds=ALL), side(0.6), "worse"),  # no other seed of three could
        (side(seeds=(1, 2)), side(-0.2 + ALTERNATING * 0.3, (42,)), "undecided"),  # run noise from two runs alone
        (side(seeds=ALL), side(seeds=ALL), "the same"),
    ],
    ids=[
        "better",
        "worse",
        "better by little",
        "equivalent",
        "undecided",
        "unknown",
        "noise",
        "beyond",
        "two runs",
        "same",
    ],
)
def test_verdict(before: RevisionRuns, after: RevisionRuns, expected: str) -> None:
    assert verdict(before, after) == expected


def test_difference_is_described_with_what_its_interval_covers() -> None:
    def described(before: RevisionRuns, after: RevisionRuns) -> str:
        difference = compared(before, after).metrics[0].difference
        assert difference
        return describe_difference(difference)

    assert described(side(), side(0.1)) == (
        "+0.1000, 95% interval +0.1000 to +0.1000; between these two models; run noise is not known"
    )
    assert described(side(seeds=ALL), side(0.1, ALL)).endswith("; 3 runs paired by seed")
    assert described(side(seeds=ALL), side(0.1)).endswith("; run noise pooled over both sides")


def test_all_metrics_are_tested_together_so_that_five_percent_is_the_probability_of_any_false_alarm() -> None:
    # p = 0.016 of exact_match alone: seven answers became correct, none the opposite. Of seven metrics, three differ.
    found = compared(side(seeds=ALL), side(seeds=ALL, exact_match=[True] * 7 + [False] * 93))
    result = next(result for result in found.metrics if result.metric.name == "exact_match")
    assert result.difference
    assert result.difference.p_value == pytest.approx(0.016, abs=0.003)
    assert result.p_value == pytest.approx(7 * result.difference.p_value)
    assert result.verdict == "undecided"


def test_metric_without_a_direction_is_higher_or_lower() -> None:
    after = side(seeds=ALL, answer_tokens=10 + ALTERNATING)
    assert verdict(side(seeds=ALL), after, "mean_response_tokens") == "higher"
    assert verdict(after, side(seeds=ALL), "mean_response_tokens") == "lower"


@pytest.mark.parametrize(("num", "expected"), [(60, "worse"), (40, "undecided"), (29, "undecided")])
def test_fewer_than_half_of_the_examples_or_thirty_are_too_few(num: int, expected: str) -> None:
    after = RevisionRuns(tables={seed: table(LOSSES[:num] + 0.2 + NOISE[seed]) for seed in ALL})
    found = compared(side(seeds=ALL), after)
    assert found.metrics[0].verdict == expected
    assert found.metrics[0].is_small == (expected == "undecided")
    assert found.metrics[0].before == pytest.approx(LOSSES[:num].mean())
    assert found.notes[0] == (
        f"The test sets differ: main has 100 examples, new {num}. Only the {num} common ones are compared, so the "
        "values differ from those of all examples."
    )


@pytest.mark.parametrize(
    ("after", "name", "note"),
    [
        (
            side(tokens=[11] * 40 + [10] * 60),
            "loss",
            "loss can't be compared: 40 examples differ in their number of supervised tokens, because of another "
            "tokenizer, template or max_length.",
        ),
        (
            RevisionRuns(tables={42: table().drop(columns="rouge_l")}),
            "rouge_l",
            "rouge_l can't be compared: the predictions of new have no rouge_l.",
        ),
        (
            side(rouge_l=[np.nan] * 3 + [0.5] * 97),
            "rouge_l",
            "rouge_l can't be compared: 3 examples of new have no value.",
        ),
    ],
    ids=["tokens", "column", "values"],
)
def test_metric_that_one_side_lacks_is_a_note(after: RevisionRuns, name: str, note: str) -> None:
    found = compared(side(), after)
    assert {result.metric.name: result.verdict for result in found.metrics}[name] == "can't be compared"
    assert note in found.notes
    assert {result.metric.name: result.verdict for result in found.metrics}["exact_match"] == "the same"


def test_pass_at_k_and_functions_of_scorers_py_are_compared() -> None:
    before = side(seeds=ALL, num_answers=4, passed=[0, 1] * 50, score_brief=1.0)
    after = side(seeds=ALL, num_answers=4, passed=[1, 2] * 50, score_brief=[0.0] * 60 + [np.nan] * 40)
    found = {result.metric.name: result for result in compared(before, after).metrics}
    values = {name: (found[name].before, found[name].after) for name in ("pass_rate", "pass_at_2", "pass_at_4")}
    # Of the six pairs of four answers, three have the one that passes, and five have one of two.
    assert values == {
        "pass_rate": (pytest.approx(1 / 8), pytest.approx(3 / 8)),
        "pass_at_2": (pytest.approx(1 / 4), pytest.approx(2 / 3)),
        "pass_at_4": (pytest.approx(1 / 2), pytest.approx(1)),
    }
    assert (found["brief"].before, found["brief"].after, found["brief"].verdict) == (1, 0, "worse")  # of 60 examples
    assert found["pass_at_2"].verdict == "better"


def test_a_metric_of_one_revision_alone_is_a_note() -> None:
    found = compared(side(), side(score_brief=1.0, num_answers=2))
    assert found.notes == [
        "pass_at_2 can't be compared: 100 examples of main have no value.",
        "brief can't be compared: the predictions of main have no score_brief.",
    ]


def test_equal_values_of_too_few_examples_are_undecided() -> None:
    after = RevisionRuns(tables={seed: table(LOSSES[:5]) for seed in ALL})
    assert verdict(side(seeds=ALL), after, "exact_match") == "undecided"


def test_predictions_without_losses_and_answers_still_give_the_other_metrics() -> None:
    found = compared(side(), RevisionRuns(tables={42: table().drop(columns=["loss", "answer"])}))
    assert "loss can't be compared: the predictions of new have no loss." in found.notes
    assert found.joined is not None
    assert found.joined["loss_after"].isna().all()


def test_stop_rate_counts_the_examples_that_count_on_both_sides() -> None:
    before = side(stopped=[True] * 50 + [False] * 50)
    found = compared(before, side(reference_fits=[True] * 50 + [False] * 50)).metrics
    result = next(result for result in found if result.metric.name == "stop_rate")
    assert (result.before, result.after) == (1, 1)


@dataclass
class Files:
    """A revision with the content of params.yaml and dvc.lock."""

    params: dict[str, Any]
    stages: Any
    name: str = "main"

    def read_yaml(self, path: str) -> dict[str, Any]:
        return self.params if path == "params.yaml" else {"stages": self.stages}


@pytest.mark.parametrize(
    ("params", "stages", "seed", "notes"),
    [
        ({}, None, 0, []),
        ({"seed": [1]}, {}, 0, []),
        ({"seed": 7}, {"train": {"params": {"params.yaml": {"seed": 42}}}}, 42, []),  # edited after train ran
        ({"replicate_seeds": 3}, {}, 0, ["main: the replicate of seed 3 has not run; `dvc repro` runs it."]),
        ({"replicate_seeds": [[1]]}, {}, 0, ["main: replicate_seeds contains [1], which is not a seed."]),
        ({"replicate_seeds": ["1"]}, {}, 0, ["main: replicate_seeds contains '1', which is not a seed."]),
    ],
)
def test_unusual_seeds_are_no_error(params: Any, stages: Any, seed: int, notes: list[str]) -> None:
    found = find_runs(Files(params, stages))  # type: ignore[arg-type]
    assert list(found.paths) == [seed]
    assert found.notes == notes


def test_predictions_of_earlier_answers_are_not_used() -> None:
    def stage(out: str, md5: str, dep: str = "", dep_md5: str = "") -> dict[str, Any]:
        return {"outs": [{"path": out, "md5": md5}], "deps": [{"path": dep, "md5": dep_md5}] if dep else []}

    answers, predictions = "data/answers/replicates/1.parquet", "data/predictions/replicates/1.parquet"
    stages = {
        "train": stage("models/tuned", "a"),
        "predict@tuned": stage("data/answers/tuned.parquet", "b", "models/tuned", "a"),
        "evaluate@tuned": stage("data/predictions/tuned.parquet", "c", "data/answers/tuned.parquet", "b"),
        "replicate@1": stage(answers, "d"),
        "evaluate_replicate@1": stage(predictions, "e", answers, "d"),
    }
    params = {"seed": 42, "replicate_seeds": [1]}
    found = find_runs(Files(params, stages))  # type: ignore[arg-type]
    assert (list(found.paths), found.notes) == ([42, 1], [])
    stages["replicate@1"] = stage(answers, "new")
    found = find_runs(Files(params, stages))  # type: ignore[arg-type]
    assert list(found.paths) == [42]
    assert found.notes == [f"main: {answers} changed after it was scored; `dvc repro` scores it again."]
    stages["train"] = stage("models/tuned", "new")
    found = find_runs(Files(params, stages))  # type: ignore[arg-type]
    assert list(found.paths) == []
    assert found.notes[0] == "main: models/tuned changed after it was scored; `dvc repro` scores it again."


def test_stop_rate_that_no_example_counts_for_is_not_measured() -> None:
    after = side(reference_fits=False)
    assert verdict(side(), after, "stop_rate") == "not measured: applies to no example"


def test_slices_are_tested_together() -> None:
    halves = ["a"] * 50 + ["b"] * 50
    change = np.r_[np.full(50, -0.3), np.zeros(50)] + ALTERNATING * 0.3
    found = compared(side(seeds=ALL, slice=halves), side(change, ALL, slice=halves))
    losses = [result for result in found.slices if result.metric.name == "loss"]
    assert [(result.slice, result.verdict) for result in losses] == [("a", "better"), ("b", "undecided")]
    assert losses[0].difference
    assert losses[0].difference.variances.num_prompts == 50
    assert losses[0].p_value == pytest.approx(14 * losses[0].difference.p_value)  # seven metrics of two slices


def test_slice_with_a_single_prompt_has_no_interval() -> None:
    slices = ["a"] * 99 + ["b"]
    found = compared(side(seeds=ALL, slice=slices), side(0.1, ALL, slice=slices))
    (single,) = [result for result in found.slices if result.slice == "b" and result.metric.name == "loss"]
    assert (single.difference, single.verdict) == (None, "undecided: a single prompt")


def test_old_predictions_without_prompts_and_slices_are_compared() -> None:
    old = RevisionRuns(tables={42: table().drop(columns=["prompt_id", "slice"])})
    assert compared(old, side(0.1)).metrics[0].verdict == "unknown"
    assert compared(side(), old).metrics[0].verdict == "the same"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (predictions(LOSSES), None),
        (predictions(LOSSES).drop(columns="example_id"), "it has no column example_id"),
        (predictions(LOSSES, example_id="id0"), "it has an example twice or without an id"),
        (predictions([1, 2], example_id=[None, "id1"]), "it has an example twice or without an id"),
        (predictions([1, 2], example_id="id0", split=["test", "retention"]), None),
        (predictions(LOSSES).head(0), "it has no examples"),
    ],
)
def test_table_that_can_not_be_predictions_is_recognized(found: pd.DataFrame, expected: str | None) -> None:
    assert find_problem(found) == expected
