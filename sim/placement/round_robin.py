"""Experts dealt out like cards (vLLM ``expert_placement_strategy: round_robin``): splits expert groups over all nodes."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.placement import Placement
from sim.tokens import I32


class RoundRobin(Placement):
    """Expert e lives on rank e mod ep_size.

    >>> RoundRobin().place(8, 4, np.random.default_rng(0)).tolist()
    [0, 4, 1, 5, 2, 6, 3, 7]
    """

    kind: Literal["round_robin"] = "round_robin"

    def place(self, n_routed_experts: int, ep_size: int, rng: np.random.Generator) -> I32:
        return np.arange(n_routed_experts, dtype=np.int32).reshape(-1, ep_size).T.ravel()
