"""Events of the serving loop in SimPy: what happens at one instant happens in a stated order."""

from __future__ import annotations

from enum import IntEnum

import simpy
from simpy.events import EventPriority

_ID_BITS = 40


class Order(IntEnum):
    """Events of one instant, first to last: a group that starts an iteration sees all that arrived until then."""

    FAULT = 1
    ARRIVAL = 2
    TRANSFER = 3
    PLAN = 4
    END = 5
    WAKE = 6


class At(simpy.Event):
    """Happens in ``delay_ps``; within an instant by order, then by ``ident``, a number below 2**40."""

    def __init__(self, env: simpy.Environment, delay_ps: int, order: Order, ident: int = 0) -> None:
        # Spelt out, as SimPy's own Timeout does: one is made per iteration.
        self.env = env
        self.callbacks = []
        self._ok = True
        self._value = None
        env.schedule(self, EventPriority((order << _ID_BITS) | ident), delay_ps)


class Sleep(simpy.Event):
    """Happens at the instant of the first `wake`."""

    woken = False

    def wake(self, ident: int) -> None:
        """Let those that wait for it go on, at this instant."""
        if not self.woken:
            self.woken, self._ok, self._value = True, True, None
            self.env.schedule(self, EventPriority((Order.WAKE << _ID_BITS) | ident), 0)
