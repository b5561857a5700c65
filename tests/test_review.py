"""`make review` in a repository of six commits with known differences."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from review.comparison import Comparison, compare_revisions
from review.revisions import Revision
from review.verdicts import PREDICTIONS
from stages.data.alpaca import render_alpaca
from stages.evaluate import PREDICTIONS_SCHEMA, compute_metrics
from tests.clone import ROOT, commit, run

pytestmark = pytest.mark.subprocess
NUM = 100
LOSSES = np.linspace(1, 3, NUM)
ALTERNATING = np.tile([0.5, -0.5], NUM // 2)
PIPELINE = """\
stages:
  evaluate:
    cmd: "true"
    params: [learning_rate]
    outs: [data/predictions/tuned.parquet, data/test.parquet]
    metrics:
      - metrics/evaluate/tuned.json: {cache: false}
    plots:
      - metrics/curve.csv: {cache: false, x: step, y: loss, title: Loss, x_label: step, y_label: nats/token}
"""
SAMPLES = "# Answers of the tuned model\n\nAt most 64 tokens.\n\n## Name \\*two\\* colors.\n\n    {answer}\n"


def write_revision(folder: Path, losses: Any, learning_rate: str, answer: str, **changes: Any) -> None:
    """Write the files that the stages would write.

    Args:
        changes: other values of columns of the predictions, as lists.
    """
    rows: list[dict[str, Any]] = [
        {
            "example_id": f"id{n}",
            "loss": float(loss),
            "tokens": 10,
            "correct_tokens": 5,
            "answer": f"answer {n}",
            "answer_tokens": 8,
            "stopped": True,
            "exact_match": False,
            "rouge_l": 0.5,
        }
        for n, loss in enumerate(losses)
    ]
    for column, values in changes.items():
        for row, value in zip(rows, values, strict=True):
            row[column] = value
    texts = [
        {
            "example_id": row["example_id"],
            "prompt": render_alpaca(f"Say {row['example_id']}."),
            "response": "r",
        }
        for row in rows
    ]
    for path in ("data/predictions", "metrics/evaluate", "metrics/samples"):
        (folder / path).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, PREDICTIONS_SCHEMA), folder / PREDICTIONS)
    pq.write_table(pa.Table.from_pylist(texts), folder / "data/test.parquet")
    (folder / "metrics/evaluate/tuned.json").write_text(json.dumps(compute_metrics(rows)))
    (folder / "metrics/samples/tuned.md").write_text(SAMPLES.format(answer=answer))
    (folder / "metrics/curve.csv").write_text(
        "step,loss,validation_loss,learning_rate,gradient_norm\n"
        f"1,{losses[0]},,0.1,1\n2,{losses[1]},{losses[2]},0.1,1\n3,{losses[3]},{losses[4]},0.1,1\n"
    )
    (folder / "params.yaml").write_text(f"learning_rate: {learning_rate}\n")
    run(folder, "dvc", "commit", "--force", "--quiet")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, fast_stages: None) -> Path:
    folder = tmp_path_factory.mktemp("review")
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "dvc", "init", "--quiet")
    (folder / "dvc.yaml").write_text(PIPELINE)
    shutil.copy(ROOT / "gates.yaml", folder / "gates.yaml")
    (folder / ".gitignore").write_text("/data/\n/review.*\n.scratch/\n")
    (folder / "data").mkdir()
    (folder / "data/.gitignore").write_text("*\n")
    revisions: dict[str, dict[str, Any]] = {
        "before": {"losses": LOSSES, "learning_rate": "1e-4", "answer": "Red and green."},
        "better": {"losses": LOSSES - 0.2 + ALTERNATING, "learning_rate": "2e-4", "answer": "Red and @octocat."},
        "noise": {"losses": LOSSES - 0.03 + ALTERNATING, "learning_rate": "3e-4", "answer": "Red and green."},
        "worse": {
            "losses": LOSSES + 0.2,
            "learning_rate": "4e-4",
            "answer": "Red.",
            "stopped": [n > 9 for n in range(NUM)],
        },
        "fewer": {"losses": LOSSES[:60] + 0.2, "learning_rate": "1e-4", "answer": "Red."},
        "tokens": {"losses": LOSSES, "learning_rate": "1e-4", "answer": "Red.", "tokens": [11] * 40 + [10] * 60},
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
    return compare_revisions(Revision(before), Revision(after))


def review(folder: Path, *revisions: str, exit_code: int = 0) -> str:
    """Run it as `make` does, and return its output, which must not contain a traceback."""
    result = run(folder, "python", "-m", "review", *revisions, check=False, PYTHONPATH=str(ROOT))
    assert "Traceback" not in result.stderr
    assert result.returncode == exit_code, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_significantly_better_model_is_better(folder: Path) -> None:
    result = compared("before", "better").metric("loss")
    assert result.verdict == "better"
    assert result.difference
    assert result.difference.value == pytest.approx(-0.2)
    # 1.96 standard errors of 100 differences with a standard deviation of 0.5.
    assert result.difference.low == pytest.approx(-0.298, abs=0.01)
    assert result.difference.high == pytest.approx(-0.102, abs=0.01)


def test_insignificant_difference_is_within_noise(folder: Path) -> None:
    assert compared("before", "noise").metric("loss").verdict == "within noise"


def test_significantly_worse_model_is_worse_and_fails_the_gates(folder: Path) -> None:
    comparison = compared("before", "worse")
    verdicts = {result.metric.name: result.verdict for result in comparison.metrics}
    assert verdicts == {
        "loss": "worse",
        "token_accuracy": "the same",
        "exact_match": "the same",
        "rouge_l": "the same",
        "stop_rate": "worse",
        "mean_response_tokens": "the same",
    }
    output = review(folder, "before", "worse", exit_code=1)
    assert "error: 2 of 3 gates failed; details are in review.md, the gates in gates.yaml" in output
    assert "failed: loss not worse than in before by more than noise; found: worse" in output
    assert "failed: stop_rate at least 0.95; found: 0.9" in output
    assert "❌ failed" in Path("review.md").read_text()  # the report is written even so


def test_swapping_the_revisions_swaps_better_and_worse(folder: Path) -> None:
    assert compared("better", "before").metric("loss").verdict == "worse"


def test_only_common_examples_of_different_test_sets_are_compared(folder: Path) -> None:
    comparison = compared("before", "fewer")
    result = comparison.metric("loss")
    assert not comparison.same_test_set
    # The mean of the 60 common examples, which have low losses; over all examples of `before` it is 2.
    assert result.before == pytest.approx(1.59596, abs=1e-5)
    assert result.difference
    assert result.difference.value == pytest.approx(0.2)
    assert comparison.notes == [
        "The test sets differ: before has 100 examples, fewer 60. Only the 60 common ones are compared, so the values "
        "differ from those in metrics/evaluate/tuned.json."
    ]


def test_per_token_metrics_over_different_tokens_are_not_compared(folder: Path) -> None:
    comparison = compared("before", "tokens")
    assert comparison.metric("loss").verdict == "can't be compared"
    assert comparison.metric("token_accuracy").verdict == "can't be compared"
    assert comparison.metric("rouge_l").verdict == "the same"
    assert "40 of 100 examples differ in their number of supervised tokens" in comparison.notes[0]


def test_changed_parameters_stages_samples_and_metrics_are_listed(folder: Path) -> None:
    comparison = compared("before", "better")
    assert [(change.name, change.before, change.after) for change in comparison.params] == [
        ("learning_rate", 0.0001, 0.0002)
    ]
    (stage,) = comparison.stages
    assert stage.name == "evaluate"
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
    examples = compared("before", "better").examples
    assert len(examples) == 20
    # Half of the examples improved by 0.7, the others got worse by 0.3.
    assert [round(example.change, 6) for example in examples] == [-0.7] * 10 + [0.3] * 10
    first = examples[0]
    number = int(first.prompt.removeprefix("Say id").removesuffix("."))
    assert number % 2 == 1
    assert first.loss_before == pytest.approx(LOSSES[number])
    assert (first.reference, first.answer_before, first.answer_after) == ("r", f"answer {number}", f"answer {number}")


def test_workspace_is_compared_by_default(folder: Path) -> None:
    write_revision(folder, LOSSES - 0.2 + ALTERNATING, "9e-4", "Red.")
    output = review(folder, "before")
    assert "better" in output
    report = Path("review.md").read_text()
    assert report.startswith("# Review: `before` → `workspace`\n\n**Test loss: ✅ better, 2.0000 → 1.8000, −0.2000 ")
    assert "| `learning_rate` | `0.0001` | `0.0009` |" in report
    assert [line for line in report.splitlines() if line.startswith("## ")] == [
        "## Gates",
        "## Metrics on the test split",
        "## Changed parameters",
        "## Stages that ran again",
        "## Other metrics that changed",
        "## Curves",
        "## Sample answers",
        "## Most improved test examples",
        "## Test examples that got worse the most",
    ]


def test_repeated_review_gives_the_same_bytes(folder: Path) -> None:
    review(folder, "before", "better")
    first = [Path(name).read_bytes() for name in ("review.md", "review.html")]
    review(folder, "before", "better")
    assert first == [Path(name).read_bytes() for name in ("review.md", "review.html")]


def test_without_predictions_everything_but_the_intervals_is_reported(folder: Path) -> None:
    shutil.rmtree(".dvc/cache")
    shutil.rmtree("data/predictions")
    Path("data/test.parquet").unlink()
    output = review(folder, "before", "better")
    assert "passed: loss not worse than in before by more than noise; found: not worse" in output
    report = Path("review.md").read_text()
    assert "| loss | 2.0000 | 1.8000 |  |  | not known: no predictions |" in report
    assert "**Not available**: `data/predictions/tuned.parquet` of `before`" in report
    assert "`dvc pull --all-commits data/predictions/tuned.parquet`" in report
    assert "| `learning_rate` | `0.0001` | `0.0002` |" in report
    assert "```mermaid" in report
    # With the revisions swapped, the loss rose. Whether this is noise can't be decided, so the gate fails.
    output = review(folder, "better", "before", exit_code=1)
    assert (
        "failed: loss not worse than in better by more than noise; "
        "found: can't be decided (not known: no predictions): `dvc pull`, then review again"
    ) in output


def test_damaged_file_is_named_with_its_revision(folder: Path) -> None:
    Path("metrics/evaluate/tuned.json").write_text("{")
    output = review(folder, "before", exit_code=1)
    assert "error: metrics/evaluate/tuned.json of workspace: can't be read: Expecting property name" in output


def test_unknown_revision_is_reported(folder: Path) -> None:
    output = review(folder, "nonsense", exit_code=1)
    assert "error: nonsense: unknown Git revision 'nonsense'; must be a commit, branch or tag" in output


def test_revision_without_results_is_reported(folder: Path) -> None:
    run(folder, "git", "checkout", "-q", "--orphan", "empty")
    run(folder, "git", "rm", "-q", "-r", "--cached", ".")
    run(folder, "git", "commit", "-q", "--allow-empty", "-m", "empty")
    run(folder, "git", "checkout", "-q", "--force", "better")
    output = review(folder, "empty", "better")
    assert "found: nothing to compare with: empty has no metrics/evaluate/tuned.json" in output
