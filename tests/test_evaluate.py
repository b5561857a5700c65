"""Scores of literal answers, and metrics of literal predictions."""

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import evaluate
from stages.data.examples import SCORING_SCHEMA, SPLIT_SCHEMA
from stages.data.tables import write_parquet
from stages.evaluate import repetition, rouge_l
from stages.predict import ANSWERS_SCHEMA
from stages.runtime.errors import UserError
from stages.scoring.metrics import compute_metrics, pass_at, ratio
from tests.clone import run_pipeline
from tests.conftest import predictions


def test_loss_and_accuracy_are_means_over_all_tokens() -> None:
    columns = {"tokens": [1, 3], "correct_tokens": 1, "exact_match": [1.0, 0.0], "rouge_l": [1.0, 0.5]}
    columns |= {"passed": [0, 1], "stopped": [1.0, 0.0], "answer_tokens": [3, 5], "repetition": [0.0, 0.25]}
    assert compute_metrics(predictions([1.0, 3.0], **columns)) == {
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


def test_examples_of_one_prompt_and_answers_to_it_are_one_sample() -> None:
    metrics = compute_metrics(predictions([1.0] * 4, prompt_id=[*"aabb"], rouge_l=[0.2, 0.2, 0.8, 0.8]))
    assert (metrics["rouge_l"], metrics["rouge_l_se"]) == (pytest.approx(0.5), pytest.approx(0.3))  # as of two prompts
    metrics = compute_metrics(predictions([1.0] * 2, num_answers=100, passed=[100, 0]))
    assert (metrics["pass_rate"], metrics["pass_rate_se"]) == (0.5, 0.5)  # as with one answer per prompt


def test_stop_rate_counts_only_examples_whose_reference_fits() -> None:
    rows = predictions([1.0] * 5, stopped=[1.0, 0.0, 1.0, 0.0, 0.0], reference_fits=[True] * 2 + [False] * 3)
    metrics = compute_metrics(rows)
    assert (metrics["examples"], metrics["stop_rate"], metrics["stop_rate_se"]) == (5, 0.5, 0.5)
    metrics = compute_metrics(rows[2:])
    assert (metrics["stop_rate"], metrics["stop_rate_se"]) == (None, None)


def test_pass_rate_counts_only_examples_with_a_check() -> None:
    rows = predictions([1.0] * 4, passed=[1, 0, 0, 0], checked=[True] * 3 + [False])
    assert compute_metrics(rows)["pass_rate"] == pytest.approx(1 / 3)
    assert compute_metrics(rows[3:])["pass_rate"] is None


def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_with_one_that_passes() -> None:
    metrics = compute_metrics(predictions([1.0] * 2, num_answers=4, passed=[1, 0]))
    # Of six pairs of four answers, three have the one that passes.
    assert [metrics[name] for name in ("pass_rate", "pass_at_2", "pass_at_4")] == [1 / 8, 1 / 4, 1 / 2]
    assert "pass_at_2" not in compute_metrics(predictions([1.0]))


@given(
    st.integers(2, 9).flatmap(lambda n: st.tuples(st.lists(st.booleans(), min_size=n, max_size=n), st.integers(1, n)))
)
def test_pass_at_k_equals_the_average_over_all_choices(case: tuple[list[bool], int]) -> None:
    passed, k = case
    choices = list(combinations(passed, k))
    rows = predictions([1.0], num_answers=len(passed), passed=sum(passed))
    assert list(pass_at(k).sums(rows)) == pytest.approx([sum(map(any, choices)) / len(choices)])


def test_an_answer_for_which_a_check_takes_too_long_is_counted_as_failed(capsys: pytest.CaptureFixture[str]) -> None:
    row = "a.jsonl, row 1,234"
    assert evaluate.is_right(row, {"number": 7}, "It is 7.")
    assert not evaluate.is_right(row, {"regex": "(a|aa)+$"}, "a" * 60 + "b")
    assert capsys.readouterr().out == (
        f'a.jsonl, row 1,234: the regular expression "(a|aa)+$" takes more than 1 s for the answer {"a" * 60 + "b"!r}, '
        "which is counted as failed\n"
    )


@pytest.fixture
def answered(project: Path) -> Path:
    """A project with the answers of two test examples, in two slices, and of one of the retention set."""
    splits: dict[str, Any] = {"test": [("sum", "7"), ("color", "Red.")], "retention": [("capital", "Paris.")]}
    checks = {"sum": '{"number": 7}', "color": None, "capital": '{"contains": "Paris"}'}
    answers = {"sum": ["It is 7.", "It is 8."], "color": ["Red.", "Blue."], "capital": ["Paris.", "Paris."]}
    scoring, rows = [], []
    for split, examples in splits.items():
        table = [
            {"example_id": name, "prompt_id": name, "source": "a.jsonl", "source_row": number, "slice": name}
            | {"prompt": f"Q: {name}", "response": response, "truncated": name == "color"}
            for number, (name, response) in enumerate(examples, 1)
        ]
        write_parquet(Path(f"data/{split}.parquet"), table, SPLIT_SCHEMA)
        for name, _ in examples:
            keys = {"split": split, "example_id": name}
            scoring.append({**keys, "check": checks[name], "other_columns": '{"kind": "easy"}'})
            counts = {"loss": 1.0, "tokens": 2, "correct_tokens": 1, "reference_fits": True}
            more = {"answers": answers[name], "answer_tokens": [3, 5], "stopped": [True, False]}
            more |= {"reasoning": [None] * 2, "calls": [None] * 2, "open_reasoning": [False] * 2}
            rows.append(keys | counts | more)
    write_parquet(evaluate.SCORING, scoring, SCORING_SCHEMA)
    for model in ("base", "replicates/1"):
        Path(f"data/answers/{model}").parent.mkdir(parents=True, exist_ok=True)
        write_parquet(Path(f"data/answers/{model}.parquet"), rows, ANSWERS_SCHEMA)
    return project


def run_evaluate(model: str = "base") -> dict[str, pd.Series]:
    """Run the stage; returns the predictions by example id."""
    run_pipeline(Path.cwd(), f"evaluate@{model}")
    table = pd.read_parquet(f"data/predictions/{model}.parquet")
    return {str(row["example_id"]): row for _, row in table.iterrows()}


def test_answers_are_scored_and_metrics_are_of_the_test_split_its_slices_and_the_retention_set(answered: Path) -> None:
    rows = run_evaluate()
    assert list(rows) == ["sum", "color", "capital"]
    names = ["split", "answer", "num_answers", "checked", "passed", "exact_match", "answer_tokens", "stopped"]
    assert rows["sum"][names].tolist() == ["test", "It is 7.", 2, True, 1, 0.0, 4.0, 0.5]
    assert rows["color"][names].tolist() == ["test", "Red.", 2, False, 0, 0.5, 4.0, 0.5]
    assert rows["capital"][names].tolist() == ["retention", "Paris.", 2, True, 2, 1.0, 4.0, 0.5]
    assert [row["reference_fits"] for row in rows.values()] == [True, False, True]  # a truncated reference does not

    metrics = json.loads(Path("metrics/evaluate/base.json").read_text())
    assert (metrics["examples"], metrics["pass_rate"], metrics["pass_at_2"]) == (2, 0.5, 1.0)
    assert {name: part["pass_rate"] for name, part in metrics["slices"].items()} == {"color": None, "sum": 0.5}
    assert (metrics["retention"]["examples"], metrics["retention"]["pass_rate"]) == (1, 1.0)
    assert "slices" not in metrics["retention"]  # there is one
    assert Path("metrics/evaluate/base.csv").read_text() == "tokens,base_loss\n2,1\n2,1\n"


def test_an_answer_whose_reasoning_never_closes_fails_and_a_metric_counts_it(answered: Path) -> None:
    scoring = pd.read_parquet(evaluate.SCORING).assign(check='{"max_words": 3}')  # an empty text would pass
    write_parquet(evaluate.SCORING, scoring.to_dict("records"), SCORING_SCHEMA)
    assert run_evaluate()["sum"]["passed"] == 2
    assert "open_reasoning" not in json.loads(Path("metrics/evaluate/base.json").read_text())
    path = Path("data/answers/base.parquet")
    table = pq.read_table(path).to_pylist()
    table[0] |= {"answers": ["", "It is 7."], "reasoning": ["7 or", None], "open_reasoning": [True, False]}
    write_parquet(path, table, ANSWERS_SCHEMA)
    row = run_evaluate()["sum"]
    assert row[["answer", "reasoning", "open_reasoning", "passed"]].tolist() == ["", "7 or", 0.5, 1]
    metrics = json.loads(Path("metrics/evaluate/base.json").read_text())
    assert (metrics["open_reasoning"], metrics["pass_rate"]) == (0.25, 0.75)
    assert "open_reasoning" not in metrics["retention"]


def test_a_replicate_has_predictions_and_no_metrics(answered: Path) -> None:
    assert len(run_evaluate("replicates/1")) == 3
    assert not Path("metrics").exists()


def test_public_functions_of_scorers_py_are_metrics(answered: Path) -> None:
    Path("scorers.py").write_text(
        "from math import sqrt\n"
        "def _hidden(): pass\n"
        "def brief(prompt, answer, reference, row):\n"
        "    assert prompt == f'Q: {row[\"example_id\"]}' and row['kind'] == 'easy', row\n"
        "    return len(answer) <= 6\n"
        "def same_number(prompt, answer, reference, row):\n"
        "    return answer.count('7') if row['check'] == {'number': 7} else None\n"
    )
    rows = run_evaluate()
    assert {name: row["score_brief"] for name, row in rows.items()} == {"sum": 0.0, "color": 1.0, "capital": 1.0}
    assert rows["sum"]["score_same_number"] == 0.5
    assert math.isnan(rows["color"]["score_same_number"])
    metrics = json.loads(Path("metrics/evaluate/base.json").read_text())
    assert (metrics["brief"], metrics["same_number"], metrics["retention"]["same_number"]) == (0.5, 0.5, None)
    assert metrics["same_number_se"] is None  # of a single example


def test_scorers_may_use_dataclasses_and_caches_and_change_their_row(answered: Path) -> None:
    Path("scorers.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\nfrom functools import lru_cache\n"
        "@dataclass\nclass Unit:\n    name: str\n"
        "@lru_cache\ndef _length(text): return len(text)\n"
        "def kind(prompt, answer, reference, row): return len(row.pop('kind'))\n"
        "def kind_again(prompt, answer, reference, row): return _length(row['kind'])\n"
    )
    rows = run_evaluate()
    assert (rows["sum"]["score_kind"], rows["sum"]["score_kind_again"]) == (4.0, 4.0)


RANGE = "must return a number from -1e+09 to 1e+09, or None if it does not apply"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 'good'", f"found 'good'; {RANGE}"),
        ("return float('nan')", f"found nan; {RANGE}"),
        ("return 1e200", f"found 1e+200; {RANGE}"),
        ("return [1]", f"found [1]; {RANGE}"),
        ("raise SystemExit(0)", "SystemExit in line 1: 0; fix it and run `dvc repro`"),
        ("return 1 / 0", "ZeroDivisionError in line 1: division by zero; fix it and run `dvc repro`"),
    ],
)
def test_an_error_in_a_scorer_names_the_function_the_row_and_the_answer(
    answered: Path, body: str, message: str
) -> None:
    Path("scorers.py").write_text(f"def mine(prompt, answer, reference, row): {body}\n")
    with pytest.raises(UserError) as error:
        run_evaluate()
    assert str(error.value) == f"scorers.py: mine for a.jsonl, row 1 and the answer 'It is 7.': {message}"
    assert not Path("data/predictions/base.parquet").exists()
    assert Path("data/answers/base.parquet").exists()  # nothing is generated again


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def mine(:", "scorers.py: can't be run: SyntaxError: invalid syntax (scorers.py, line 1); fix it"),
        ("x = 1\nimport nothing_here", "scorers.py: can't be run: ModuleNotFoundError in line 2: No module named"),
        ("def mine(answer): return 1", "scorers.py: mine(answer) must take prompt, answer, reference and row; a"),
        ("def loss(p, a, r, row): return 1", "scorers.py: loss is the name of a metric; rename the function"),
        ("def pass_at_2(p, a, r, row): return 1", "scorers.py: pass_at_2 is the name of a metric; rename the function"),
    ],
)
def test_an_invalid_scorers_file_is_reported(answered: Path, code: str, message: str) -> None:
    Path("scorers.py").write_text(code)
    with pytest.raises(UserError) as error:
        run_evaluate()
    assert str(error.value).startswith(message)


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
