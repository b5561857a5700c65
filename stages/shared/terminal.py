"""What a person at the terminal sees of a stage: a bar while it works, then a few lines on what came of it."""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.shared.text import printable

LOG_WIDTH = 200  # columns where nobody looks: no line of a log is broken
T = TypeVar("T")


def console() -> Console:
    """Where to print. Words of data and models are no markup there, and colours are for terminals."""
    width = None if sys.stdout.isatty() else LOG_WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def bar(items: Iterable[T], doing: str, unit: str, total: int | None = None) -> Iterable[T]:
    """The items, with a bar on the terminal that comes after a second and is gone when they are."""
    from tqdm import tqdm  # not above: it looks at TQDM_DISABLE, which `run` sets, when it is imported

    progress: Iterable[T] = tqdm(items, doing, total=total, unit=unit, unit_scale=True, leave=False, delay=1)
    return progress


def summary(facts: Mapping[str, str], wrote: Sequence[str | Path], then: str) -> None:
    """Print facts by name, the paths that were written with their sizes, and the next useful command."""
    files = ", ".join(f"{path} ({size(disk_use(Path(path)))})" for path in wrote)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in {**facts, "wrote": files, "next": then}.items():
        table.add_row(f"  {name}", Text(printable(value), "cyan" if name == "next" else ""))
    out = console()
    with out.capture() as printed:
        out.print(table)
    print(re.sub(" +$", "", printed.get(), flags=re.MULTILINE), end="")


def disk_use(folder: Path) -> int:
    """Bytes that a file or folder takes on the disk, a file of two names once."""
    blocks = {}
    for path in [folder, *folder.rglob("*")]:
        with suppress(FileNotFoundError):  # another process may delete it
            entry = path.lstat()
            blocks[entry.st_ino] = entry.st_blocks
    return 512 * sum(blocks.values())


def size(num_bytes: float) -> str:
    """Bytes as a person reads them: three digits, powers of 1000."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
