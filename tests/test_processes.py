"""Shards are worked on by several processes, which end with the one that started them, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stages.shared import processes
from stages.shared.errors import UserError
from stages.shared.processes import map_processes


def where(number: int, letter: str) -> tuple[str, int, str]:
    return f"{number}{letter}", os.getpid(), os.environ.get("RAYON_NUM_THREADS", "")


def fail(number: int) -> int:
    if number == 2:
        raise UserError("b.parquet: can't be read")
    return number


def end(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def linger(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def workers() -> list[str]:
    children = psutil.Process().children()
    return [child.name() for child in children if "multiprocessing.spawn" in " ".join(child.cmdline())]


@pytest.fixture
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "num_cores", lambda: 3)


def test_results_come_in_order_from_other_processes_of_one_thread(three_cores: None) -> None:
    found = list(map_processes(where, [1, 2, 3, 4], "abcd", doing="test"))
    assert [name for name, _, _ in found] == ["1a", "2b", "3c", "4d"]
    assert os.getpid() not in {process for _, process, _ in found}
    assert {threads for _, _, threads in found} == {"1"}
    assert workers() == []


def test_a_single_item_stays_in_this_process() -> None:
    assert [found[:2] for found in map_processes(where, [1], "a", doing="test")] == [("1a", os.getpid())]


def test_a_users_mistake_is_that_of_the_process_that_found_it(three_cores: None) -> None:
    with pytest.raises(UserError, match=r"^b\.parquet: can't be read$"):
        list(map_processes(fail, [1, 2, 3], doing="test"))
    assert workers() == []


def test_a_process_that_the_kernel_kills_is_said_and_takes_the_others_along(three_cores: None) -> None:
    with pytest.raises(UserError) as error:
        list(map_processes(end, [1, 2, 3, 4], doing="format"))
    assert str(error.value) == (
        "format: one of 3 processes was killed, as the kernel does where memory runs out; free some memory, or take "
        "fewer cores (`taskset --cpu-list 0-3 dvc repro`), and run again"
    )
    assert workers() == []


@pytest.mark.parametrize("lingering", [True, False], ids=["at work", "while they start"])
@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143), (signal.SIGKILL, False, -9)],
)
def test_no_process_outlives_the_stage(
    tmp_path: Path, number: int, whole_group: bool, code: int, lingering: bool
) -> None:
    """Ctrl-C at the terminal reaches all of them, what `kill` sends reaches the stage alone."""
    code_of_stage = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from stages.shared import processes; from stages.shared.run import run\n"
        "from tests.test_processes import linger\n"
        "processes.num_cores = lambda: 2\n"
        "run(lambda: list(processes.map_processes(linger, [Path('.')] * 3, doing='test')))"
    )
    root = str(Path(__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", code_of_stage],
        cwd=tmp_path,
        env={"PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 30
    while len(children) < 3 or (lingering and len([*tmp_path.glob("[0-9]*")]) < 2):  # two, and what tracks semaphores
        assert time.monotonic() < deadline
        children = psutil.Process(process.pid).children()
        time.sleep(0.01)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    printed = process.communicate(timeout=30)[0]
    assert (process.returncode, printed) == (code, "") or number == signal.SIGKILL
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
