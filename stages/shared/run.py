"""How a stage runs and ends: alone in its folder, and with a message where a person can mend what went wrong."""

import errno
import marshal
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import NoReturn

from stages.shared.errors import UserError, is_out_of_memory
from stages.shared.locks import held
from stages.shared.text import printable

LOCK = Path(".scratch/lock")

# What the machine or the user's files can do to any stage; everything else that is unforeseen is ours to debug.
FREE_SPACE = "free some space (README, Disk) and run again"
OPEN_UP = "make it readable and writable for this user and run again"
LESS_MEMORY = "lower batch_size or max_length, or free some memory, and run again"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ADVICE = {
    errno.ENOENT: "run `dvc repro` in the project's folder, which makes what a stage reads",
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: "raise the file size limit (`ulimit -f`) and run again",
    errno.EACCES: OPEN_UP,
    errno.EPERM: OPEN_UP,
    errno.EROFS: "mount it writable and run again",
    errno.EIO: "the disk can't be read or written: look at its health, then run again",
    errno.ENOMEM: LESS_MEMORY,
    errno.EPIPE: "what read the output has ended; let it read to the end, and run again",
}


def run(main: Callable[[], None], alone: bool = True) -> NoReturn:
    """Run a stage's `main` and exit: 0 when it is done, 1 on a user's mistake, 130 or 143 when interrupted.

    A stage runs alone in its folder. DVC alone does not see to that: where it was killed, its stage lives on, and would
    write its outputs over those of the next run.

    Args:
        alone: False for what only reads: it may run beside a stage.
    """
    signal.signal(signal.SIGTERM, _terminate)
    started = time.time()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an arrow must not end a run
    rank = int(os.environ.get("RANK", "0")) if os.environ.get("WORLD_SIZE", "1") != "1" else 0
    if rank:  # of several processes the first holds the folder and speaks; the others say what stops them
        alone, sys.stdout = False, Path(os.devnull).open("w")  # noqa: SIM115 (as long as the process lives)
    if rank or not (sys.stderr and sys.stderr.isatty()):
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for terminals
    try:
        doing = f"runs {' '.join([Path(sys.argv[0]).stem, *sys.argv[1:]])} in this folder"
        with held(LOCK, doing) if alone else nullcontext():
            main()
    except KeyboardInterrupt:
        sys.exit(130)  # not 0: DVC would commit the outputs of a stage that says it succeeded
    except Exception as error:
        if (message := explain(error)) is None:
            raise
        if errno_of(error) in FULL:
            drop_half_bytecode(started - 60)
        sys.exit("error: " + f"process {rank}: " * (rank > 0) + printable(message))
    sys.exit(0)


def explain(error: Exception) -> str | None:
    """What went wrong and what to do, where a person can mend it; None for what is ours to debug."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory; {LESS_MEMORY}"
    if number := errno_of(error):
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else os.strerror(number)
        return f"{where}{reason}; {ADVICE.get(number, 'look at it and run again')}"
    return None


def errno_of(error: Exception) -> int | None:
    """The number of what the operating system refused, if that is what it is."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    in_rust = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors and tokenizers say it
    return int(in_rust[1]) if in_rust else None


def drop_half_bytecode(since: float) -> None:
    """Delete byte code that was written since then and is cut off.

    Python up to 3.13 leaves it on a full disk, and can't start from it when there is space again
    (https://github.com/python/cpython/issues/126606).
    """
    for folder in (Path(__file__).parents[1], Path(sys.prefix)):
        for path in folder.rglob("*.pyc"):
            with suppress(OSError):
                if path.stat().st_mtime >= since:
                    try:
                        marshal.loads(path.read_bytes()[16:])  # noqa: S302 (what Python itself loads from there)
                    except (EOFError, ValueError, TypeError):
                        path.unlink()


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)
