"""Dropless (DeepSeek-V3 report, section 2.1.2: no tokens are dropped in training or inference)."""

from __future__ import annotations

from typing import Literal

from sim.gating.capacity import Asked, Capacity
from sim.tokens import I16


class NoCapacity(Capacity):
    """Every choice is kept.

    >>> import numpy as np
    >>> ids = np.array([[1], [1], [1]], np.int16)
    >>> asked = Asked(ids, np.ones((3, 1), np.float32), np.zeros(3, np.int32), 2, np.random.default_rng)
    >>> NoCapacity().keep(asked).ravel().tolist()
    [1, 1, 1]
    """

    kind: Literal["none"] = "none"

    def keep(self, asked: Asked) -> I16:
        return asked.topk_ids
