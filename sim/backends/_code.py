"""What a worker of an engine needs beyond the function: the places of our code, and plug-ins that are not ours."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Generic, TypeVar

from sim.plugin import Plugin

A = TypeVar("A")
B = TypeVar("B")

ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Set to 1 for workers: their BLAS threads would compete with the workers themselves."""


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
