"""Dropless (DeepSeek-V3 report, section 2.1.2: no tokens are dropped in training or inference)."""

from __future__ import annotations

from typing import Literal

from sim.gating.capacity import Capacity
from sim.tokens import F32, I16


class NoCapacity(Capacity):
    """Every choice is kept.

    >>> import numpy as np
    >>> NoCapacity().keep(np.array([[1], [1], [1]], np.int16), np.ones((3, 1), np.float32), 2).ravel().tolist()
    [1, 1, 1]
    """

    kind: Literal["none"] = "none"

    def keep(self, topk_ids: I16, affinity: F32, n_routed_experts: int) -> I16:
        return topk_ids
