"""No balancing: what the router likes is what the experts get."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.gating.balance import Balance
from sim.tokens import F64, I64


class NoBalance(Balance):
    """Changes nothing.

    >>> rule = NoBalance()
    >>> rule.adjust(rule.update(rule.start(3), np.array([[[8, 4, 0]]]), step=0))
    (1.0, 0.0)
    """

    kind: Literal["none"] = "none"

    def start(self, n_routed_experts: int) -> F64:
        return np.zeros(n_routed_experts)

    def adjust(self, state: F64) -> tuple[F64 | float, F64 | float]:
        return 1.0, 0.0

    def update(self, state: F64, counts: I64, step: int, gain: float = 1.0) -> F64:
        return state
