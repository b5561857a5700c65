"""A file lock that one process at a time can hold. The kernel releases it when the holder exits or is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from stages.runtime.errors import UserError


@contextmanager
def file_lock(path: Path, purpose: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock at `path`. The file names the process that holds it.

    Args:
        purpose: what the holder does, for the message to a second process.
        wait: wait for another process that holds the lock, and say so.

    Raises:
        UserError: another process holds the lock, and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        held = f"{path}: held by {path.read_text(encoding='utf-8')}"
        if not wait:
            raise UserError(f"{held}; wait for it, or end it with `kill`") from None
        print(f"{held}; waiting for it", flush=True)
        lock.acquire(poll_interval=1)
    try:
        path.write_text(f"process {os.getpid()}, which {purpose}", encoding="utf-8")
        yield
    finally:
        lock.release()
