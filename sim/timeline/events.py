"""Events of the Trace Event Format (https://perfetto.dev/docs/getting-started/other-formats#chrome-json-format) as text.

What is decided here and why:

- Times are microseconds, cut to whole nanoseconds, which is what Perfetto keeps, and a fifth of one more. Some of its
  versions round and others cut off, both in floating point: picoseconds, or exact nanoseconds, would make slices overlap
  by one, and it drops slices that overlap.
- No thread shares its number with another thread or with a process: Perfetto takes them to be of one machine.
- Arrows are tied to the middle of their slices, where no rounding can put them outside.
- No colours: ``cname`` is not read by Perfetto, which colours by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

SHORTEST_ARROW_PS = 4_000
"""Slices below 4 ns may round to a point, to which no arrow can be tied."""

Args = Mapping[str, Any]


@lru_cache(maxsize=4096, typed=True)
def text(value: Any) -> str:
    """Return ``value`` as JSON without line breaks; floats to six digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False)


def members(args: Args) -> str:
    """Return the inside of a JSON object; numbers that JSON lacks are left out."""
    known = {key: value for key, value in args.items() if not isinstance(value, float) or math.isfinite(value)}
    return ",".join(f"{text(key)}:{text(value)}" for key, value in known.items())


def at(ps: int) -> str:
    """Return a moment.

    >>> at(12_345_678)
    '12.3452'
    """
    ns = ps // 1000
    return f"{ns // 1000}.{ns % 1000:03d}2"


def lasts(start_ps: int, end_ps: int) -> str:
    """Return a duration that ends where what begins at ``end_ps`` begins.

    >>> lasts(900, 2100)
    '0.0022'
    """
    return at((end_ps // 1000 - start_ps // 1000) * 1000)


class Scribe:
    """Writes the events of one trace, and hands out the numbers of its processes, threads and arrows."""

    def __init__(self) -> None:
        self._numbers = self._arrows = self._processes = 0

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def arrow_number(self) -> int:
        """Return the number of a new arrow."""
        self._arrows += 1
        return self._arrows

    def process(self, name: str) -> tuple[int, list[str]]:
        """Return the number of a new process, below the others, and the two events that name and place it."""
        pid = self._number()
        self._processes += 1
        return pid, [
            f'{{"ph":"M","pid":{pid},"name":"process_name","args":{{"name":{text(name)}}}}}',
            f'{{"ph":"M","pid":{pid},"name":"process_sort_index","args":{{"sort_index":{self._processes}}}}}',
        ]

    def thread(self, pid: int, name: str) -> tuple[int, list[str]]:
        """Return the number of a new thread, below the others of its process, and the two events that name and place it."""
        tid = self._number()
        return tid, [
            f'{{"ph":"M","pid":{pid},"tid":{tid},"name":"thread_name","args":{{"name":{text(name)}}}}}',
            f'{{"ph":"M","pid":{pid},"tid":{tid},"name":"thread_sort_index","args":{{"sort_index":{tid}}}}}',
        ]

    def slice(self, pid: int, tid: int, name: str, start_ps: int, end_ps: int, args: str, category: str) -> str:
        """Return a slice; ``args`` as `members` returns them."""
        return (
            f'{{"ph":"X","pid":{pid},"tid":{tid},"ts":{at(start_ps)},"dur":{lasts(start_ps, end_ps)},'
            f'"name":{text(name)},"cat":"{category}","args":{{{args}}}}}'
        )

    def arrow(self, kind: str, pid: int, tid: int, number: int, name: str, start_ps: int, end_ps: int) -> str:
        """Return the start (``s``), a step (``t``) or the end (``f``) of arrow ``number``, tied to the slice that is there
        in the middle of the interval, which lasts `SHORTEST_ARROW_PS` at least."""
        bound = ',"bp":"e"' if kind == "f" else ""
        middle = at((start_ps + end_ps) // 2)
        return (
            f'{{"ph":"{kind}","pid":{pid},"tid":{tid},"ts":{middle},"id":{number},"name":{text(name)},'
            f'"cat":"flow"{bound}}}'
        )

    def counter(self, pid: int, name: str, at_ps: int, values: Args) -> str:
        """Return new values of a counter of a process."""
        return f'{{"ph":"C","pid":{pid},"ts":{at(at_ps)},"name":{text(name)},"args":{{{members(values)}}}}}'

    def instant(self, pid: int, tid: int, name: str, at_ps: int, args: Args) -> str:
        """Return a mark in a process."""
        return (
            f'{{"ph":"i","pid":{pid},"tid":{tid},"ts":{at(at_ps)},"name":{text(name)},"cat":"mark",'
            f'"s":"p","args":{{{members(args)}}}}}'
        )
