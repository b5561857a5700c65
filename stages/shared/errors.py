"""A user's mistake, in one message."""

import errno
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend. The text says where, what was found, what is allowed and what to do."""


@contextmanager
def reading(where: str | Path, mend: str = "bring it back with `dvc checkout`, or write it anew") -> Iterator[None]:
    """Read a file or folder with libraries that raise what they like when it is not what it should be.

    Args:
        where: the path, or what stands before the reason in the message.
        mend: what to do.

    Raises:
        UserError: it is damaged, or something else than its name says.
        OSError: it is not there, or the machine can't read it.
    """
    if isinstance(where, Path) and not where.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(where))
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (isinstance(error, OSError) and error.errno) or is_out_of_memory(error):
            raise
        reason = textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        raise UserError(f"{where}: can't be read: {reason}; {mend}") from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, the processor or the GPU has no memory left: each says it in its own way."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|allocate memory", str(error)))
