"""Ray: a cluster that runs already (``--address HOST:PORT``, or ``auto`` on one of its nodes), or one for this sweep alone.

A cluster's nodes need this package and the caller's plug-in modules importable under the same names: the same virtual
environment on a shared disk, or one installed the same way. Nothing is copied there but the items.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from sim.backends import TRIES, Lost, absent
from sim.backends._code import ONE_THREAD, Shipped, check_reached, undisturbed

A = TypeVar("A")
B = TypeVar("B")
# Results are a few rows each; Ray would reserve a third of the machine's memory for them.
STORE_BYTES = 80 * 2**20
# Ray prints to stdout whenever a worker dies: the pattern of what it is to skip.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}


class Backend:
    """Items as Ray tasks of one CPU each; see `sim.backends.Backend`."""

    def __init__(self, jobs: int | None, address: str | None) -> None:
        self.jobs, self.address = jobs, address
        self.workers = 0
        self._folder: str | None = None

    def __enter__(self) -> Backend:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            import ray
        except ImportError:
            raise absent("ray") from None
        if ray.is_initialized():
            raise ValueError("--backend ray: this process is connected to Ray already; call ray.shutdown() first")
        try:
            self._connect(ray)
            self.workers = self._room(ray)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        finally:
            # Ray takes SIGTERM for itself; the front doors have their own way to end.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
        return self

    def _room(self, ray: Any) -> int:
        """Items to have in flight: as asked, else as many as the cluster has CPUs now, for nodes come and go."""
        return self.jobs or max(1, int(ray.cluster_resources().get("CPU", 0)))

    def _connect(self, ray: Any) -> None:
        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        if self.address is not None:
            check_reached(self.address)
            try:
                ray.init(address=self.address, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(f"--address {self.address}: no Ray cluster answers there ({reason})") from None
            return
        # By default a token keeps other users of this machine out, which needs no notice on stderr.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        for name in ONE_THREAD:
            os.environ.setdefault(name, "1")
        head = ray.init(
            address="local",
            num_cpus=self.jobs or os.cpu_count() or 1,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            **quiet,
        )
        self._folder = head.address_info["session_dir"]

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import ray

        with undisturbed():
            ray.shutdown()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, function: Callable[[A], B], items: Sequence[A]) -> Iterator[tuple[int, B]]:
        import ray
        from ray import exceptions

        gone = (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.ObjectLostError, exceptions.OutOfMemoryError)  # fmt: skip
        shipped = ray.put(Shipped(function))
        # Tries are counted here: Ray's own would not say which item failed.
        task: Any = ray.remote(num_cpus=1, max_retries=0)(_call)
        todo, again = iter(range(len(items))), list[int]()
        tries: Counter[int] = Counter()
        running: dict[Any, int] = {}
        try:
            while True:
                room = self._room(ray)
                while len(running) < room and (index := again.pop() if again else next(todo, None)) is not None:
                    running[task.remote(shipped, items[index])] = index
                if not running:
                    return
                done, _ = ray.wait(list(running), num_returns=1)
                index = running.pop(done[0])
                try:
                    result = ray.get(done[0])
                except exceptions.RayTaskError as error:
                    raise error.cause from None
                except gone:
                    tries[index] += 1
                    if tries[index] == TRIES:
                        raise Lost(index) from None
                    again.append(index)
                    continue
                yield index, result
        finally:
            for reference in running:  # on a cluster that outlives us
                ray.cancel(reference, force=True)


def _call(shipped: Callable[[A], B], item: A) -> B:
    return shipped(item)
