"""Processes that share work: same results and order on any number of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from sim.estimate import Estimate, free_memory_bytes

A = TypeVar("A")
B = TypeVar("B")
# Starting a worker process costs about a second, so small runs stay in this one.
WORTH_A_PROCESS_S = 4.0


def processes(asked: int | None, tasks: int, expected: Estimate) -> int:
    """Return how many processes to use: as ``asked``, else as many as cores where that pays."""
    if asked is not None:
        return asked
    if expected.seconds <= WORTH_A_PROCESS_S:
        return 1
    fit = int(0.5 * free_memory_bytes() // expected.memory_bytes)  # the estimate is of one process
    return max(1, min(os.cpu_count() or 1, tasks, fit))


def watched(items: Iterable[B], total: int, label: str, progress: bool) -> Iterator[B]:
    """Yield ``items``, with a bar on stderr if ``progress`` is to be seen; where no terminal shows it, a line every half
    minute."""
    if not progress:
        yield from items
        return
    from tqdm import tqdm

    yield from tqdm(items, total=total, desc=label, file=sys.stderr, leave=False, unit="task", **pace())


def pace() -> dict[str, Any]:
    """How often a tqdm bar on stderr speaks: all the time on a terminal, every half minute into a file."""
    quiet_s = 0.0 if sys.stderr.isatty() else 30.0
    return {"delay": quiet_s, "mininterval": max(0.1, quiet_s)}


class Workers:
    """``map`` on this process or on several; order and results are the same."""

    def __init__(self, jobs: int) -> None:
        self.pool = pool(jobs) if jobs > 1 else None

    def map(self, function: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
        if self.pool is None:
            return map(function, items)
        # Not Executor.map: when abandoned it cancels futures, which races with a pool that is going down.
        return (future.result() for future in [self.pool.submit(function, item) for item in items])

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        if self.pool is not None:
            if kind is not None:  # interrupted or failed: nobody waits for the tasks in progress
                import multiprocessing

                for worker in multiprocessing.active_children():
                    worker.terminate()
            self.pool.shutdown()


def pool(jobs: int) -> ProcessPoolExecutor:
    """Fresh processes that leave interrupts to this one and end when it does."""
    # BLAS threads of the workers would compete with the workers themselves.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    import multiprocessing

    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    """Leave interrupts to the parent, and do not outlive it."""
    import multiprocessing
    import signal
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
