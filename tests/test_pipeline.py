"""The pipeline end to end, through DVC, in a temporary clone with a tiny model."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.test_params import edit

ROOT = Path(__file__).parent.parent
EVERY_STAGE = [
    "download_dataset",
    "download_model",
    "format",
    "split",
    "train",
    "evaluate@base",
    "evaluate@tuned",
    "generate@base",
    "generate@tuned",
]


def run(folder: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    bin_folder = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "GIT_CONFIG_GLOBAL": "/dev/null"}
    env |= {f"GIT_{who}_{what}": "test@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0 or not check, result.stdout + result.stderr
    return result


def stages_run(result: subprocess.CompletedProcess[str]) -> list[str]:
    return sorted(re.findall(r"^Running stage '(.+)':", result.stdout, re.MULTILINE))


def make_clone(folder: Path, tiny_model: Path) -> Path:
    """The project's tracked files as they are here, committed in a repository of their own; tiny model, little data."""
    for name in run(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard").stdout.splitlines():
        if name.startswith(("stages/", "data/", "models/", ".dvc")) or name in (
            "dvc.yaml",
            "params.yaml",
            ".gitignore",
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    rows = (folder / "data/instructions.jsonl").read_text(encoding="utf-8").splitlines()[:120]
    (folder / "data/instructions.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    edit(
        folder, model_name=str(tiny_model), max_new_tokens="4", batch_size="16", learning_rate="1e-3", max_length="512"
    )
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", "start")
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A clone in which `dvc repro` has run once, and its result is committed."""
    folder = make_clone(tmp_path_factory.mktemp("clone"), tiny_model)
    assert stages_run(run(folder, "dvc", "repro")) == sorted(EVERY_STAGE)
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", "results")
    return folder


def lock_hashes(folder: Path) -> dict[str, str]:
    stages = YAML(typ="safe").load((folder / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}


def test_all_outputs_are_there_and_git_holds_only_the_small_ones(clone: Path) -> None:
    assert set(lock_hashes(clone)) == {
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
        "metrics/train_curve.csv",
        "metrics/validation_curve.csv",
        "data/predictions/base.parquet",
        "data/predictions/tuned.parquet",
        "metrics/evaluate/base.json",
        "metrics/evaluate/tuned.json",
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


def test_another_folder_gives_the_same_hashes(
    clone: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("LC_ALL", "C")
    other = make_clone(tmp_path_factory.mktemp("another"), tiny_model)
    run(other, "dvc", "repro")
    assert lock_hashes(other) == lock_hashes(clone)


def test_an_experiment_runs_what_the_parameter_affects_and_going_back_trains_nothing(clone: Path) -> None:
    before = lock_hashes(clone)
    result = run(clone, "dvc", "exp", "run", "-S", "learning_rate=1e-05")
    assert stages_run(result) == ["evaluate@tuned", "generate@tuned", "train"]
    assert lock_hashes(clone)["models/tuned"] != before["models/tuned"]

    shown = json.loads(run(clone, "dvc", "metrics", "diff", "HEAD", "--json").stdout)
    assert set(shown) <= {"metrics/evaluate/tuned.json", "metrics/train.json"}
    assert shown["metrics/evaluate/tuned.json"]["loss"]["diff"] > 0
    params = json.loads(run(clone, "dvc", "params", "diff", "HEAD", "--json").stdout)
    assert params["params.yaml"] == {"learning_rate": {"old": 0.001, "new": 1e-05, "diff": -0.00099}}

    back = run(clone, "dvc", "exp", "run", "-S", "learning_rate=0.001")
    # The samples lie in git, not in the cache: generate writes them anew, from the restored model.
    assert stages_run(back) == ["generate@tuned"]
    assert lock_hashes(clone) == before
    assert run(clone, "git", "status", "--porcelain", "dvc.lock", "metrics").stdout == ""


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
    assert hashlib.md5((clone / "data/raw.parquet").read_bytes()).hexdigest() == lock_hashes(clone)["data/raw.parquet"]
    assert run(clone, "dvc", "status").stdout == "Data and pipelines are up to date.\n"


def test_what_lies_in_git_can_be_checked_without_cache(clone: Path, tmp_path: Path) -> None:
    run(clone, "git", "clone", "-q", str(clone), str(tmp_path / "review"))
    result = run(tmp_path / "review", "dvc", "repro", "--dry", "--allow-missing")
    assert stages_run(result) == []
