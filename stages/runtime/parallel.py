"""Work ahead in threads, and process the shards of a table in parallel, one process per CPU core."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from threading import RLock, Thread
from typing import Any, TypeVar

from stages.runtime.errors import UserError
from stages.runtime.terminal import progress

S = TypeVar("S")
T = TypeVar("T")


def prefetch_map(function: Callable[[S], T], items: Iterator[S], num_ahead: int) -> Iterator[T]:
    """`map` with a thread for each of the next items, at most `num_ahead` of them."""
    with ThreadPoolExecutor(num_ahead) as pool:
        pending = deque(pool.submit(function, item) for item in islice(items, num_ahead))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(items, 1))
            yield result


def map_processes(function: Callable[..., T], *arguments: Sequence[Any], desc: str) -> Iterator[T]:
    """`map` in worker processes, or in this process if there is a single item.

    Args:
        function: defined at the top level of a module, or a `functools.partial` of one.
        desc: what the function does, for the progress bar and for messages.

    Raises:
        UserError: the kernel killed a worker.
    """
    num_items = len(arguments[0])
    if num_items == 1:
        yield function(*(argument[0] for argument in arguments))
        return
    # Spawned, not forked: pyarrow and tokenizers have threads, and a fork would copy locks that those threads hold.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(num_items, num_cores()), context, _start_worker, (Path.cwd(),))
    try:
        # Workers inherit the mask, so they never see Ctrl-C. This process gets it when the mask is reset below.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        results = pool.map(function, *arguments)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield from progress(results, desc, "shard", num_items)
    except BrokenProcessPool:
        raise UserError(
            f"{desc}: a worker process was killed, probably because memory ran out; free some memory, "
            "or use fewer cores (`taskset --cpu-list 0-3 dvc repro`), and run again"
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown()


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(folder: Path) -> None:
    """Prepare a worker process to run in the folder of its parent."""
    from tqdm import tqdm

    os.chdir(folder)
    tqdm.set_lock(RLock())  # tqdm's own lock is a semaphore, which a terminated process would leak
    # One process per core: more threads would only compete for the cores.
    os.environ |= {"TQDM_DISABLE": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent does: a worker that outlives it would write into the outputs of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "not in a worker"  # noqa: S101
    wait([parent.sentinel])
    os._exit(1)
