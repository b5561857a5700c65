"""Checkpoints: a run resumes from its own, never from those of another run."""

import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest
import torch

from stages.engine import checkpoints as checkpoints_module
from stages.engine.checkpoints import Checkpoints, load
from stages.runtime.locks import file_lock
from tests.clone import ROOT

DVC_YAML = "stages:\n  train:\n    deps: [data/train.parquet, models/base]\n"


@pytest.fixture
def inputs(project: Path) -> Path:
    (project / "dvc.yaml").write_text(DVC_YAML)
    (project / "data/train.parquet").write_bytes(b"rows")
    (project / "models/base").mkdir(parents=True)
    (project / "models/base/weights").write_bytes(b"weights")
    return project


def open_run(params: dict[str, object] | None = None, **versions: str) -> AbstractContextManager[Checkpoints]:
    return Checkpoints.open_run("train", params or {"seed": 1}, versions)


def interrupted_run(*steps: int, seed: int = 1) -> Path:
    """Save best weights and a checkpoint at each of these steps, then interrupt the run; returns its folder."""
    with suppress(KeyboardInterrupt), open_run({"seed": seed}) as checkpoints:
        for step in steps:
            checkpoints.save_best({"w": torch.full((1,), step + 0.5)})
            checkpoints.save(step, {"w": torch.full((2,), step)}, {"step": step})
        raise KeyboardInterrupt
    return checkpoints.folder


def resumed_step(seed: int = 1, **versions: str) -> int | None:
    """The step from which the next run resumes, if any. That run is interrupted, too."""
    with suppress(KeyboardInterrupt), open_run({"seed": seed}, **versions) as checkpoints:
        folder = checkpoints.restore_newest()
        loaded = load(folder) if folder else None
        if loaded:
            assert loaded[0]["w"].tolist() == [loaded[1]["step"]] * 2
            assert checkpoints.load_best()["w"].tolist() == [loaded[1]["step"] + 0.5]
        raise KeyboardInterrupt
    return loaded[1]["step"] if loaded else None


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_resumes_from_its_newest_checkpoint_and_keeps_two_but_not_with_other_inputs(inputs: Path) -> None:
    folder = interrupted_run(1, 2, 3)
    assert names(folder) == ["best.safetensors", "run.json", "step-00000002", "step-00000003"]
    assert resumed_step() == 3
    assert resumed_step(seed=2) is None
    assert resumed_step(torch="3") is None
    (inputs / "models/base/weights").write_bytes(b"other weights")
    assert resumed_step() is None


def test_there_are_at_most_two_checkpoints_even_while_one_is_saved(
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
def test_a_damaged_checkpoint_is_deleted_and_the_one_before_it_is_used(
    inputs: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], None]
) -> None:
    folder = interrupted_run(1, 2)
    damage(folder / "step-00000002" / name)
    assert resumed_step() == 1
    problem = "is missing" if damage is Path.unlink else "has another checksum"
    if name == "sha256.json" and damage is cut:
        problem = "is not valid"
    if name == "sha256.json" and damage is flip:  # one hexadecimal digit of a checksum, or the name of a file
        assert f"{folder}/step-00000002: this checkpoint is damaged (" in capsys.readouterr().out
    else:
        expected = f"{folder}/step-00000002: this checkpoint is damaged ({name} {problem}); trying the one before it\n"
        assert capsys.readouterr().out == expected
    assert names(folder) == ["best.safetensors", "run.json", "step-00000001"]


def test_a_run_starts_from_the_beginning_if_all_checkpoints_are_damaged(inputs: Path) -> None:
    folder = interrupted_run(1, 2)
    for path in folder.glob("*/tensors.safetensors"):
        cut(path)
    assert resumed_step() is None
    assert not list(folder.glob("step-*"))


def test_a_partially_written_checkpoint_is_ignored(inputs: Path) -> None:
    folder = interrupted_run(1)
    (folder / ".step-00000002.partial").mkdir()
    (folder / ".step-00000002.partial/tensors.safetensors").write_bytes(b"partial")
    assert resumed_step() == 1
    with suppress(KeyboardInterrupt), open_run() as checkpoints:
        checkpoints.save(2, {"w": torch.full((2,), 2)}, {"step": 2})
        raise KeyboardInterrupt
    assert names(folder) == ["best.safetensors", "run.json", "step-00000001", "step-00000002"]


def test_a_finished_run_keeps_its_newest_checkpoint_until_another_starts(inputs: Path) -> None:
    folder = interrupted_run(1, 2)
    with open_run():
        pass
    assert names(folder) == ["finished", "run.json", "step-00000002"]
    assert resumed_step() == 2
    assert resumed_step(seed=2) is None
    assert folder.exists()  # the run was resumed and interrupted, so it is not finished
    with open_run():
        pass
    assert resumed_step(seed=2) is None
    assert not folder.exists()


def test_a_finished_run_that_another_process_has_locked_is_not_deleted(inputs: Path) -> None:
    folder = interrupted_run(1)
    (folder / "finished").touch()
    with file_lock(folder.with_suffix(".lock"), "runs the same training"):
        assert resumed_step(seed=2) is None
    assert names(folder) == ["best.safetensors", "finished", "run.json", "step-00000001"]


HOLD_THE_LOCK = (  # with the Ctrl-C that a shell makes background processes ignore
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from pathlib import Path; from stages.runtime.locks import file_lock\n"
    "with file_lock(Path('a.lock'), 'runs the same training', wait=True): print('locked', flush=True); sys.stdin.read()"
)


@pytest.mark.subprocess
def test_a_second_process_waits_for_the_first_and_can_be_interrupted(project: Path) -> None:
    def start() -> subprocess.Popen[str]:
        command, pipe = [sys.executable, "-c", HOLD_THE_LOCK], subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={"PYTHONPATH": str(ROOT)})

    with start() as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        waits = f"a.lock: held by process {holder.pid}, which runs the same training; waiting for it\n"
        with start() as interrupted:
            assert interrupted.stdout is not None
            assert interrupted.stdout.readline() == waits
            interrupted.send_signal(signal.SIGINT)
            assert interrupted.wait(timeout=20) != 0
        with start() as second:
            assert second.stdout is not None
            assert second.stdout.readline() == waits
            holder.communicate("")
            assert second.stdout.readline() == "locked\n"
            second.communicate("")


def test_a_process_never_waits_for_itself(inputs: Path) -> None:
    with open_run(), pytest.raises(RuntimeError, match="Deadlock"), open_run():
        pass


STARTS = "Starting from the beginning: the checkpoint at step 1,002 is of a run with "


def test_a_run_says_how_the_interrupted_run_with_the_newest_checkpoint_differs(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with suppress(KeyboardInterrupt), open_run({"optimizer": "adamw", "max_steps": None}, torch="2") as checkpoints:
        checkpoints.save(1002, {}, {})
        raise KeyboardInterrupt
    assert capsys.readouterr().out == ""
    with suppress(KeyboardInterrupt), open_run({"optimizer": "adamw_8bit", "max_steps": None}, torch="2"):
        raise KeyboardInterrupt
    assert capsys.readouterr().out == f"{STARTS}optimizer: adamw (now adamw_8bit)\n"
    (inputs / "models/base/weights").write_bytes(b"other weights")
    (inputs / "models/base/config.json").write_bytes(b"{}")
    with suppress(KeyboardInterrupt), open_run({"max_steps": 5, "optimizer": "adamw"}, torch="3"):
        raise KeyboardInterrupt
    assert capsys.readouterr().out == (
        f"{STARTS}max_steps: null (now 5), torch: 2 (now 3), another models/base/config.json and 1 more\n"
    )


def test_a_run_says_nothing_about_a_finished_or_a_running_one(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted_run(1)
    with file_lock(folder.with_suffix(".lock"), "runs the same training"):
        interrupted_run(seed=2)
    with open_run():
        pass
    interrupted_run(seed=3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_a_run_whose_description_is_damaged_is_not_mentioned(
    inputs: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    damage(interrupted_run(1) / "run.json")
    interrupted_run(seed=2)
    assert capsys.readouterr().out == ""
    assert resumed_step() == 1
