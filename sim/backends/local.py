"""Processes of this machine: started afresh (spawn), one item at a time, gone when this process is."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from types import TracebackType

from sim.backends import TRIES, A, B, Lost
from sim.backends._code import Shipped
from sim.workers import pool


class Backend:
    """``jobs`` processes; with one job, this process itself. See `sim.backends.Backend`."""

    def __init__(self, jobs: int | None, address: str | None) -> None:
        if address is not None:
            raise ValueError("--address is of --backend ray or dask; local works on this machine")
        self.workers = jobs or 1
        self._others: list[object] = []
        self._idle: list[ProcessPoolExecutor] = []

    def __enter__(self) -> Backend:
        self._others = [*multiprocessing.active_children()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:  # nobody waits for the items in progress
            for worker in multiprocessing.active_children():
                if worker not in self._others:
                    worker.terminate()
        for executor in self._idle:
            executor.shutdown()

    def run(self, function: Callable[[A], B], items: Sequence[A]) -> Iterator[tuple[int, B]]:
        if self.workers == 1:
            yield from ((index, function(item)) for index, item in enumerate(items))
            return
        shipped = Shipped(function)
        # One pool for each process: when a process dies, it is known which item it had, and the others go on.
        idle = self._idle
        idle += [pool(1) for _ in range(len(idle), min(self.workers, len(items)))]
        waiting = [(index, 1) for index in reversed(range(len(items)))]
        busy: dict[Future[B], tuple[ProcessPoolExecutor, int, int]] = {}
        try:
            while waiting or busy:
                while waiting and idle:
                    index, tries = waiting.pop()
                    executor = idle.pop()
                    try:
                        future = executor.submit(shipped, items[index])
                    except BrokenExecutor:  # its process went while it had nothing to do
                        executor = pool(1)
                        future = executor.submit(shipped, items[index])
                    busy[future] = (executor, index, tries)
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    executor, index, tries = busy.pop(future)
                    try:
                        result = future.result()
                    except BrokenExecutor:
                        executor.shutdown()
                        if tries == TRIES:
                            raise Lost(index) from None
                        idle.append(pool(1))
                        waiting.append((index, tries + 1))
                        continue
                    idle.append(executor)
                    yield index, result
        finally:
            for executor, _, _ in busy.values():
                executor.shutdown(wait=False, cancel_futures=True)
