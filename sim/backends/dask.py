"""Dask: a scheduler that runs already (``--address tcp://HOST:PORT``), or one with workers on this machine for this sweep.

A cluster's workers need this package and the caller's plug-in modules importable under the same names. Items run one to
a worker thread, so give every worker process one thread: ``dask worker tcp://HOST:PORT --nworkers 8 --nthreads 1``.
"""

from __future__ import annotations

import importlib
import logging
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, TypeVar

from sim.backends import TRIES, Lost, absent
from sim.backends._code import CONNECT_S, ONE_THREAD, Shipped, check_reached, undisturbed

A = TypeVar("A")
B = TypeVar("B")


class Backend:
    """Items as futures of a Dask scheduler; see `sim.backends.Backend`.

    A cluster's own ``distributed.scheduler.allowed-failures`` says how often it tries an item by itself.
    """

    def __init__(self, jobs: int | None, address: str | None) -> None:
        self.jobs, self.address = jobs, address
        self.workers = 0

    def __enter__(self) -> Backend:
        for name in ONE_THREAD:
            os.environ.setdefault(name, "1")
        try:
            import dask

            distributed: Any = importlib.import_module("distributed")  # which has no types
        except ImportError:
            raise absent("dask") from None
        if self.address is not None:
            check_reached(self.address)
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what is lost is tried again
        with ExitStack() as undo:
            undo.enter_context(dask.config.set({
                "distributed.scheduler.allowed-failures": 0,  # counted here
                "distributed.comm.timeouts.connect": f"{CONNECT_S}s",
            }))  # fmt: skip
            where: Any = self.address
            if where is None:
                where = undo.enter_context(distributed.LocalCluster(
                    n_workers=self.jobs or os.cpu_count() or 1, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL",
                ))  # fmt: skip
            try:
                self._client = undo.enter_context(distributed.Client(where, timeout=CONNECT_S, set_as_default=False))
            except (OSError, ValueError) as error:
                raise ValueError(f"--address {self.address}: no Dask scheduler answers there ({error})") from None
            self.workers = self._room()
            self._undo = undo.pop_all()
        return self

    def _room(self) -> int:
        """Items to have in flight: as asked, else as many as the cluster has threads now, for workers come and go."""
        return self.jobs or max(1, sum(self._client.nthreads().values()))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with undisturbed():
            self._undo.close()

    def run(self, function: Callable[[A], B], items: Sequence[A]) -> Iterator[tuple[int, B]]:
        distributed: Any = importlib.import_module("distributed")
        shipped = Shipped(function)
        name = f"{getattr(function, '__name__', 'item')}-{uuid.uuid4().hex}"
        todo, suspects = iter(range(len(items))), list[int]()
        tries: Counter[int] = Counter()
        running: dict[Any, int] = {}
        alone = False
        done = distributed.as_completed(loop=self._client.loop)

        def start(index: int) -> None:
            future = self._client.submit(shipped, items[index], key=f"{name}-{index}-{tries[index]}", pure=False)
            running[future] = index
            done.add(future)

        try:
            while True:
                room = self._room()
                while len(running) < room and (index := next(todo, None)) is not None:
                    start(index)
                if not running:
                    if not suspects:
                        return
                    # A dead worker is blamed on all that it held: only an item that runs alone is surely the cause.
                    alone = True
                    start(suspects.pop(0))
                future = next(done)
                if future.status == "lost":  # with its worker, once finished: it is computed again
                    done.add(future)
                    continue
                index = running.pop(future)
                try:
                    result = future.result()
                except distributed.KilledWorker as error:
                    tries[index] += error.allowed_failures + 1
                    if alone and tries[index] >= TRIES:
                        raise Lost(index, tries[index]) from None
                    suspects.append(index)
                    continue
                yield index, result
        finally:
            self._client.cancel(list(running))
