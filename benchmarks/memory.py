"""Peak memory of a process."""

import re
from pathlib import Path


def peak_memory(pid: int) -> int:
    """The most bytes that a running process has held at once, 0 where it has just ended.

    Not `ru_maxrss`: a new process begins with that of the one that started it.
    """
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(match[1]) * 1024 if match else 0
