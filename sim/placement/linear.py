"""Consecutive experts on consecutive ranks (vLLM ``linear``, SGLang ``trivial``): keeps expert groups inside a node."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.placement import Placement
from sim.tokens import I32


class Linear(Placement):
    """Slot s holds expert s.

    >>> Linear().place(8, 4, np.random.default_rng(0)).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """

    kind: Literal["linear"] = "linear"

    def place(self, n_routed_experts: int, ep_size: int, rng: np.random.Generator) -> I32:
        return np.arange(n_routed_experts, dtype=np.int32)
