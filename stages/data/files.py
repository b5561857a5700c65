"""Atomic writes: a file is complete or absent, and equal content gives equal bytes."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.runtime.errors import user_errors


@contextmanager
def atomic_path(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, renamed to `path` if the block succeeds and deleted otherwise.

    Args:
        durable: flush everything to disk first, so that the result of hours of work survives a power failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)  # left over from a killed process
    try:
        yield partial
        if durable:
            for written in [*partial.rglob("*"), partial]:
                _flush(written)
        if path.is_dir() or partial.is_dir():
            remove(path)  # a folder can't replace a folder or a file by a rename
        partial.replace(path)
        if durable:
            _flush(path.parent)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Delete a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file or folder to disk (`fsync`)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(*paths: Path) -> str:
    """SHA-256 of the files' concatenated contents, as `cat FILES | sha256sum` prints it."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_csv(path: Path, header: str, rows: Iterable[Sequence[float | None]]) -> None:
    """Write numbers with six significant digits, atomically; None becomes an empty field."""
    lines = (",".join("" if value is None else f"{value:.6g}" for value in row) for row in rows)
    write_text(path, "\n".join([header, *lines]) + "\n")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically.

    Raises:
        ValueError: a number is infinite or NaN.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is not valid JSON.
        OSError: the file is missing, or the operating system can't read it.
    """
    with user_errors(path):
        return json.loads(path.read_text(encoding="utf-8"))
