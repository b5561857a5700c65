"""Checkpoints: found again by the same run, never by another."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest
import torch

from stages.shared import checkpoints as checkpoints_module
from stages.shared.checkpoints import Checkpoints, fingerprint, load
from stages.shared.errors import UserError
from stages.shared.locks import held

DVC_YAML = "stages:\n  train:\n    deps: [data/train.parquet, models/base]\n"


@pytest.fixture
def inputs(project: Path) -> Path:
    (project / "dvc.yaml").write_text(DVC_YAML)
    (project / "data/train.parquet").write_bytes(b"rows")
    (project / "models/base").mkdir(parents=True)
    (project / "models/base/weights").write_bytes(b"weights")
    return project


def test_the_fingerprint_changes_with_parameters_inputs_and_versions(inputs: Path) -> None:
    first = fingerprint("train", {"seed": 1}, {"torch": "2"})
    assert fingerprint("train", {"seed": 1}, {"torch": "2"}) == first
    assert fingerprint("train", {"seed": 2}, {"torch": "2"}) != first
    assert fingerprint("train", {"seed": 1}, {"torch": "3"}) != first
    (inputs / "models/base/weights").write_bytes(b"others")
    assert fingerprint("train", {"seed": 1}, {"torch": "2"}) != first


def opened(seed: int = 1) -> AbstractContextManager[Checkpoints]:
    return Checkpoints.opened("train", {"seed": seed}, {})


def interrupted_run(*steps: int, seed: int = 1) -> Path:
    """A run that saved checkpoints of these steps, and its best weights before each, and was then interrupted."""
    with suppress(KeyboardInterrupt), opened(seed) as checkpoints:
        for step in steps:
            checkpoints.save_best({"w": torch.full((1,), step + 0.5)})
            checkpoints.save(step, {"w": torch.full((2,), step)}, {"step": step})
        raise KeyboardInterrupt
    return checkpoints.folder


def step_loaded(seed: int = 1) -> int | None:
    """The step that the next run goes on from, if any. That run is interrupted, too."""
    with suppress(KeyboardInterrupt), opened(seed) as checkpoints:
        folder = checkpoints.newest()
        loaded = load(folder) if folder else None
        if loaded:
            assert loaded[0]["w"].tolist() == [loaded[1]["step"]] * 2
            assert checkpoints.load_best()["w"].tolist() == [loaded[1]["step"] + 0.5]
        raise KeyboardInterrupt
    return loaded[1]["step"] if loaded else None


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_goes_on_from_its_newest_checkpoint_and_keeps_two(inputs: Path) -> None:
    folder = interrupted_run(1, 2, 3)
    assert names(folder) == ["best.safetensors", "step-00000002", "step-00000003"]
    assert step_loaded() == 3
    assert step_loaded(seed=2) is None


def test_there_are_never_more_than_two_not_even_while_one_is_saved(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        seen.append(sorted(path.name for path in path.parent.parent.glob("*step-*")))
        write(tensors, path)

    write = checkpoints_module.save_file
    monkeypatch.setattr(checkpoints_module, "save_file", save_file)
    interrupted_run(1, 2, 3)
    assert seen[5] == [".step-00000003.partial", "step-00000002"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "best.safetensors", "sha256.json"])
@pytest.mark.parametrize("damage", [Path.unlink, cut, flip])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(
    inputs: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], None]
) -> None:
    folder = interrupted_run(1, 2)
    damage(folder / "step-00000002" / name)
    assert step_loaded() == 1
    said = "is missing" if damage is Path.unlink else "is not what was written"
    if name == "sha256.json" and damage is flip:  # one hexadecimal digit of a checksum, or a file's name
        assert "this checkpoint is damaged (" in capsys.readouterr().out
    else:
        expected = f"{folder}/step-00000002: this checkpoint is damaged ({name} {said}): trying the one before it\n"
        assert capsys.readouterr().out == expected
    assert names(folder) == ["best.safetensors", "step-00000001"]


def test_where_all_are_damaged_the_run_starts_anew(inputs: Path) -> None:
    folder = interrupted_run(1, 2)
    for path in folder.glob("*/tensors.safetensors"):
        cut(path)
    assert step_loaded() is None
    assert not list(folder.glob("step-*"))


def test_a_half_written_checkpoint_is_not_one(inputs: Path) -> None:
    folder = interrupted_run(1)
    (folder / ".step-00000002.partial").mkdir()
    (folder / ".step-00000002.partial/tensors.safetensors").write_bytes(b"half")
    assert step_loaded() == 1
    with suppress(KeyboardInterrupt), opened() as checkpoints:
        checkpoints.save(2, {"w": torch.full((2,), 2)}, {"step": 2})
        raise KeyboardInterrupt
    assert names(folder) == ["best.safetensors", "step-00000001", "step-00000002"]


def test_a_finished_run_keeps_its_newest_checkpoint_until_another_starts(inputs: Path) -> None:
    folder = interrupted_run(1, 2)
    with opened():
        pass
    assert names(folder) == ["finished", "step-00000002"]
    assert step_loaded() == 2
    assert step_loaded(seed=2) is None
    assert folder.exists()  # it was taken up again and interrupted: it is not finished
    with opened():
        pass
    assert step_loaded(seed=2) is None
    assert not folder.exists()


def test_a_finished_run_that_another_process_holds_is_left_to_it(inputs: Path) -> None:
    folder = interrupted_run(1)
    (folder / "finished").touch()
    with held(folder.with_suffix(".lock"), "runs it"):
        assert step_loaded(seed=2) is None
    assert names(folder) == ["best.safetensors", "finished", "step-00000001"]


def test_checkpoints_lie_in_dvcs_root(
    inputs: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path_factory.mktemp("root")
    monkeypatch.setenv("DVC_ROOT", str(root))
    with Checkpoints.opened("train", {}, {}) as checkpoints:
        assert checkpoints.folder.parent == root / ".scratch/train"


def test_a_second_process_is_refused_and_told_who_runs(inputs: Path) -> None:
    code = (
        "import sys; from stages.shared.checkpoints import Checkpoints\n"
        "with Checkpoints.opened('train', {}, {}): print('held', flush=True); sys.stdin.read()"
    )
    root = str(Path(__file__).parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": root}
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        message = rf"held by process {holder.pid}, which runs this very training; wait for it"
        with pytest.raises(UserError, match=message), Checkpoints.opened("train", {}, {}):
            pass
        holder.communicate("")
    with Checkpoints.opened("train", {}, {}):
        pass
