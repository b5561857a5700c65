"""The pipeline through the real `dvc`, in a temporary clone with a tiny model."""

import hashlib
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.chaos import running_stages
from tests.clone import (
    EVERY_STAGE,
    copy_clone,
    edit,
    environment,
    lock_hashes,
    make_clone,
    run,
    run_pipeline,
    stages_run,
)
from tests.fork_server import FORK_ENVIRONMENT

pytestmark = pytest.mark.subprocess


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, with_experiment: Path) -> Path:
    """A clone in which the pipeline has run and its results are committed; tests leave it as they find it."""
    return copy_clone(with_experiment, tmp_path_factory.mktemp("pipeline") / "clone")


def results(folder: Path) -> dict[str, str]:
    return lock_hashes((folder / "dvc.lock").read_text())


def restore(clone: Path) -> None:
    run(clone, "git", "checkout", "-q", "HEAD", ".")  # also what DVC has staged
    run(clone, "dvc", "checkout", "--force", "--quiet")


def test_a_run_elsewhere_writes_all_outputs_with_the_same_hashes(
    clone: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> None:
    """Another folder, home and user; `dvc repro` in forks, which have another hash seed, locale and time zone."""
    other = make_clone(tmp_path_factory.mktemp("an other földer"), tiny_model)
    home = str(tmp_path_factory.mktemp("home"))
    result = run(other, "dvc", "repro", HOME=home, USER="some", LOGNAME="some", **FORK_ENVIRONMENT)
    assert stages_run(result) == sorted(EVERY_STAGE)
    assert "WARNING" not in result.stdout + result.stderr
    assert results(other) == results(clone)


def test_git_tracks_only_small_outputs(clone: Path) -> None:
    tracked = run(clone, "git", "ls-files").stdout.split()
    assert [name for name in tracked if name.endswith((".parquet", ".safetensors"))] == []
    assert {"dvc.lock", "metrics/train.json", "metrics/samples/tuned.md"} <= set(tracked)
    assert run(clone, "git", "status", "--porcelain").stdout == ""


@pytest.mark.parametrize(
    ("file", "line", "stages"),
    [
        (
            "stages/checks/kinds.py",
            "# edited\n",
            ["download_dataset", "evaluate@base", "evaluate@tuned", "format", "split"],
        ),
        ("templates/plain.jinja", "{# edited #}\n", ["format"]),
    ],
)
def test_a_new_kind_of_check_needs_no_model_and_a_template_that_is_not_selected_does_not_train(
    clone: Path, file: str, line: str, stages: list[str]
) -> None:
    with (clone / file).open("a") as opened:
        opened.write(line)
    assert stages_run(run(clone, "dvc", "repro")) == stages
    restore(clone)


def edit_test_row(clone: Path, **columns: object) -> None:
    """Change columns of the first row of the test split, in the source."""
    import pyarrow.parquet as pq

    line = pq.read_table(clone / "data/test.parquet").column("source_row")[0].as_py()
    data = clone / "data/instructions.jsonl"
    lines = data.read_text(encoding="utf-8").splitlines()
    lines[line - 1] = json.dumps(json.loads(lines[line - 1]) | columns)
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_an_answer_edited_in_the_test_split_does_not_train(clone: Path) -> None:
    edit_test_row(clone, output="A corrected answer.")
    result = run(clone, "dvc", "repro")
    assert stages_run(result) == [
        "download_dataset",
        "evaluate@base",
        "evaluate@tuned",
        "format",
        "predict@base",
        "predict@tuned",
        "score_rows",
        "split",
    ]
    restore(clone)


def test_a_changed_check_or_scorer_needs_no_model(clone: Path) -> None:
    edit_test_row(clone, check={"max_words": 99})
    result = run(clone, "dvc", "repro")
    assert stages_run(result) == [
        "download_dataset",
        "evaluate@base",
        "evaluate@tuned",
        "format",
        "score_rows",
        "split",
    ]
    (clone / "scorers.py").write_text("def brief(prompt, answer, reference, row): return len(answer) < 50\n")
    result = run(clone, "dvc", "repro")
    assert stages_run(result) == ["evaluate@base", "evaluate@tuned"]
    assert "brief_se" in json.loads((clone / "metrics/evaluate/tuned.json").read_text())["retention"]
    restore(clone)


def test_an_experiment_is_compared_with_dvc_and_its_results_are_in_the_run_cache(clone: Path) -> None:
    shown = json.loads(run(clone, "dvc", "metrics", "diff", "main", "slow", "--json").stdout)
    assert set(shown) <= {"metrics/evaluate/tuned.json", "metrics/train.json"}
    assert shown["metrics/evaluate/tuned.json"]["loss"]["diff"] > 0
    params = json.loads(run(clone, "dvc", "params", "diff", "main", "slow", "--json").stdout)
    assert params["params.yaml"] == {"learning_rate": {"old": 0.001, "new": 1e-05, "diff": -0.00099}}

    assert stages_run(run(clone, "dvc", "repro")) == []
    edit(clone, learning_rate="1e-05")
    result = run(clone, "dvc", "repro", "evaluate@tuned")
    assert stages_run(result) == []
    assert "Stage 'train' is cached - skipping run, checking out outputs" in result.stdout
    restore(clone)
    assert run(clone, "git", "status", "--porcelain").stdout == ""


def test_a_mistake_in_a_parameter_is_found_before_an_output_is_deleted(clone: Path) -> None:
    before = results(clone)
    result = run(clone, "dvc", "exp", "run", "-S", "learning_rate=-1", check=False)
    assert stages_run(result) == ["check_params"]
    assert "learning_rate: found -1" in result.stderr
    restore(clone)
    edit(clone, lr_scheduler="quadratic")
    assert stages_run(run(clone, "dvc", "repro", check=False)) == ["check_params"]
    assert (clone / "models/tuned/config.json").exists()
    restore(clone)
    assert results(clone) == before


def test_a_new_replicate_seed_trains_only_that_run(clone: Path) -> None:
    edit(clone, replicate_seeds="[1]")
    assert stages_run(run(clone, "dvc", "repro")) == ["check_params", "evaluate_replicate@1", "replicate@1"]
    edit(clone, replicate_seeds="[1, 2]")
    assert stages_run(run(clone, "dvc", "repro")) == ["check_params", "evaluate_replicate@2", "replicate@2"]
    found = results(clone)
    assert len({found[f"data/predictions/{name}.parquet"] for name in ("tuned", "replicates/1", "replicates/2")}) == 3
    edit(clone, seed="7")
    assert "replicate" not in run(clone, "dvc", "status").stdout  # it does not depend on the seed of train
    restore(clone)


def tuned_hash(clone: Path, name: str) -> str:
    """MD5 of the weights in an experiment, from the cache."""
    refs = run(clone, "git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
    (ref,) = [ref for ref in refs if ref.endswith(f"/{name}")]
    lock = lock_hashes(run(clone, "git", "show", f"{ref}:dvc.lock").stdout)["models/tuned"]
    files = json.loads((clone / ".dvc/cache/files/md5" / lock[:2] / lock[2:]).read_text())
    return str(next(file["md5"] for file in files if file["relpath"] == "model.safetensors"))


def test_a_killed_experiment_in_a_copy_resumes_in_another_copy_to_the_same_bytes(clone: Path) -> None:
    """Experiments of `--temp`, and of `--queue` (test_sweep.py), run in copies and share the project's checkpoints."""
    changes = ("-S", "learning_rate=0.003", "-S", "num_epochs=2", "-S", "save_steps=2", "train")
    shutil.rmtree(clone / ".scratch", ignore_errors=True)
    quiet = subprocess.DEVNULL
    command = ["dvc", "exp", "run", "--temp", "-n", "killed", *changes]
    with subprocess.Popen(command, cwd=clone, env=environment(), stdout=quiet, stderr=quiet) as killed:
        while len(list(clone.glob(".scratch/train/*/step-*"))) < 2:
            assert killed.poll() is None
            time.sleep(0.02)
        (training,) = [process for folder in clone.glob(".dvc/tmp/exps/**/tmp*") for process in running_stages(folder)]
        training.kill()
    assert killed.returncode != 0
    (checkpoint, _) = clone.glob(".scratch/train/*/step-*")

    run(clone, "dvc", "exp", "run", "--temp", "-n", "resumed", *changes)
    experiments = run(clone, "dvc", "exp", "list", "--name-only").stdout.split()
    assert "resumed" in experiments and "killed" not in experiments
    (finished,) = clone.glob(".scratch/train/*/finished")
    assert finished.parent == checkpoint.parent

    # The same without an interruption, in this process.
    shutil.rmtree(clone / ".scratch")
    edit(clone, learning_rate="0.003", num_epochs="2", save_steps="2")
    run_pipeline(clone, "train")
    weights = (clone / "models/tuned/model.safetensors").read_bytes()
    assert tuned_hash(clone, "resumed") == hashlib.md5(weights).hexdigest()
    run(clone, "dvc", "exp", "remove", "resumed")
    restore(clone)


def test_a_failing_stage_reports_its_message_and_keeps_the_last_results(clone: Path) -> None:
    before = (clone / "dvc.lock").read_bytes()
    data = clone / "data/instructions.jsonl"
    good = data.read_bytes()
    data.write_bytes(b'{"instruction": "A"}\n' * 3 + good.splitlines(True)[0])
    failed = run(clone, "dvc", "repro", check=False)
    assert failed.returncode != 0
    assert "error: data/instructions.jsonl: 3 of 4 rows can't be trained on (missing_field: 3)" in failed.stderr
    assert "Traceback" not in failed.stderr
    data.write_bytes(good)
    assert stages_run(run(clone, "dvc", "repro")) == []
    assert (clone / "dvc.lock").read_bytes() == before
    assert hashlib.md5((clone / "data/raw.parquet").read_bytes()).hexdigest() == results(clone)["data/raw.parquet"]
    assert run(clone, "dvc", "status").stdout == "Data and pipelines are up to date.\n"


def test_cleaning_and_garbage_collection_lose_no_committed_result(clone: Path) -> None:
    before = results(clone)
    run(clone, "dvc", "exp", "run", "-S", "validation_fraction=0.2", "split")
    restore(clone)
    (clone / "data/.raw.parquet.partial").write_bytes(b"half")
    (clone / ".scratch/train/0123").mkdir(parents=True)
    (clone / ".scratch/train/0123/step-00000001").write_bytes(b"x" * 100_000)
    (clone / ".scratch/train/0123.lock").touch()
    size = sum(path.stat().st_size for path in (clone / ".dvc/cache/files").rglob("*"))
    cleaned = run(clone, "python", "-m", "tools.clean", PYTHONPATH=str(clone)).stdout
    assert "data/.raw.parquet.partial: deleted" in cleaned
    assert "kB of checkpoints deleted" in cleaned
    assert [path.name for path in (clone / ".scratch/train").iterdir() if path.is_dir()] == []
    run(clone, "dvc", "exp", "remove", "--all-commits")
    run(clone, "dvc", "gc", "--workspace", "--all-commits", "--force")
    assert sum(path.stat().st_size for path in (clone / ".dvc/cache/files").rglob("*")) < size
    for folder in ("data", "models"):
        run(clone, "git", "clean", "-fdxq", folder)
    run(clone, "dvc", "checkout")
    assert stages_run(run(clone, "dvc", "repro")) == []
    assert results(clone) == before
