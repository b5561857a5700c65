"""Shards worked on by as many processes as there are cores."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from threading import RLock, Thread
from typing import Any, TypeVar

from stages.shared.errors import UserError
from stages.shared.terminal import bar

T = TypeVar("T")


def map_processes(function: Callable[..., T], *arguments: Sequence[Any], doing: str) -> Iterator[T]:
    """`map`, each item in a process of its own kind; in this one where there is one item.

    Args:
        function: of a module's top level, or a `functools.partial` of one.
        doing: what it does, for the bar and for messages.

    Raises:
        UserError: the kernel killed a process.
    """
    num_items = len(arguments[0])
    if num_items == 1:
        yield function(*(argument[0] for argument in arguments))
        return
    # Spawned, not forked: pyarrow and tokenizers have threads, which a fork would cut off while they hold locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(num_items, num_cores()), context, _start_worker, (Path.cwd(),))
    try:
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for this process alone
        results = pool.map(function, *arguments)
        signal.signal(signal.SIGINT, on_interrupt)
        yield from bar(results, doing, "shard", num_items)
    except BrokenProcessPool:
        raise UserError(
            f"{doing}: one of {num_cores()} processes was killed, as the kernel does where memory runs out; free some "
            "memory, or take fewer cores (`taskset --cpu-list 0-3 dvc repro`), and run again"
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown()


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(folder: Path) -> None:
    from tqdm import tqdm

    os.chdir(folder)
    tqdm.set_lock(RLock())  # its own is a semaphore, which a process that is ended would leave behind
    # One process a core: threads in each would only stand in each other's way.
    os.environ |= {"TQDM_DISABLE": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker that outlived a parent that was killed would write into the next run's outputs."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "not in a worker"  # noqa: S101
    wait([parent.sentinel])
    os._exit(1)
