"""Consecutive experts on consecutive ranks (vLLM ``linear``, SGLang ``trivial``): keeps expert groups inside a node."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.placement import Observed, Placement
from sim.slots import Slots
from sim.tokens import I32


class Linear(Placement):
    """Slot s holds expert s mod E: redundant slots repeat the first experts, whatever their load.

    >>> Linear().place(Slots(6, 4, 2), Observed.nothing(1, 6), np.random.default_rng(0)).tolist()
    [[0, 1, 2, 3, 4, 5, 0, 1]]
    """

    kind: Literal["linear"] = "linear"

    def place(self, slots: Slots, observed: Observed, rng: np.random.Generator) -> I32:
        row = np.arange(slots.n_slots, dtype=np.int32) % np.int32(slots.n_routed_experts)
        return np.tile(row, (observed.expert_tokens.shape[1], 1))
