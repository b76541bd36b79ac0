"""No balancing: what the router likes is what the experts get."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from sim.gating.balance import Adjustment, Balance, Seen
from sim.gating.piece import GateShape
from sim.tokens import F64


class NoBalance(Balance):
    """Changes nothing.

    >>> rule, shape = NoBalance(), GateShape(3, 1)
    >>> rule.adjust(rule.update(rule.start(shape), Seen(np.array([[[8, 4, 0]]])), shape, step=0), shape)
    Adjustment(scale=1.0, shift=0.0, offset=0.0)
    """

    kind: Literal["none"] = "none"
    learns: ClassVar[bool] = False

    def start(self, shape: GateShape) -> F64:
        return np.zeros(0)

    def adjust(self, state: F64, shape: GateShape) -> Adjustment:
        return Adjustment()

    def update(self, state: F64, seen: Seen, shape: GateShape, step: int, gain: float = 1.0) -> F64:
        return state
