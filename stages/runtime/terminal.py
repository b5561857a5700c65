"""Terminal output of a stage: a progress bar while it runs, then a summary of a few lines."""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.runtime.secrets import without_secrets
from stages.text import printable

LOG_WIDTH = 200  # columns when the output is not a terminal, so that lines of a log are not wrapped
T = TypeVar("T")


def console() -> Console:
    """A console that shows text from data and models without markup, and uses colors only on a terminal."""
    width = None if sys.stdout.isatty() else LOG_WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def progress(items: Iterable[T], desc: str, unit: str, total: int | None = None) -> Iterable[T]:
    """Iterate with a progress bar that appears after a second and disappears at the end."""
    from tqdm import tqdm  # imported here because it reads TQDM_DISABLE, which `run` sets, at import

    tqdm.monitor_interval = 0  # no thread: if a signal comes while tqdm starts it, tqdm swallows the signal's exception
    bar: Iterable[T] = tqdm(items, desc, total=total, unit=unit, unit_scale=True, leave=False, delay=1)
    return bar


def summary(results: Mapping[str, str], wrote: Sequence[str | Path], then: str) -> None:
    """Print results by name, the written paths with their sizes, and the next useful command."""
    files = ", ".join(f"{path} ({format_bytes(disk_usage(Path(path)))})" for path in wrote)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in {**results, **({"wrote": files} if wrote else {}), "next": then}.items():
        table.add_row(f"  {name}", Text(printable(without_secrets(value)), "cyan" if name == "next" else ""))
    out = console()
    with out.capture() as printed:
        out.print(table)
    print(re.sub(" +$", "", printed.get(), flags=re.MULTILINE), end="")


def disk_usage(path: Path) -> int:
    """Bytes that a file or folder takes on disk; hard links are counted once."""
    blocks = {}
    for entry in [path, *path.rglob("*")]:
        with suppress(FileNotFoundError):  # another process may have deleted it
            status = entry.lstat()
            blocks[status.st_ino] = status.st_blocks
    return 512 * sum(blocks.values())


def format_bytes(num_bytes: float) -> str:
    """Bytes with three significant digits and a decimal unit.

    Example:
        >>> format_bytes(1_234_567)
        '1.23 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
