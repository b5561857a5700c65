"""The lowest of the limits of the process, its control group and the machine."""

import resource
import sys
from pathlib import Path

import pytest

from stages.runtime import memory_limit as module
from stages.runtime.memory_limit import memory_limit

GROUPS = Path("/sys/fs/cgroup")
MEMINFO = "MemTotal:    4000000 kB\nMemFree:       30000 kB\nSwapTotal:   1000000 kB\n"
UNLIMITED_V1 = "9223372036854771712\n"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files that the kernel shows; there is no other limit."""
    shown = {"/proc/meminfo": MEMINFO}
    monkeypatch.setattr(module, "_read", lambda path: shown.get(str(path), ""))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.setattr(sys, "platform", "linux")
    return shown


def test_a_machine_has_its_memory_and_swap(files: dict[str, str]) -> None:
    assert memory_limit() == (5_120_000_000, "the memory of this machine")


@pytest.mark.parametrize(
    ("groups", "folder", "name"),
    [
        ("0::/user.slice/run.scope\n", "user.slice/run.scope", "memory.max"),
        ("0::/user.slice/run.scope\n", "user.slice", "memory.max"),
        ("0::/\n", "", "memory.max"),
        ("9:name=systemd:/a\n4:cpu,memory:/a/b\n0::/\n", "memory/a/b", "memory.limit_in_bytes"),
        ("4:memory:/docker/of/the/host\n", "memory", "memory.limit_in_bytes"),
    ],
)
def test_a_control_group_or_one_above_it_limits_memory_but_not_swap(
    files: dict[str, str], groups: str, folder: str, name: str
) -> None:
    files["/proc/self/cgroup"] = groups
    files |= {str(GROUPS / "memory.max"): "max\n", str(GROUPS / "memory/a/memory.limit_in_bytes"): UNLIMITED_V1}
    files[str(GROUPS / folder / name)] = "2000000000\n"
    assert memory_limit() == (3_024_000_000, f"the control group ({GROUPS / folder / name})")


@pytest.mark.parametrize(
    ("number", "source"), [(resource.RLIMIT_AS, "`ulimit -v`"), (resource.RLIMIT_DATA, "`ulimit -d`")]
)
def test_a_process_has_limits(files: dict[str, str], monkeypatch: pytest.MonkeyPatch, number: int, source: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda n: (1_000_000 if n == number else resource.RLIM_INFINITY, -1))
    assert memory_limit() == (1_000_000, source)


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_a_system_that_shows_no_limit_has_none(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    files.clear()
    monkeypatch.setattr(sys, "platform", platform)
    assert memory_limit()[0] == sys.maxsize
