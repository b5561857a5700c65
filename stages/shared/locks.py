"""One process at a time, by a lock that the kernel takes from its holder however that ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.shared.errors import UserError


@contextmanager
def held(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock at `path`. The file stays behind: to delete it would let two processes hold it.

    Args:
        doing: what the holder does, for the message of whoever comes second.

    Raises:
        UserError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{path}: held by {file.read().strip()}; wait for it, or end it with `kill`") from None
        file.truncate(0)
        file.write(f"process {os.getpid()}, which {doing}")
        file.flush()
        yield
