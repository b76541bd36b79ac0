"""Experts dealt out like cards (vLLM ``expert_placement_strategy: round_robin``): splits expert groups over all nodes."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.placement import Observed, Placement
from sim.slots import Slots
from sim.tokens import I32


class RoundRobin(Placement):
    """Expert e lives on rank e mod ep_size; redundant slots repeat the first experts.

    >>> RoundRobin().place(Slots(8, 4), Observed.nothing(1, 8), np.random.default_rng(0)).tolist()
    [[0, 4, 1, 5, 2, 6, 3, 7]]
    """

    kind: Literal["round_robin"] = "round_robin"

    def place(self, slots: Slots, observed: Observed, rng: np.random.Generator) -> I32:
        dealt = np.arange(slots.n_slots, dtype=np.int32).reshape(-1, slots.ep_size).T.ravel()
        return np.tile(dealt % np.int32(slots.n_routed_experts), (observed.expert_tokens.shape[1], 1))
