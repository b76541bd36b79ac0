"""Who runs the points of a sweep: processes here, or an engine that has other machines. One file per backend.

A backend knows nothing about scenarios: it calls a picklable function with every item, one item to a process at a time,
and yields what comes back as it comes. What is computed does not depend on who computes it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, TypeVar

from sim.located import nearest

A = TypeVar("A")
B = TypeVar("B")
TRIES = 3
"""How often an item is given to a worker before it is `Lost`."""


class Lost(Exception):
    """An item whose worker went away every time it was tried: killed for its memory, most often."""

    def __init__(self, index: int, tries: int = TRIES) -> None:
        super().__init__(index, tries)
        self.index = index

    def __str__(self) -> str:
        return f"item {self.index} lost its worker {self.args[1]} times (killed, or out of memory)"


class Backend(Protocol):
    """A context manager: on the way out its workers end, at once if an exception passes.

    jobs: workers to use; None: as many as it has. address: of the engine's head; None: an engine of one's own, on this
    machine. Raises ValueError with one line that says what to do: library absent (`absent`), address not reached, address
    where none is needed.
    """

    workers: int
    """Items that run at a time; known once the backend has been entered."""

    def __init__(self, jobs: int | None, address: str | None) -> None: ...

    def __enter__(self) -> Backend: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def run(self, function: Callable[[A], B], items: Sequence[A]) -> Iterator[tuple[int, B]]:
        """Yield ``(index, function(items[index]))`` as they complete, started in the order of ``items``.

        A worker that dies is replaced and its item tried again, `TRIES` times in all, then `Lost` is raised. An exception
        of ``function`` is raised as it is. Nothing is yielded twice.
        """
        ...


def names() -> list[str]:
    """Backends that can be asked for; each may need a library of its own."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))


def get(name: str) -> type[Backend]:
    """Return the backend called ``name``. Raises ValueError for a name that is none."""
    known = names()
    if name not in known:
        near = nearest(name, known)
        hint = f" (did you mean {near}?)" if near else ""
        raise ValueError(f"--backend {name}: must be one of {', '.join(known)}{hint}")
    found: type[Backend] = importlib.import_module(f"{__name__}.{name}").Backend
    return found


def absent(extra: str) -> ValueError:
    """The error for a backend whose library is not installed."""
    return ValueError(f"--backend {extra} needs a library that is not installed: pip install 'gatesim[{extra}]'")
