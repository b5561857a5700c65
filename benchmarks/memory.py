"""Memory of a process."""

import re
from pathlib import Path

PEAK = "VmHWM"  # not `ru_maxrss`, because a new process inherits that value from its parent
ANONYMOUS = "RssAnon"  # without pages of files, which the kernel can drop


def process_memory(pid: int, kind: str) -> int:
    """Memory of a running process in bytes, `PEAK` or `ANONYMOUS`; 0 if it has ended."""
    try:
        match = re.search(rf"{kind}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(match[1]) * 1024 if match else 0
