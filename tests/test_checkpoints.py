"""Checkpoints: found again by the same run, never by another."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.shared.checkpoints import Checkpoints, fingerprint
from stages.shared.errors import UserError

DVC_YAML = "stages:\n  train:\n    deps: [data/train.parquet, models/base]\n"


@pytest.fixture
def inputs(project: Path) -> Path:
    (project / "dvc.yaml").write_text(DVC_YAML)
    (project / "data/train.parquet").write_bytes(b"rows")
    (project / "models/base").mkdir(parents=True)
    (project / "models/base/weights").write_bytes(b"weights")
    return project


def test_the_fingerprint_changes_with_parameters_and_inputs(inputs: Path) -> None:
    first = fingerprint("train", {"seed": 1})
    assert fingerprint("train", {"seed": 1}) == first
    assert fingerprint("train", {"seed": 2}) != first
    (inputs / "models/base/weights").write_bytes(b"others")
    assert fingerprint("train", {"seed": 1}) != first


def test_a_run_goes_on_from_its_newest_checkpoint_and_keeps_two(inputs: Path) -> None:
    with pytest.raises(RuntimeError), Checkpoints.opened("train", {"seed": 1}) as checkpoints:
        assert checkpoints.load() is None
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": torch.full((2,), step)}, {"step": step})
        raise RuntimeError
    with pytest.raises(RuntimeError), Checkpoints.opened("train", {"seed": 1}) as checkpoints:
        assert sorted(path.name for path in checkpoints.folder.glob("step-*")) == ["step-00000002", "step-00000003"]
        loaded = checkpoints.load()
        assert loaded is not None
        assert loaded[0]["w"].tolist() == [3, 3]
        assert loaded[1] == {"step": 3}
        raise RuntimeError
    with Checkpoints.opened("train", {"seed": 2}) as checkpoints:
        assert checkpoints.load() is None


def test_a_run_that_succeeded_leaves_nothing(inputs: Path) -> None:
    with Checkpoints.opened("train", {"seed": 1}) as checkpoints:
        checkpoints.save(1, {"w": torch.zeros(1)}, {"step": 1})
    assert list((inputs / ".scratch/train").iterdir()) == []


def test_the_best_weights_come_back(inputs: Path) -> None:
    with Checkpoints.opened("train", {}) as checkpoints:
        checkpoints.save_best({"w": torch.tensor([1.5])})
        checkpoints.save_best({"w": torch.tensor([2.5])})
        assert checkpoints.load_best()["w"].tolist() == [2.5]


def test_checkpoints_lie_in_dvcs_root(
    inputs: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path_factory.mktemp("root")
    monkeypatch.setenv("DVC_ROOT", str(root))
    with Checkpoints.opened("train", {}) as checkpoints:
        assert checkpoints.folder.parent == root / ".scratch/train"


def test_a_second_process_is_refused_and_told_who_runs(inputs: Path) -> None:
    code = (
        "import sys; from stages.shared.checkpoints import Checkpoints\n"
        "with Checkpoints.opened('train', {}): print('held', flush=True); sys.stdin.read()"
    )
    root = str(Path(__file__).parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": root}
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        message = rf"process {holder.pid} runs this very training; wait for it"
        with pytest.raises(UserError, match=message), Checkpoints.opened("train", {}):
            pass
        holder.communicate("")
    with Checkpoints.opened("train", {}):
        pass
