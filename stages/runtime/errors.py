"""Errors that the user can fix, reported as one message without a traceback."""

import errno
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LESS_MEMORY = (
    "lower batch_size (memory of activations grows with batch_size * max_length) or max_length, "
    "set activation_checkpointing: on (keeps one activation per layer), optimizer: adamw_8bit (a quarter of its state) "
    "or finetuning: lora (no gradients and optimizer state for the base weights), or free some memory, and run again"
)


class UserError(Exception):
    """An error that the user can fix. The text says where, what was found, what is allowed and what to do."""


@contextmanager
def user_errors(where: str | Path, fix: str = "restore it with `dvc checkout`, or write it again") -> Iterator[None]:
    """Turn the exceptions of a library that reads a file or folder into a `UserError`.

    Args:
        where: the path, or the text before the reason in the message.
        fix: what the user can do.

    Raises:
        UserError: the content is damaged or of another kind than expected.
        OSError: the file is missing, or the operating system can't read it.
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
        raise UserError(f"{where}: can't be read: {describe_reason(error)}; {fix}") from None


def describe_reason(error: Exception) -> str:
    """The text of a library's error on one line, at most 300 characters; its type if it has no text."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, the CPU or the GPU has run out of memory; each reports it in its own way."""
    texts = "out of memory|allocate memory|CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, MemoryError) or bool(re.search(texts, str(error)))
