"""Worker processes: one per shard of a table, and none outlives its parent, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stages.runtime import parallel
from stages.runtime.errors import UserError
from stages.runtime.parallel import map_processes
from tests.clone import ROOT


def name_and_process(number: int, letter: str) -> tuple[str, int, str]:
    return f"{number}{letter}", os.getpid(), os.environ.get("RAYON_NUM_THREADS", "")


def fail(number: int) -> int:
    if number == 2:
        raise UserError("b.parquet: can't be read")
    return number


def kill_itself(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def workers() -> list[str]:
    children = psutil.Process().children()
    return [child.name() for child in children if "multiprocessing.spawn" in " ".join(child.cmdline())]


@pytest.fixture
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "num_cores", lambda: 3)


def test_results_are_in_order_and_from_worker_processes_with_one_thread(three_cores: None) -> None:
    found = list(map_processes(name_and_process, [1, 2, 3, 4], "abcd", desc="test"))
    assert [name for name, _, _ in found] == ["1a", "2b", "3c", "4d"]
    assert os.getpid() not in {process for _, process, _ in found}
    assert {threads for _, _, threads in found} == {"1"}
    assert workers() == []


def test_a_single_item_is_processed_in_this_process() -> None:
    assert [found[:2] for found in map_processes(name_and_process, [1], "a", desc="test")] == [("1a", os.getpid())]


def test_a_user_error_of_a_worker_is_raised_in_the_parent(three_cores: None) -> None:
    with pytest.raises(UserError, match=r"^b\.parquet: can't be read$"):
        list(map_processes(fail, [1, 2, 3], desc="test"))
    assert workers() == []


def test_a_killed_worker_is_reported_and_the_others_are_stopped(three_cores: None) -> None:
    with pytest.raises(UserError) as error:
        list(map_processes(kill_itself, [1, 2, 3, 4], desc="format"))
    assert str(error.value) == (
        "format: a worker process was killed, probably because memory ran out; free some memory, "
        "or use fewer cores (`taskset --cpu-list 0-3 dvc repro`), and run again"
    )
    assert workers() == []


@pytest.mark.subprocess
@pytest.mark.parametrize("started", [True, False], ids=["while working", "while starting"])
@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143), (signal.SIGKILL, False, -9)],
)
def test_no_worker_outlives_the_stage(tmp_path: Path, number: int, whole_group: bool, code: int, started: bool) -> None:
    """Ctrl-C in a terminal signals all processes of the group; `kill` signals the stage alone."""
    # Each job leaves a file with the id of its process as its name, and does not end while the test runs.
    (tmp_path / "job.py").write_text(
        "import os, time\ndef sleep(folder):\n    (folder / str(os.getpid())).touch()\n    time.sleep(60)\n"
    )
    code_of_stage = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from stages.runtime import parallel; from stages.runtime.run import run\n"
        "from job import sleep\n"
        "parallel.num_cores = lambda: 2\n"
        "run(lambda: list(parallel.map_processes(sleep, [Path('.')] * 3, desc='test')))"
    )
    (tmp_path / "params.yaml").touch()
    process = subprocess.Popen(
        [sys.executable, "-c", code_of_stage],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 30
    while len(children) < 3 or (started and len([*tmp_path.glob("[0-9]*")]) < 2):  # two, and the resource tracker
        assert time.monotonic() < deadline
        children = psutil.Process(process.pid).children()
        time.sleep(0.01)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    printed = process.communicate(timeout=30)[0]
    assert (process.returncode, printed) == (code, "") or number == signal.SIGKILL
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
