"""Run a stage: one at a time per folder, with a message for errors that the user can fix."""

import errno
import logging
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
from traceback import walk_tb
from typing import NoReturn

from stages.runtime.errors import LESS_MEMORY, UserError, is_out_of_memory
from stages.runtime.locks import file_lock
from stages.runtime.secrets import without_secrets
from stages.text import printable

LOCK = Path(".scratch/lock")

# Errors that any stage can meet on a user's machine. All others are bugs and keep their traceback.
FREE_SPACE = "free some space (docs/reliability.md, Disk) and run again"
FIX_PERMISSIONS = "make it readable and writable for this user and run again"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ERRNO_HINTS = {
    errno.ENOENT: "run `dvc repro` in the project's folder, which creates the inputs of a stage",
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: "raise the file size limit (`ulimit -f`) and run again",
    errno.EACCES: FIX_PERMISSIONS,
    errno.EPERM: FIX_PERMISSIONS,
    errno.EROFS: "mount it writable and run again",
    errno.EIO: "the disk can't be read or written; check its health, then run again",
    errno.ENOMEM: LESS_MEMORY,
    errno.EPIPE: "the reader of the output exited; let it finish and run again",
}


def run(main: Callable[[], None], exclusive: bool = True) -> NoReturn:
    """Call `main` and exit: with 0 on success, 1 on a user error, 130 or 143 if interrupted.

    Only one stage runs in a folder at a time. DVC does not ensure that: if DVC is killed, its stage keeps running and
    would overwrite the outputs of the next run.

    Args:
        exclusive: False for commands that only read; they may run beside a stage.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.unraisablehook = _interrupt_again
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import warns about an optional kernel
    started = time.time()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode must not end a run
    rank = int(os.environ.get("RANK", "0")) if os.environ.get("WORLD_SIZE", "1") != "1" else 0
    if rank:  # only rank 0 locks the folder and prints; the others report just their errors
        exclusive, sys.stdout = False, Path(os.devnull).open("w")  # noqa: SIM115 (open until the process exits)
    if rank or not (sys.stderr and sys.stderr.isatty()):
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for terminals
    try:
        if not Path("params.yaml").exists():
            raise UserError("params.yaml: not found; run in the project's folder")
        purpose = f"runs {' '.join([Path(sys.argv[0]).stem, *sys.argv[1:]])} in this folder"
        with file_lock(LOCK, purpose) if exclusive else nullcontext():
            main()
    except KeyboardInterrupt:
        sys.exit(130)  # not 0: DVC would commit the outputs of a stage that reports success
    except Exception as error:
        if (message := describe_error(error)) is None:
            raise
        if errno_of(error) in DISK_FULL:
            delete_truncated_bytecode(started - 60)  # also what was imported before `run` started
        sys.exit("error: " + f"process {rank}: " * (rank > 0) + printable(without_secrets(message)))
    sys.exit(0)


def describe_error(error: Exception) -> str | None:
    """The cause and what to do if the user can fix it; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ValueError) and is_from_importing("huggingface_hub", error):
        names = ", ".join(sorted(name for name in os.environ if name.startswith("HF_")))
        return f"the Hub client can't be imported: {error}; correct or unset one of its variables: {names}"
    if is_out_of_memory(error):
        return f"out of memory; {LESS_MEMORY}"
    if number := errno_of(error):
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else os.strerror(number)
        return f"{where}{reason}; {ERRNO_HINTS.get(number, 'check it and run again')}"
    return None


def is_from_importing(package: str, error: Exception) -> bool:
    """Whether an error came while a package was imported."""
    frames = (frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>")
    return any(frame.f_globals["__name__"].startswith(f"{package}.") for frame in frames)


def errno_of(error: Exception) -> int | None:
    """The error number of the operating system, if the error came from there."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    in_rust = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors and tokenizers report it
    return int(in_rust[1]) if in_rust else None


def delete_truncated_bytecode(since: float) -> None:
    """Delete bytecode files that were written after `since` (seconds since the epoch) and are incomplete.

    On a full disk Python up to 3.13 leaves them behind and then can't start, even when there is space again
    (https://github.com/python/cpython/issues/126606).
    """
    for folder in (Path(__file__).parents[1], Path(sys.prefix)):
        for path in folder.rglob("*.pyc"):
            with suppress(OSError):
                if path.stat().st_mtime >= since:
                    try:
                        marshal.loads(path.read_bytes()[16:])  # noqa: S302 (Python itself loads this file)
                    except (EOFError, ValueError, TypeError):
                        path.unlink()


def _interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Repeat an interrupt, after a moment, if it came where Python drops exceptions, such as in a destructor."""
    number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(unraisable.exc_type)
    if number is None:
        sys.__unraisablehook__(unraisable)
    else:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
