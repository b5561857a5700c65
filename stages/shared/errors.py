"""A user's mistake becomes one message and exit code 1, never a traceback."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

# What the machine or the user's files can do to any stage; everything else that is unforeseen is ours to debug.
ADVICE = {
    errno.ENOSPC: "free some space (`dvc gc --workspace` drops unused cache) and run again",
    errno.EDQUOT: "free some space (`dvc gc --workspace` drops unused cache) and run again",
    errno.EFBIG: "raise the file size limit (`ulimit -f`) and run again",
    errno.EACCES: "make it readable and writable for this user and run again",
    errno.EPERM: "make it readable and writable for this user and run again",
    errno.EROFS: "mount it writable and run again",
}


class UserError(Exception):
    """Something that the user can mend. The text says where, what was found, what is allowed and what to do."""


def run(main: Callable[[], None]) -> NoReturn:
    """Run a stage's `main` and exit: 0 when it is done, 1 on a user's mistake, 130 or 143 when interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for terminals
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # not 0: DVC would commit the outputs of a stage that says it succeeded
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {where}{error.strerror or error}; {ADVICE[error.errno]}")
    sys.exit(0)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)
