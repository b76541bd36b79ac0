"""One fixed copy per source rank, whatever the batch and wherever the copy lives."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.replicas import Copies, ReplicaChoice
from sim.slots import Slots
from sim.tokens import I32, I64


class Static(ReplicaChoice):
    """Source s sends all tokens for an expert to its (s mod r)-th slot of r.

    >>> twice = np.array([0, 1, 0, 1], dtype=np.int32)
    >>> Static().quotas(np.array([[5, 1], [4, 2]]), twice, Slots(2, 2, 2)).tolist()
    [[5, 1, 0, 0], [0, 0, 4, 2]]
    """

    kind: Literal["static"] = "static"

    def quotas(self, demand: I64, physical_to_logical_map: I32, slots: Slots) -> I64:
        copies = Copies.of(physical_to_logical_map, slots.n_routed_experts)
        turn = np.arange(len(demand))[:, None] % copies.counts[copies.expert]
        quota: I64 = np.zeros((len(demand), slots.n_slots), dtype=np.int64)
        quota[:, copies.slot] = np.where(turn == copies.ordinal, demand[:, copies.expert], 0)
        return quota
