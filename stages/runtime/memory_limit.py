"""The memory that this process may use at most."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path


def memory_limit() -> tuple[int, str]:
    """The lowest limit in bytes, and what sets it. It includes memory that other processes use now, and swap."""
    return min(_limits(), default=(sys.maxsize, "nothing"))


def _limits() -> Iterator[tuple[int, str]]:
    if sys.platform == "win32":
        return
    import resource

    for number, command in ((resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d")):
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            yield soft, f"`{command}`"
    if sys.platform != "linux":  # others enlarge their swap as needed
        return
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE))
    swap = 1024 * int(sizes.get("SwapTotal", 0))
    if "MemTotal" in sizes:
        yield 1024 * int(sizes["MemTotal"]) + swap, "the memory of this machine"
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # a container sees only some of them
            value = _read(folder / name).strip() if folder.is_relative_to(root) else ""
            if value.isdigit():  # not "max"
                yield int(value) + swap, f"the control group ({folder / name})"


def _read(path: Path) -> str:
    """The content of a file of the kernel; empty if this system hides it."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
