"""Processes that share work: same results and order on any number of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


class Workers:
    """``map`` on this process or on several; order and results are the same."""

    def __init__(self, jobs: int) -> None:
        self.pool = _pool(jobs) if jobs > 1 else None

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


def _pool(jobs: int) -> ProcessPoolExecutor:
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
