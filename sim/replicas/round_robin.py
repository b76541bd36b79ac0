"""Every source deals its tokens over all copies: even, and blind to load and distance."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.replicas import Copies, ReplicaChoice
from sim.slots import Slots
from sim.tokens import I32, I64


class RoundRobin(ReplicaChoice):
    """Source s deals its tokens for an expert over the r slots in turn, from its (s mod r)-th on.

    The offset keeps what does not divide by r from heaping up on the first slots.

    >>> twice = np.array([0, 1, 0, 1], dtype=np.int32)
    >>> RoundRobin().quotas(np.array([[5, 1], [4, 3]]), twice, Slots(2, 2, 2)).tolist()
    [[3, 1, 2, 0], [2, 1, 2, 2]]
    """

    kind: Literal["round_robin"] = "round_robin"

    def quotas(self, demand: I64, physical_to_logical_map: I32, slots: Slots) -> I64:
        copies = Copies.of(physical_to_logical_map, slots.n_routed_experts)
        counts = copies.counts[copies.expert]
        turn = (copies.ordinal - np.arange(len(demand))[:, None]) % counts
        quota: I64 = np.zeros((len(demand), slots.n_slots), dtype=np.int64)
        quota[:, copies.slot] = (demand[:, copies.expert] + counts - 1 - turn) // counts
        return quota
