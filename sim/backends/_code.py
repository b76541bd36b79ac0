"""What a worker of an engine needs beyond the function: the places of our code, and plug-ins that are not ours."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from sim.plugin import Plugin

A = TypeVar("A")
B = TypeVar("B")

CONNECT_S = 5
ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Set to 1 for workers: their BLAS threads would compete with the workers themselves."""


def check_reached(address: str) -> None:
    """Raise ValueError if nobody listens at ``HOST:PORT`` or ``scheme://HOST:PORT``: engines may try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--address {address}: nobody answers there ({error})") from None


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let an engine end in peace: a front door that was interrupted interrupts again and again (`sim.console`)."""
    alarm = getattr(signal, "SIGALRM", None)
    if alarm is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(alarm, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(alarm, signal.SIG_DFL if before is None else before)


class Shipped(Generic[A, B]):
    """A function that a worker process calls after importing the plug-ins that its caller has.

    Classes register by existing, so a worker that has not imported their module does not know their kind. Raises
    ValueError if a plug-in stands where no worker can import it: in a notebook cell or the calling script.
    """

    def __init__(self, function: Callable[[A], B]) -> None:
        self.function = function
        self.modules = _plugin_modules()
        self.path = [os.path.abspath(folder) for folder in sys.path]

    def __call__(self, item: A) -> B:
        sys.path += [folder for folder in self.path if folder not in sys.path and os.path.exists(folder)]
        for name in self.modules:
            importlib.import_module(name)
        return self.function(item)


def _plugin_modules() -> list[str]:
    """Modules outside this package that define plug-ins."""
    found: dict[str, str] = {}
    pending = list(Plugin.__subclasses__())
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if cls.__module__.partition(".")[0] != __name__.partition(".")[0]:
            found[cls.__module__] = cls.__name__
    for module in ("__main__", "__mp_main__"):
        if module in found:
            raise ValueError(
                f"plug-in {found[module]} stands in the calling script or notebook, where workers of another engine "
                "cannot import it: move it into a module"
            )
    return sorted(filter(_importable, found))


def _importable(name: str) -> bool:
    """Whether a worker would find the module: some are gone, as classes of a deleted file are not."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None and os.path.exists(spec.origin)
