"""Metrics of literal predictions."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stages import evaluate
from stages.evaluate import PREDICTIONS_SCHEMA, compute_metrics, ratio, repetition, rouge_l
from tests.clone import edit


def predictions(*rows: dict[str, Any]) -> pd.DataFrame:
    """Predictions with these values and others that are the same in each row."""
    same: dict[str, Any] = {"slice": "s", "loss": 1.0, "tokens": 2, "correct_tokens": 1}
    same |= {"answer": "a", "answer_tokens": 1, "stopped": True, "reference_fits": True, "exact_match": False}
    same |= {"checked": True, "passed": False, "rouge_l": 0.5, "repetition": 0.0}
    ids = [{"example_id": str(n), "prompt_id": f"p{n}"} for n in range(len(rows))]
    table = pd.DataFrame([one | same | row for one, row in zip(ids, rows, strict=True)])
    return table[PREDICTIONS_SCHEMA.names]


def test_loss_and_accuracy_are_means_over_all_tokens() -> None:
    first = {"loss": 1.0, "tokens": 1, "correct_tokens": 1, "exact_match": True, "rouge_l": 1.0, "answer_tokens": 3}
    second = {"loss": 3.0, "tokens": 3, "passed": True, "stopped": False, "answer_tokens": 5, "repetition": 0.25}
    assert compute_metrics(predictions(first, second)) == {
        "examples": 2,
        "supervised_tokens": 4,
        "loss": 2.5,  # (1·1 + 3·3) / 4
        "loss_se": 0.75,  # residuals −1.5 and 1.5: √(4.5 · 2) / 4
        "perplexity": pytest.approx(12.182494),
        "perplexity_se": pytest.approx(9.136870),
        "token_accuracy": 0.5,
        "token_accuracy_se": 0.25,  # residuals 0.5 and −0.5: √(0.5 · 2) / 4
        "pass_rate": 0.5,
        "pass_rate_se": 0.5,
        "exact_match": 0.5,
        "exact_match_se": 0.5,
        "rouge_l": 0.75,
        "rouge_l_se": 0.25,
        "stop_rate": 0.5,
        "stop_rate_se": 0.5,
        "repetition": 0.125,
        "repetition_se": 0.125,
        "mean_response_tokens": 4.0,
        "mean_response_tokens_se": 1.0,
    }


def test_examples_of_one_prompt_are_one_sample() -> None:
    rows = [
        {"prompt_id": prompt, "rouge_l": score} for prompt, score in (("a", 0.2), ("a", 0.2), ("b", 0.8), ("b", 0.8))
    ]
    metrics = compute_metrics(predictions(*rows))
    assert (metrics["rouge_l"], metrics["rouge_l_se"]) == (pytest.approx(0.5), pytest.approx(0.3))  # as of two prompts


def test_stop_rate_counts_only_examples_whose_reference_fits() -> None:
    fits = [{"stopped": True}, {"stopped": False}]
    too_long = [{"stopped": stopped, "reference_fits": False} for stopped in (True, False, False)]
    metrics = compute_metrics(predictions(*fits, *too_long))
    assert (metrics["stop_rate"], metrics["stop_rate_se"]) == (0.5, 0.5)
    assert metrics["examples"] == 5
    metrics = compute_metrics(predictions(*too_long))
    assert (metrics["stop_rate"], metrics["stop_rate_se"]) == (None, None)


def test_pass_rate_counts_only_examples_with_a_check() -> None:
    rows = [{"passed": True}, {"passed": False}, {"passed": False}, {"checked": False}]
    assert compute_metrics(predictions(*rows))["pass_rate"] == pytest.approx(1 / 3)
    assert compute_metrics(predictions({"checked": False}))["pass_rate"] is None


def test_an_answer_for_which_a_check_takes_too_long_is_counted_as_failed(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.is_right("id7", '{"number": 7}', "It is 7.")
    assert not evaluate.is_right("id7", '{"regex": "(a|aa)+$"}', "a" * 60 + "b")
    assert capsys.readouterr().out == (
        'data/test.parquet, example id7: the regular expression "(a|aa)+$" takes more than 1 s for its answer, which '
        "is counted as failed\n"
    )


def run_evaluate(monkeypatch: pytest.MonkeyPatch, rows: pd.DataFrame) -> dict[str, Any]:
    """The metrics that the stage writes for these predictions."""
    monkeypatch.setattr(evaluate, "predict", lambda folder, params, context: rows)
    monkeypatch.setattr(sys, "argv", ["evaluate", "tuned"])
    evaluate.main()
    result: dict[str, Any] = json.loads(Path("metrics/evaluate/tuned.json").read_text())
    return result


def test_each_of_several_slices_has_its_metrics(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = predictions({"slice": "sums", "loss": 2.0}, {"slice": "lists", "loss": 3.0}, {"slice": "sums", "loss": 4.0})
    metrics = run_evaluate(monkeypatch, rows)
    assert metrics["loss"] == 3.0
    parts = {name: (part["examples"], part["loss"], part["loss_se"]) for name, part in metrics["slices"].items()}
    assert parts == {"lists": (1, 3.0, None), "sums": (2, 3.0, 1.0)}
    assert "slices" not in run_evaluate(monkeypatch, predictions({}, {}))


def test_predictions_and_losses_are_in_the_order_of_the_test_split(
    training_inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(training_inputs, max_new_tokens="7")
    monkeypatch.setattr(sys, "argv", ["evaluate", "base"])
    evaluate.main()
    rows = pd.read_parquet("data/predictions/base.parquet")
    assert list(rows["example_id"]) == ["27", "28", "29"]
    assert list(rows["tokens"]) == [17, 5, 7]  # with the EOS token
    assert list(rows["reference_fits"]) == [False, True, True]
    losses = pd.read_csv("metrics/evaluate/base.csv")
    assert list(losses["tokens"]) == [17, 5, 7]
    assert list(losses["base_loss"]) == pytest.approx(list(rows["loss"]), rel=1e-5)


def test_standard_error_with_equal_counts_is_that_of_a_mean() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    assert ratio(values, np.ones(4)) == (4.0, pytest.approx(np.std(values, ddof=1) / 2))


def test_standard_error_agrees_with_resampling_of_examples() -> None:
    random = np.random.default_rng(0)
    counts = random.integers(1, 40, 300).astype(float)
    sums = counts * random.gamma(2, 1, 300)
    draws = random.integers(0, 300, (4000, 300))
    resampled = sums[draws].sum(1) / counts[draws].sum(1)
    assert ratio(sums, counts)[1] == pytest.approx(resampled.std(), rel=0.06)


def test_one_example_has_no_standard_error_and_none_has_no_value() -> None:
    assert ratio(np.array([3.0]), np.array([2.0])) == (1.5, None)
    assert ratio(np.array([3.0, 0.0]), np.array([2.0, 0.0])) == (1.5, None)
    assert ratio(np.array([0.0, 0.0]), np.array([0.0, 0.0])) == (None, None)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("a dog", "the cat", 0.0),
        ("", "the cat", 0.0),
        ("the cat sat", "the sat cat", 2 / 3),  # a common subsequence of two words of three
        ("the cat", "the cat sat down", 2 / 3),  # precision 1, recall 1/2
        ("Кот, здесь!", "кот здесь", 1.0),
        ("it's café", "It s cafe\u0301", 1.0),
        ("दीन", "दिन", 0.0),  # they differ in a combining mark
        ("法国的首都是巴黎市", "法国的首都是巴黎", 16 / 17),  # 8 of 9 characters, and 8 of 8
        ("東京です", "東京だ", 4 / 7),
        ("ดีมาก", "ดี", 2 / 5),
        ("서울은 커요", "서울은 작아요", 1 / 2),
        ("👍", "👍", 1.0),
        ("yes 👍", "👍 no", 1 / 2),
        ("👍", "👎", 0.0),
        ("−5", "5", 0.0),
        ("−5", "-5", 1.0),
        ("...", "...", 1.0),  # equal texts without words
        ("...", "!", 0.0),
    ],
)
def test_rouge_l_is_an_f_measure_of_words_in_any_script(answer: str, reference: str, score: float) -> None:
    assert math.isclose(rouge_l(answer, reference), score, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("the same words " * 50, 1 - 3 / 147),  # 3 different 4-grams of 147
        ("go on and on, go on and on", 1 / 5),  # of 5, the last repeats the first
        ("是的" * 10, 1 - 2 / 17),
        ("one two three four five six", 0.0),
        ("no no no", 0.0),  # no 4-gram
        ("", 0.0),
    ],
)
def test_repetition_is_the_share_of_repeated_4_grams(answer: str, expected: float) -> None:
    assert repetition(answer) == pytest.approx(expected)


def test_repetition_does_not_rise_if_a_loop_is_cut() -> None:
    assert [repetition("again " * count) for count in (1, 4, 5, 8, 103)] == [0.0, 0.0, 0.5, 0.8, 0.99]
