"""`make review` in a repository of six commits with known differences."""

import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from review import plots
from review.__main__ import main
from review.comparison import Comparison
from review.rescoring import Rescoring
from review.revisions import Revision
from review.runs import PREDICTIONS, REPLICATE
from stages.data.examples import SCORING_SCHEMA
from stages.data.tables import write_parquet
from stages.evaluate import PREDICTIONS_SCHEMA
from stages.runtime.errors import UserError
from stages.runtime.run import run as run_command
from stages.scoring.metrics import compute_metrics
from stages.templates.alpaca import render_alpaca
from tests.clone import ROOT, USER_FILES, commit, run
from tests.conftest import predictions

pytestmark = pytest.mark.subprocess
NUM = 100
LOSSES = np.linspace(1, 3, NUM)
ALTERNATING = np.tile([0.5, -0.5], NUM // 2)
PIPELINE = """\
stages:
  evaluate:
    matrix: {model: [tuned]}
    cmd: "true"
    params: [learning_rate]
    deps: [scorers.py]
    outs: [data/predictions/tuned.parquet, data/test.parquet, data/train.parquet, data/validation.parquet,
      data/retention.parquet, data/scoring.parquet]
    metrics:
      - metrics/evaluate/tuned.json: {cache: false}
    plots:
      - metrics/curve.csv: {cache: false, x: step, y: loss, title: Loss, x_label: step, y_label: nats/token}
  replicate:
    matrix: {seed: "${replicate_seeds}"}
    cmd: "true"
    params: [learning_rate]
    outs: ["data/predictions/replicates/${item.seed}.parquet"]
"""
NOISE = {1: 0.03, 2: -0.03}  # of the losses of the replicates, by seed
SAMPLES = "# Answers of the tuned model\n\nAt most 64 tokens.\n\n## Name \\*two\\* colors.\n\n    {answer}\n"


def write_revision(
    folder: Path,
    losses: Any,
    learning_rate: str,
    answer: str,
    seeds: Sequence[int] = (1, 2),
    num_lost: int = 4,
    **changes: Any,
) -> None:
    """Write the files that the stages would write.

    Args:
        seeds: of the replicates, whose losses differ by `NOISE`.
        num_lost: of the 40 answers of the retention set, those that do not pass.
        changes: other values of columns of the predictions, as lists.
    """
    retained = predictions(np.ones(40), split="retention", passed=[n >= num_lost for n in range(40)])
    rows = predictions(losses, **changes)
    texts = rows[["example_id", "prompt_id", "slice"]].assign(response="r", source="a.jsonl")
    texts["prompt"] = [render_alpaca(f"Say {example_id}.") for example_id in rows["example_id"]]
    for path in ("data/predictions/replicates", "metrics/evaluate", "metrics/samples"):
        (folder / path).mkdir(parents=True, exist_ok=True)
    both = pd.concat([rows, retained])
    write_parquet(folder / PREDICTIONS, both.to_dict("records"), PREDICTIONS_SCHEMA)
    for seed in seeds:
        replicate = both.assign(loss=both["loss"] + NOISE[seed])
        write_parquet(folder / REPLICATE.format(seed=seed), replicate.to_dict("records"), PREDICTIONS_SCHEMA)
    texts = texts.assign(source_row=1, truncated=False)
    write_scoring(folder, texts)
    none = texts.head(0)
    for split, part in (("test", texts), ("train", none), ("validation", none), ("retention", none)):
        pq.write_table(pa.Table.from_pandas(part, preserve_index=False), folder / f"data/{split}.parquet")
    metrics = compute_metrics(rows) | {"retention": compute_metrics(retained)}
    (folder / "metrics/evaluate/tuned.json").write_text(json.dumps(metrics))
    (folder / "metrics/samples/tuned.md").write_text(SAMPLES.format(answer=answer))
    (folder / "metrics/curve.csv").write_text(
        "step,loss,validation_loss,learning_rate,gradient_norm\n"
        f"1,{losses[0]},,0.1,1\n2,{losses[1]},{losses[2]},0.1,1\n3,{losses[3]},{losses[4]},0.1,1\n"
    )
    (folder / "params.yaml").write_text(f"learning_rate: {learning_rate}\nseed: 42\nreplicate_seeds: {list(seeds)}\n")
    run(folder, "dvc", "commit", "--force", "--quiet")


def write_scoring(folder: Path, texts: pd.DataFrame, check: str = '{"contains": "answer"}') -> None:
    rows = texts[["example_id"]].assign(split="test", check=check, other_columns="{}")
    write_parquet(folder / "data/scoring.parquet", rows.to_dict("records"), SCORING_SCHEMA)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, fast_stages: None) -> Path:
    folder = tmp_path_factory.mktemp("review")
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "dvc", "init", "--quiet")
    (folder / "dvc.yaml").write_text(PIPELINE)
    shutil.copy(USER_FILES / "gates.yaml", folder / "gates.yaml")
    (folder / "scorers.py").write_text("")
    (folder / ".gitignore").write_text("/data/\n/review.*\n.scratch/\n__pycache__/\n")
    (folder / "data").mkdir()
    (folder / "data/.gitignore").write_text("*\n")
    revisions: dict[str, dict[str, Any]] = {
        "before": {"losses": LOSSES, "learning_rate": "1e-4", "answer": "Red and green."},
        "better": {"losses": LOSSES - 0.2 + ALTERNATING, "learning_rate": "2e-4", "answer": "Red and @octocat."},
        "worse": {
            "losses": LOSSES + 0.2,
            "learning_rate": "4e-4",
            "answer": "Red.",
            "stopped": [n > 9 for n in range(NUM)],
            "num_lost": 20,
        },
        "broken": {
            "losses": LOSSES,
            "learning_rate": "1e-4",
            "answer": "Red.",
            "passed": [n != 1 for n in range(NUM)],
        },
        "single": {"losses": LOSSES - 0.2 + ALTERNATING, "learning_rate": "1e-4", "answer": "Red.", "seeds": ()},
        "seed": {"losses": LOSSES + 0.03, "learning_rate": "1e-4", "answer": "Red.", "seeds": ()},
    }
    for name, content in revisions.items():
        write_revision(folder, **content)
        commit(folder, name)
        run(folder, "git", "tag", name)
    return folder


@pytest.fixture
def folder(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy with its cache, at the last commit."""
    shutil.copytree(repository, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    yield tmp_path / "copy"


def compared(before: str, after: str) -> Comparison:
    return Comparison(Revision(before), Revision(after))


def review(folder: Path, *revisions: str, exit_code: int = 0) -> str:
    """Run the command in this process and without the plots of DVC, which takes a tenth of the time; its output."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as context, contextlib.redirect_stdout(printed):
        context.chdir(folder)
        context.setattr(sys, "argv", ["review", *revisions])
        context.setattr(plots, "draw", lambda *_: "")
        with pytest.raises(SystemExit) as exited:
            run_command(main, exclusive=False)
    error = exited.value.code if isinstance(exited.value.code, str) else ""
    assert (1 if error else exited.value.code) == exit_code, printed.getvalue() + error
    return printed.getvalue() + error


def at(folder: Path, name: str, **files: str) -> None:
    """Put the workspace into the state of a revision, and write other conditions."""
    run(folder, "git", "checkout", "-q", "--force", name)
    run(folder, "dvc", "checkout", "--force", "--quiet")
    for stem, content in files.items():
        Path(f"{stem}.yaml").write_text(content)


def test_significantly_worse_model_is_worse_and_fails_the_gates(folder: Path) -> None:
    comparison = compared("before", "worse")
    verdicts = {result.metric.name: result.verdict for result in comparison.test.metrics}
    assert verdicts == {
        "loss": "worse",
        "token_accuracy": "the same",
        "pass_rate": "the same",
        "exact_match": "the same",
        "rouge_l": "the same",
        "stop_rate": "worse",
        "repetition": "the same",
        "mean_response_tokens": "the same",
    }
    output = review(folder, "before", "worse", exit_code=1)
    assert "error: 2 of 3 gates failed; details are in review.md, the gates in gates.yaml" in output
    rule = "loss not worse than in before by more than 0.05"
    assert f"failed: {rule}; found: +0.2000, 95% interval +0.2000 to +0.2000; 3 runs paired by seed" in output
    assert "failed: stop_rate at least 0.95; found: 0.9" in output
    report = Path("review.md").read_text()  # it is written even so
    assert "**Test loss: ✗ worse. 2.0000 → 2.2000 nats/token, +0.2000, 95% interval" in report
    assert "✗ worse: stop\\_rate." in report
    assert f"✗ Gates that failed: {rule}; stop\\_rate at least 0.95." in report


def test_lost_abilities_are_reported_and_can_fail_a_gate(folder: Path) -> None:
    comparison = compared("before", "worse")
    results = {result.metric.name: result for result in comparison.results["retention"].metrics}
    assert (results["pass_rate"].before, results["pass_rate"].after) == (0.9, 0.5)
    assert (results["pass_rate"].verdict, results["loss"].verdict) == ("worse", "the same")
    at(folder, "worse", gates="retention.pass_rate: {not_worse_by: 0.1, min: 0.6}\nretention.loss: {max: 2}\n")
    review(folder, "before", exit_code=1)
    report = Path("review.md").read_text()
    assert "✗ worse: pass\\_rate on the retention set." in report
    assert [line for line in report.splitlines() if "| ✗ failed |" in line or "| ✓ passed |" in line] == [
        "| retention.pass\\_rate at least 0.6 | ✗ failed | 0.5 |",
        "| retention.pass\\_rate not worse than in before by more than 0.1 | ✗ failed | −0.4000, 95% interval −0.5587 "
        "to −0.2413; 3 runs paired by seed |",
        "| retention.loss at most 2 | ✓ passed | 1 |",
    ]


def test_must_pass_examples_of_equal_predictions_are_the_same_also_without_the_predictions(folder: Path) -> None:
    shutil.rmtree(".dvc/cache")
    shutil.rmtree("data/predictions")
    Path("must_pass.yaml").write_text("- id0\n")
    output = review(folder, "seed")
    assert "passed: no must-pass example is broken; found: the same" in output


def test_a_broken_must_pass_example_fails_the_review(folder: Path) -> None:
    at(folder, "broken", must_pass="- id0\n- id1\n")
    output = review(folder, "before", exit_code=1)
    assert "failed: no must-pass example is broken; found: 1 broken, 1 passing (broken: Say id1.)" in output
    report = Path("review.md").read_text()
    assert "## Must-pass examples\n\n1 broken, 1 passing.\n\n|" in report
    at(folder, "better", must_pass="- Say something else.\n")
    output = review(folder, "before", exit_code=1)
    assert "found: 1 not in the test split (not in the test split: Say something else.); correct must_pass" in output


def test_gates_on_metrics_that_can_not_be_worse_fail_with_the_reason(folder: Path) -> None:
    reasons = {
        "mean_response_tokens": "neither a higher nor a lower mean_response_tokens is worse; only min",
        "accuracy": "undecided, because workspace has no accuracy; it has loss, token_accuracy, pass_rate, ",
        "retention.accuracy": "undecided, because workspace has no retention.accuracy; it has loss, token_accuracy, ",
    }
    at(folder, "worse", gates="".join(f"{name}: {{not_worse_by: 1}}\n" for name in reasons))
    output = " ".join(review(folder, "before", exit_code=1).split())
    for name, reason in reasons.items():
        assert f"failed: {name} not worse than in before by more than 1; found: {reason}" in output


def test_unknown_run_noise_is_reported_with_the_command_that_measures_it(folder: Path) -> None:
    output = review(folder, "seed", "single")
    assert "Test loss: these two models differ; run noise is not known. 2.0300 → 1.8000" in output
    assert "not known; to measure it: dvc exp run -S 'replicate_seeds=[1,2]'" in output
    assert "passed: loss not worse than in seed by more than 0.05; found: −0.2300" in output
    assert "between these two models; run noise is not known" in output
    assert "`dvc exp run -S 'replicate_seeds=[1,2]'`" in Path("review.md").read_text()


def test_replicate_of_another_configuration_is_not_used(folder: Path) -> None:
    run(folder, "git", "checkout", "-q", "single")
    run(folder, "dvc", "checkout", "--force")
    Path("params.yaml").write_text("learning_rate: 1e-4\nseed: 42\nreplicate_seeds: [1, 3, 42]\n")
    lock = Path("dvc.lock").read_text()  # it still has the replicates of `broken`, with the same parameters
    start = lock.index("replicate@1")
    Path("dvc.lock").write_text(lock[:start] + lock[start:].replace("learning_rate: 0.0001", "learning_rate: 0.1", 1))
    comparison = compared("seed", "workspace")
    assert comparison.test.notes == [
        "workspace: the replicate of seed 1 is not used, because it had other inputs than the model (learning_rate); "
        "`dvc repro` runs it again.",
        "workspace: the replicate of seed 3 has not run; `dvc repro` runs it.",
        "workspace: seed 42 occurs twice in seed and replicate_seeds; it counts once.",
    ]
    assert comparison.test.metrics[0].verdict == "unknown"


def test_changed_parameters_stages_samples_and_metrics_are_listed(folder: Path) -> None:
    comparison = compared("before", "better")
    assert [(change.name, change.before, change.after) for change in comparison.params] == [
        ("learning_rate", 0.0001, 0.0002)
    ]
    stage, *replicates = comparison.stages
    assert [replicate.name for replicate in replicates] == ["replicate@1", "replicate@2"]
    assert stage.name == "evaluate@tuned"
    assert stage.changed_inputs == ["learning_rate: 0.0001 → 0.0002"]
    assert stage.changed_outputs == [
        "data/predictions/tuned.parquet",
        "metrics/curve.csv",
        "metrics/evaluate/tuned.json",
    ]
    assert [(sample.name, sample.before, sample.after) for sample in comparison.samples] == [
        ("Name *two* colors.", "Red and green.", "Red and @octocat.")
    ]
    assert [change.name for change in comparison.other_metrics] == ["evaluate/tuned: perplexity"]


def test_most_improved_examples_are_followed_by_those_that_got_most_worse(folder: Path) -> None:
    examples = list(compared("before", "better").examples.itertuples())
    assert len(examples) == 20
    # Half of the examples improved by 0.7, the others got worse by 0.3.
    assert [round(example.change, 6) for example in examples] == [-0.7] * 10 + [0.3] * 10
    first = examples[0]
    number = int(first.prompt.removeprefix("Say id").removesuffix("."))
    assert number % 2 == 1
    assert first.loss_before == pytest.approx(LOSSES[number])
    assert (first.response, first.answer_before, first.answer_after) == ("r", f"answer {number}", f"answer {number}")


def test_workspace_is_compared_by_default(folder: Path) -> None:
    write_revision(folder, LOSSES - 0.2 + ALTERNATING, "9e-4", "Red.")
    output = review(folder, "before")
    assert "better" in output
    report = Path("review.md").read_text()
    assert report.startswith(
        "# Review: `before` → `workspace`\n\n**Test loss: ✓ better. 2.0000 → 1.8000 nats/token, −0.2"
    )
    assert "✓ All gates passed (3)." in report
    assert "| `learning_rate` | `0.0001` | `0.0009` |" in report
    assert [line for line in report.splitlines() if line.startswith("## ")] == [
        "## Gates",
        "## Metrics on the test split",
        "## Metrics on the retention set",
        "## Changed parameters",
        "## Stages that ran again",
        "## Other metrics that changed",
        "## Curves",
        "## Sample answers",
        "## Most improved test examples",
        "## Test examples that got worse the most",
    ]


def test_repeated_reviews_with_plots_give_the_same_bytes(folder: Path) -> None:
    written = []
    for _ in range(2):
        run(folder, "python", "-m", "review", "before", "better", PYTHONPATH=str(ROOT))
        written.append([Path(name).read_bytes() for name in ("review.md", "review.html")])
    assert written[0] == written[1]


def test_without_predictions_everything_but_the_intervals_is_reported(folder: Path) -> None:
    shutil.rmtree(".dvc/cache")
    shutil.rmtree("data/predictions")
    Path("data/test.parquet").unlink()
    output = review(folder, "before", "better", exit_code=1)
    assert (
        "failed: loss not worse than in before by more than 0.05; "
        "found: undecided, because the verdict is 'not measured: no predictions'"
    ) in output
    report = Path("review.md").read_text()
    assert "| loss | 2.0000 | 1.8000 |  |  |  |  | not measured: no predictions |" in report
    assert "| `data/predictions/replicates/1.parquet` | `before` | not in the cache, and there is no remote |" in report
    assert "| `data/predictions/tuned.parquet` | `better` | not in the cache, and there is no remote |" in report
    assert "| `learning_rate` | `0.0001` | `0.0002` |" in report
    assert "```mermaid" in report


def test_a_damaged_metrics_file_is_named_in_the_report(folder: Path) -> None:
    Path("metrics/evaluate/tuned.json").write_text("{")
    output = review(folder, "before", exit_code=1)
    assert "evaluate@tuned: metrics/evaluate/tuned.json changed since it was written" in output
    report = Path("review.md").read_text()
    assert "| `metrics/evaluate/tuned.json` | `workspace` | Expecting property name enclosed in double quotes" in report


@pytest.mark.parametrize(
    ("name", "is_committed"),
    [
        ("dvc.lock", False),
        ("params.yaml", False),
        ("dvc.yaml", False),
        ("dvc.lock", True),
    ],
)
def test_conflict_markers_are_reported_with_file_and_revision(folder: Path, name: str, is_committed: bool) -> None:
    path = Path(name)
    path.write_text(f"<<<<<<< HEAD\n{path.read_text()}=======\n{path.read_text()}>>>>>>> other\n")
    revisions = ["before"]
    if is_committed:
        commit(folder, "conflict")
        run(folder, "git", "tag", "conflict")
        run(folder, "git", "checkout", "-q", "before")
        revisions = ["conflict"]
    output = review(folder, *revisions, exit_code=1)
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert name in error
    assert ("conflict" if is_committed else "workspace") in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "BASE or REV is empty; must be a commit, branch, tag or experiment, or workspace"),
        ("nonsense", "nonsense: unknown Git revision 'nonsense'; must be a commit, branch or tag"),
    ],
)
def test_an_empty_or_unknown_revision_is_reported(folder: Path, name: str, message: str) -> None:
    assert f"error: {message}" in review(folder, name, exit_code=1)


def test_revision_without_results_is_reported(folder: Path) -> None:
    run(folder, "git", "checkout", "-q", "--orphan", "empty")
    run(folder, "git", "rm", "-q", "-r", "--cached", ".")
    run(folder, "git", "commit", "-q", "--allow-empty", "-m", "empty")
    run(folder, "git", "checkout", "-q", "--force", "better")
    output = review(folder, "empty", "better")
    assert "found: nothing to compare with: empty has no metrics/evaluate/tuned.json" in output
    first, *_ = Path("review.md").read_text().split("**Test loss")
    assert "**empty has no params.yaml and no dvc.lock, so there is nothing to compare with.**" in first
    assert "**Passed without a comparison:** loss not worse than in empty by more than 0.05; token" in first


@pytest.mark.parametrize("is_committed", [True, False])
def test_outdated_results_are_named_first_and_no_gate_is_decided(folder: Path, is_committed: bool) -> None:
    at(folder, "single", params="learning_rate: 7e-4\nseed: 42\nreplicate_seeds: []\n")
    if is_committed:
        commit(folder, "forgot dvc repro")
    for revision in ["HEAD", "workspace"] if is_committed else ["workspace"]:
        output = review(folder, "single", revision, exit_code=1)
        problem = "evaluate@tuned: learning_rate in params.yaml changed since it ran"
        assert f"outdated {revision}" in output
        assert f"error: no gate is decided, because {revision} is outdated" in output
        assert output.count(f"found: undecided, because {revision} is outdated") == 3
        first, *_ = Path("review.md").read_text().split("**Test loss: the same")
        assert f"The results of `{revision}` are outdated, so no gate is decided:**" in first
        assert problem.replace("@", "@\N{WORD JOINER}").replace("_", "\\_") in first
    Path("gates.yaml").write_text("")
    assert "error: no gate is decided, because workspace is outdated" in review(folder, "single", exit_code=1)


def test_a_project_in_a_subfolder_gives_the_report_of_one_at_the_root(folder: Path, tmp_path: Path) -> None:
    review(folder, "before", "worse", exit_code=1)
    at_root = Path("review.md").read_text()
    outer = tmp_path / "outer"
    (outer / "team").mkdir(parents=True)
    folder.rename(outer / "team/sft")
    (outer / "team/sft/.git").rename(tmp_path / "history")
    run(outer, "git", "init", "-q", "-b", "main")
    shutil.rmtree(outer / "team/sft/.dvc/tmp")
    for name in ("before", "worse"):
        git = ["git", "--git-dir", str(tmp_path / "history"), "--work-tree", str(outer / "team/sft")]
        run(outer, *git, "checkout", "-q", "--force", name)
        commit(outer, name)
        run(outer, "git", "tag", name)
    review(outer / "team/sft", "before", "worse", exit_code=1)
    assert (outer / "team/sft/review.md").read_text() == at_root


def test_changed_and_deleted_gates_and_must_pass_entries_are_listed_with_what_they_were(folder: Path) -> None:
    at(folder, "single", gates="loss: {not_worse_by: 5}\n", must_pass="- id0\n- id1\n")
    commit(folder, "old")
    at(folder, "HEAD", gates="loss: {not_worse_by: 9, max: 7}\n", must_pass="- id1\n")
    output = review(folder, "HEAD")
    assert "changed conditions  gates.yaml (2), must_pass.yaml (1)" in output
    assert section_of("Changed conditions") == [
        "| `gates.yaml: loss: max` |  | `7` |",
        "| `gates.yaml: loss: not_worse_by` | `5` | `9` |",
        "| `must_pass.yaml: id0` | `listed` |  |",
    ]
    first, *_ = Path("review.md").read_text().split("**Test loss")
    assert "**Changed conditions:** gates.yaml (2), must\\_pass.yaml (1)." in first
    Path("gates.yaml").unlink()
    review(folder, "HEAD")
    assert section_of("Changed conditions")[0] == "| `gates.yaml: loss: not_worse_by` | `5` |  |"


def section_of(title: str) -> list[str]:
    """The rows of the first table in a section of the report."""
    lines = Path("review.md").read_text().split(f"## {title}\n\n")[1].split("\n\n")[0].splitlines()
    return lines[2:]


def test_invalid_conditions_give_a_report_and_those_of_the_reviewed_revision_fail(folder: Path) -> None:
    at(folder, "single", gates="loss: {}\n", must_pass="- 3\n")
    output = review(folder, "single", exit_code=1)
    assert "failed: gates and must-pass entries are valid; found: gates.yaml of workspace:" in output
    assert "must_pass.yaml of workspace: 0: found 3: Input should be a valid string" in " ".join(output.split())
    commit(folder, "invalid")
    run(folder, "git", "tag", "invalid")
    review(folder, "invalid", "single")
    first, *_ = section_of("Changed conditions")
    assert "`gates.yaml of invalid: loss: found {}: Value error, has no condition" in first


def test_both_sides_are_scored_by_the_checks_of_the_reviewed_revision(folder: Path) -> None:
    at(folder, "broken", must_pass="- id1\n")
    rows = pd.read_parquet("data/predictions/tuned.parquet")
    write_scoring(folder, rows[rows["split"] == "test"], check='{"contains": "answer 1"}')  # 11 of 100 answers
    right = rows["answer"].str.contains("answer 1") | (rows["split"] == "retention")
    for path in (PREDICTIONS, REPLICATE.format(seed=1), REPLICATE.format(seed=2)):
        table = pd.read_parquet(path).assign(passed=right.astype(int)).dropna(axis="columns", how="all")
        write_parquet(Path(path), table.to_dict("records"), PREDICTIONS_SCHEMA)
    run(folder, "dvc", "commit", "--force", "--quiet")
    commit(folder, "stricter checks")
    for revision in ("workspace", "HEAD"):
        output = review(folder, "before", revision)
        result = compared("before", revision).test.metric("pass_rate")
        assert result
        assert (result.before, result.after) == pytest.approx((0.11, 0.11))  # before had 1.0 by its own checks
        assert "changed conditions  must_pass.yaml (1), checks (100)" in output
        assert section_of("Changed conditions")[1].startswith(
            '| `checks: Say id0.` | `{"contains": "answer"}` | `{"contains": "answer 1"}` |'
        )
        assert f"Answers of both sides are scored by the checks of {revision}." in Path("review.md").read_text()


def test_an_answer_whose_reasoning_never_closes_also_fails_when_it_is_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    same = {"split": "test", "slice": "s", "prompt": "Q", "response": "Red.", "source": "a.jsonl", "source_row": 1}
    same |= {"check": '{"max_words": 3}', "other_columns": "{}", "truncated": False, "reference_fits": True}
    scored_rows = {("test", name): same | {"example_id": name} for name in "abc"}
    revision: Any = SimpleNamespace(name="main", read_table=lambda path, _: pd.read_parquet(path))

    def passed(predictions: pd.DataFrame) -> list[int]:
        rescoring = Rescoring({"main"}, scored_rows, {}, set())
        scored = rescoring.apply(revision, PREDICTIONS, predictions)
        assert rescoring.apply(revision, PREDICTIONS, predictions) is scored  # for must-pass examples
        return [*scored["passed"]]

    columns = {"split": "test", "example_id": ["a", "b"], "answer": ["", "Red."], "num_answers": 1, "passed": 0}
    predictions = pd.DataFrame(columns)
    assert passed(predictions) == [1, 1]  # an older revision
    predictions["open_reasoning"] = [1.0, 0.0]
    assert passed(predictions) == [0, 1]
    (tmp_path / "data/answers").mkdir(parents=True)
    answers = pd.DataFrame({"split": "test", "example_id": ["a", "b"], "answers": [["", "Red."], ["", ""]]})
    answers["open_reasoning"] = [[True, False], None]  # an older revision has no such column
    answers.to_parquet("data/answers/tuned.parquet")
    predictions["num_answers"] = 2
    assert passed(predictions) == [1, 2]


def test_scorers_run_on_both_sides_only_in_the_workspace(folder: Path) -> None:
    at(folder, "single")
    Path("scorers.py").write_text("def length(prompt, answer, reference, row):\n    return len(answer)\n")
    rows = pd.read_parquet("data/predictions/tuned.parquet").assign(score_length=2.0).dropna(axis="columns", how="all")
    schema = pa.schema([*PREDICTIONS_SCHEMA, ("score_length", pa.float64())])
    write_parquet(Path(PREDICTIONS), rows.to_dict("records"), schema)
    run(folder, "dvc", "commit", "--force", "--quiet")
    commit(folder, "a scorer")
    output = review(folder, "single")
    assert "changed conditions  scorers.py (2)" in output
    assert "    +def length(prompt, answer, reference, row):" in Path("review.md").read_text()
    result = compared("single", "workspace").test.metric("length")
    assert result
    assert result.before == pytest.approx(8.9)  # answer 0 to answer 99
    result = compared("single", "HEAD").test.metric("length")
    assert result
    assert result.verdict == "can't be compared"


def test_equal_revisions_are_named_first(folder: Path) -> None:
    review(folder, "single", "single")
    report = Path("review.md").read_text()
    assert "\n**single and single are the same commit, so nothing was compared.**\n\n**Test loss" in report


def test_damaged_and_unreachable_predictions_give_a_report_with_the_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(folder, "single")
    Path(PREDICTIONS).unlink()
    Path(PREDICTIONS).write_text("not Parquet")
    review(folder, "before", exit_code=1)
    (damaged,) = [row for row in section_of("Not available") if PREDICTIONS in row]
    assert damaged.startswith(f"| `{PREDICTIONS}` | `workspace` | Parquet magic bytes not found in footer.")
    run(folder, "dvc", "remote", "add", "-d", "bucket", "s3://bucket/sft")
    commit(folder, "remote")
    shutil.rmtree(".dvc/cache")
    shutil.rmtree("data")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    Path("no_credentials").touch()
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "no_credentials")
    review(folder, "before", "HEAD", exit_code=1)
    assert f"| `{PREDICTIONS}` | `HEAD` | Unable to locate credentials |" in section_of("Not available")


def test_the_page_shows_verdict_gates_and_metrics_then_the_figure_of_the_metrics(folder: Path) -> None:
    slices = ["a", "b"] * (NUM // 2)
    write_revision(folder, LOSSES - 0.2 + ALTERNATING, "9e-4", "Red.", slice=slices)
    review(folder, "before")
    page = Path("review.html").read_text()
    shown = "Test loss: ✓ better|<h2>(?:Gates|Metrics on the test|Slices of the test)|<figcaption>[^:(]*"
    assert re.findall(shown, page) == [
        "Test loss: ✓ better",
        "<h2>Gates",
        "<h2>Metrics on the test",
        "<figcaption>Metrics",
        "<h2>Slices of the test",
        "<figcaption>Loss ",
    ]


@pytest.mark.parametrize("name", ["main", "origin/main"])
def test_the_advice_for_a_clone_without_the_base_branch_gets_it(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run(repository, "git", "branch", "--force", "change", "better")
    source = f"file://{repository}"
    run(tmp_path, "git", "clone", "-q", "--depth=1", "--branch=change", source, "clone")
    monkeypatch.chdir(tmp_path / "clone")
    with pytest.raises(UserError) as error:
        Revision(name)
    advice = re.findall("`(git fetch .*?)`", str(error.value))
    assert advice == [f"git fetch origin main:{name}", "git fetch --unshallow"]
    run(tmp_path / "clone", *advice[0].split())
    assert Revision(name).read("params.yaml") == (repository / "params.yaml").read_bytes()
    with pytest.raises(UserError, match="unknown Git revision"):
        Revision("HEAD~1")
    run(tmp_path / "clone", *advice[1].split())
    assert Revision("HEAD~1").read("params.yaml")
