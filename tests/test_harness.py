"""`make lm-eval` with the real harness and local tasks, and its results in a review."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from review.harness import Samples, compare_harness, compare_samples, read_samples
from review.revisions import WORKSPACE, Revision
from stages.runtime.errors import UserError
from tests.clone import copy_clone
from tools import harness

pytestmark = pytest.mark.subprocess
COLORS = """\
task: colors
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/colors.jsonl"}}, cache_dir: "{folder}"}}  # other tests empty HF_HOME
test_split: test
output_type: multiple_choice
description: "Answer with a color."
doc_to_text: "{{{{question}}}}"
gen_prefix: "The color is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def clone(ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with results, and a folder `tasks` with a task of 40 examples, two of which are equal."""
    folder = copy_clone(ran, tmp_path / "clone")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("tasks").mkdir()
    Path("tasks/colors.yaml").write_text(COLORS.format(folder=folder / "tasks"))
    docs = [{"question": f"Which color is {n}?", "choices": ["red", "blue"], "answer": n % 2} for n in range(1, 40)]
    Path("tasks/colors.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in [docs[0], *docs]))
    return folder


def run_harness(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["harness", *arguments])
    harness.main()


def samples(model: str = "tuned") -> Samples:
    found = read_samples(Revision(WORKSPACE), model)
    assert found is not None
    return found


def test_each_example_of_a_task_has_a_value_for_both_models(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts: list[str] = []
    simple = harness.run_tasks

    def spy(*arguments: Any) -> Any:
        results = simple(*arguments)
        prompts.extend(sample["arguments"][0][0] for sample in results["samples"]["colors"])
        return results

    monkeypatch.setattr(harness, "run_tasks", spy)
    run_harness(monkeypatch, "colors", "--include", "tasks")
    base, tuned = samples("base"), samples()
    assert base.directions == tuned.directions == {"colors: acc": 1}
    assert list(base.table.index) == list(tuned.table.index)
    assert len(set(tuned.table.index)) == 40
    assert set(tuned.table["colors: acc"]) <= {0.0, 1.0}
    # Both models are asked as in training.
    assert prompts[0] == prompts[40]
    assert prompts[0].startswith("Below is an instruction that describes a task.")
    question = "Answer with a color.\n\nWhich color is 1?"
    assert prompts[0].endswith(f"### Instruction:\n{question}\n\n### Response:\nThe color is")
    assert "colors: acc" in capsys.readouterr().out

    comparison = compare_harness(Revision(WORKSPACE), Revision(WORKSPACE))
    assert comparison is not None
    assert [(result.metric.name, result.verdict) for result in comparison.metrics] == [("colors: acc", "the same")]
    assert compare_harness(Revision("main"), Revision(WORKSPACE)) is None
    lock = Path("dvc.lock").read_text()
    Path("dvc.lock").write_text(lock.replace(tuned.model, "0" * 32 + ".dir"))
    comparison = compare_harness(Revision(WORKSPACE), Revision(WORKSPACE))
    assert comparison is not None
    note = "workspace: metrics/lm_eval/tuned.jsonl is of another model; run `make lm-eval`."
    assert (comparison.metrics, comparison.notes) == ([], [note, note])


def side(values: list[float | None], direction: int = 1) -> Samples:
    index = pd.Index([f"task/{n}" for n in range(len(values))], name="example_id")
    return Samples("md5", {"task: acc": direction, "other: f1": 1}, pd.DataFrame({"task: acc": values}, index))


@pytest.mark.parametrize(("direction", "significant"), [(1, True), (-1, True)])
def test_tasks_are_compared_in_pairs(direction: int, significant: bool) -> None:
    before, after = side([0.0, 1.0] * 50, direction), side([0.5, 1.0] * 50, direction)
    results = compare_samples(before, after, ("main", "new"))
    assert compare_samples(Samples("md5", {}, before.table), after, ("main", "new")).notes == [
        "main and new have run no common task of lm-evaluation-harness."
    ]
    (result, other) = results.metrics
    assert (result.metric.name, result.before, result.after) == ("task: acc", 0.5, 0.75)
    assert (result.verdict, result.is_significant, result.metric.direction) == ("unknown", significant, direction)
    assert other.verdict == "not measured: applies to no example"


def test_each_task_is_judged_on_its_own_examples_and_tasks_of_one_side_are_named() -> None:
    before, after = side([0.0, 0.0] * 50), side([1.0, 1.0] * 50)
    index = pd.Index([f"big/{n}" for n in range(900)], name="example_id")
    big = pd.DataFrame({"big: acc": [1.0] * 900}, index)
    after = Samples("md5", after.directions | {"big: acc": 1}, pd.concat([after.table, big]))
    results = compare_samples(before, after, ("main", "new"))
    assert results.metrics[0].verdict == "unknown"  # two single runs that differ; undecided if it were too small
    assert results.metrics[0].is_significant
    assert results.notes[0] == "Only new has run big."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "TASKS is empty; name tasks of lm-evaluation-harness: make lm-eval TASKS=arc_easy,hellaswag"),
        (["colors", "--limit", "few"], "LIMIT: found 'few'; must be a number of examples"),
        (["colors", "--include", "nowhere"], "INCLUDE: 'nowhere' is not a folder"),
        (["colours", "--include", "tasks"], "TASKS: found 'colours'; must be tasks of lm-evaluation-harness (`lm-eval"),
    ],
)
def test_invalid_arguments_are_reported(
    clone: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    from lm_eval.tasks import TaskManager

    init = TaskManager.__init__  # without the tasks of the harness, because indexing them takes ten seconds
    monkeypatch.setattr(TaskManager, "__init__", lambda self, include_path, **_: init(self, None, include_path, False))
    with pytest.raises(UserError) as error:
        run_harness(monkeypatch, *arguments)
    assert str(error.value).startswith(message)
