"""Memory of a process."""

import re
from pathlib import Path


def peak_memory(pid: int) -> int:
    """Peak memory of a running process in bytes; 0 if it has ended.

    Not `ru_maxrss`, because a new process inherits that value from its parent.
    """
    return _read(pid, "VmHWM")


def anonymous_memory(pid: int) -> int:
    """Memory of a running process in bytes without pages of files, which the kernel can drop; 0 if it has ended."""
    return _read(pid, "RssAnon")


def _read(pid: int, name: str) -> int:
    try:
        match = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(match[1]) * 1024 if match else 0
