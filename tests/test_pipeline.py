"""The pipeline end to end, through DVC, in a temporary clone with a tiny model."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos import running_stages
from tests.clone import commit, copy_clone, environment, lock_hashes, make_clone, run, stages_run
from tests.test_params import edit


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, ran: Path) -> Path:
    """A clone in which `dvc repro` has run once, and its result is committed."""
    folder = copy_clone(ran, tmp_path_factory.mktemp("pipeline") / "clone")
    commit(folder, "results")
    return folder


def results(folder: Path) -> dict[str, str]:
    return lock_hashes((folder / "dvc.lock").read_text())


def test_all_outputs_are_there_and_git_holds_only_the_small_ones(clone: Path) -> None:
    assert set(results(clone)) == {
        "data/raw.parquet",
        "data/unreadable.parquet",
        "data/source.json",
        "models/base",
        "models/tokenizer",
        "data/formatted.parquet",
        "data/left_out.parquet",
        "metrics/format.json",
        "metrics/lengths.csv",
        "data/train.parquet",
        "data/validation.parquet",
        "data/test.parquet",
        "metrics/split.json",
        "models/tuned",
        "metrics/train.json",
        "metrics/curve.csv",
        "data/predictions/base.parquet",
        "data/predictions/tuned.parquet",
        "metrics/evaluate/base.json",
        "metrics/evaluate/tuned.json",
        "metrics/evaluate/base.csv",
        "metrics/evaluate/tuned.csv",
        "metrics/samples/base.md",
        "metrics/samples/tuned.md",
    }
    tracked = run(clone, "git", "ls-files").stdout.split()
    assert [name for name in tracked if name.endswith((".parquet", ".safetensors"))] == []
    assert {"dvc.lock", "metrics/train.json", "metrics/samples/tuned.md"} <= set(tracked)
    assert run(clone, "git", "status", "--porcelain").stdout == ""


def test_a_second_run_does_nothing(clone: Path) -> None:
    assert stages_run(run(clone, "dvc", "repro")) == []
    assert run(clone, "dvc", "status").stdout == "Data and pipelines are up to date.\n"


def test_every_example_of_the_test_split_has_a_prediction(clone: Path) -> None:
    import pyarrow.parquet as pq

    expected = pq.read_table(clone / "data/test.parquet").column("example_id").to_pylist()
    for model in ("base", "tuned"):
        table = pq.read_table(clone / f"data/predictions/{model}.parquet")
        assert table.column("example_id").to_pylist() == expected
        metrics = json.loads((clone / f"metrics/evaluate/{model}.json").read_text())
        losses = zip(table.column("loss").to_pylist(), table.column("tokens").to_pylist(), strict=True)
        assert metrics["loss"] == pytest.approx(sum(loss * n for loss, n in losses) / metrics["supervised_tokens"])


def test_another_folder_user_locale_time_zone_and_hash_seed_give_the_same_hashes(
    clone: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> None:
    other = make_clone(tmp_path_factory.mktemp("an other földer"), tiny_model)
    home = str(tmp_path_factory.mktemp("home"))
    changes = {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C", "HOME": home}
    run(other, "dvc", "repro", **changes, USER="somebody", LOGNAME="somebody")
    assert results(other) == results(clone)


def test_an_experiment_runs_what_the_parameter_affects_and_going_back_trains_nothing(clone: Path) -> None:
    before = results(clone)
    result = run(clone, "dvc", "exp", "run", "-S", "learning_rate=1e-05")
    assert stages_run(result) == ["evaluate@tuned", "generate@tuned", "train"]
    assert results(clone)["models/tuned"] != before["models/tuned"]

    shown = json.loads(run(clone, "dvc", "metrics", "diff", "HEAD", "--json").stdout)
    assert set(shown) <= {"metrics/evaluate/tuned.json", "metrics/train.json"}
    assert shown["metrics/evaluate/tuned.json"]["loss"]["diff"] > 0
    params = json.loads(run(clone, "dvc", "params", "diff", "HEAD", "--json").stdout)
    assert params["params.yaml"] == {"learning_rate": {"old": 0.001, "new": 1e-05, "diff": -0.00099}}

    back = run(clone, "dvc", "exp", "run", "-S", "learning_rate=0.001")
    # The samples lie in git, not in the cache: generate writes them anew, from the restored model.
    assert stages_run(back) == ["generate@tuned"]
    assert results(clone) == before
    assert run(clone, "git", "status", "--porcelain", "dvc.lock", "metrics").stdout == ""


def kill_training(clone: Path) -> None:
    """Kill the training stage of an experiment that runs in a copy, once it has saved two checkpoints."""
    deadline = time.monotonic() + 120
    while len(list(clone.glob(".scratch/train/*/step-*"))) < 2:
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)
    (training,) = [process for folder in clone.glob(".dvc/tmp/exps/**/tmp*") for process in running_stages(folder)]
    training.kill()


def tuned_hash(clone: Path, name: str) -> str:
    """MD5 of the weights in an experiment, from the cache."""
    refs = run(clone, "git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
    (ref,) = [ref for ref in refs if ref.endswith(f"/{name}")]
    lock = lock_hashes(run(clone, "git", "show", f"{ref}:dvc.lock").stdout)["models/tuned"]
    files = json.loads((clone / ".dvc/cache/files/md5" / lock[:2] / lock[2:]).read_text())
    return str(next(file["md5"] for file in files if file["relpath"] == "model.safetensors"))


@pytest.mark.parametrize("kind", ["--temp", "--queue"])
def test_an_experiment_in_a_copy_goes_on_after_a_kill_to_the_same_bytes(clone: Path, kind: str) -> None:
    learning_rate = {"--temp": "0.002", "--queue": "0.003"}[kind]
    changes = ("-S", f"learning_rate={learning_rate}", "-S", "num_epochs=6", "train")
    shutil.rmtree(clone / ".scratch")

    def start(name: str) -> subprocess.Popen[bytes]:
        command = ["dvc", "exp", "run", kind, "-n", name, *changes]
        if kind == "--queue":
            run(clone, *command)
            command = ["dvc", "queue", "start"]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, cwd=clone, env=environment(), stdout=quiet, stderr=quiet)

    def wait(process: subprocess.Popen[bytes], name: str) -> str:
        process.wait()
        while re.search(rf"{name} .*(Queued|Running)", run(clone, "dvc", "queue", "status").stdout):
            time.sleep(0.5)
        return run(clone, "dvc", "exp", "list").stdout

    first = start("killed")
    kill_training(clone)
    assert "killed" not in wait(first, "killed")
    checkpoints = sorted(clone.glob(".scratch/train/*/step-*"))
    assert "resumed" in wait(start("resumed"), "resumed")
    (finished,) = clone.glob(".scratch/train/*/finished")
    assert finished.parent == checkpoints[0].parent

    # The same without an interruption, in the workspace and past DVC, which would find it in its cache.
    shutil.rmtree(clone / ".scratch")
    edit(clone, learning_rate=learning_rate, num_epochs="6")
    run(clone, sys.executable, "-m", "stages.train", PYTHONPATH=str(clone))
    weights = (clone / "models/tuned/model.safetensors").read_bytes()
    assert tuned_hash(clone, "resumed") == hashlib.md5(weights).hexdigest()
    run(clone, "git", "checkout", "-q", ".")
    run(clone, "dvc", "checkout", "--force")
    run(clone, "dvc", "exp", "remove", "resumed")


def test_a_failing_stage_leaves_its_message_and_the_last_results(clone: Path) -> None:
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


def test_what_lies_in_git_can_be_checked_without_cache(clone: Path, tmp_path: Path) -> None:
    run(clone, "git", "clone", "-q", str(clone), str(tmp_path / "review"))
    result = run(tmp_path / "review", "dvc", "repro", "--dry", "--allow-missing")
    assert stages_run(result) == []


def test_cleaning_and_collecting_garbage_lose_no_committed_result(clone: Path) -> None:
    before = results(clone)
    run(clone, "dvc", "exp", "run", "-S", "max_new_tokens=3", "evaluate@base")
    run(clone, "git", "checkout", "-q", ".")
    run(clone, "dvc", "checkout", "--force")
    (clone / "data/.raw.parquet.partial").write_bytes(b"half")
    size = sum(path.stat().st_size for path in (clone / ".dvc/cache/files").rglob("*"))
    cleaned = run(clone, sys.executable, "-m", "stages.clean", PYTHONPATH=str(clone)).stdout
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
