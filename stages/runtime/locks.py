"""A file lock that one process at a time can hold. The kernel releases it when the holder exits or is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from stages.runtime.errors import UserError


@contextmanager
def file_lock(path: Path, purpose: str) -> Iterator[None]:
    """Hold the lock at `path`. The file names the process that holds it.

    Args:
        purpose: what the holder does, for the message to a second process.

    Raises:
        UserError: another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{path}: held by {path.read_text(encoding='utf-8')}; wait for it, or end it with `kill`"
        ) from None
    try:
        path.write_text(f"process {os.getpid()}, which {purpose}", encoding="utf-8")
        yield
    finally:
        lock.release()
