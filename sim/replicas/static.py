"""One fixed copy per source rank (SGLang ``ep_dispatch_algorithm: static``)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.replicas import ReplicaChoice
from sim.slots import Slots
from sim.tokens import I32, I64


class Static(ReplicaChoice):
    """Source s sends all tokens for an expert to its (s mod r)-th slot of r."""

    kind: Literal["static"] = "static"

    def quotas(self, demand: I64, physical_to_logical_map: I32, slots: Slots) -> I64:
        quota: I64 = np.zeros((len(demand), slots.n_slots), dtype=np.int64)
        for expert in range(slots.n_routed_experts):
            copies = np.flatnonzero(physical_to_logical_map == expert)
            if len(copies):
                sources = np.arange(len(demand))
                quota[sources, copies[sources % len(copies)]] = demand[:, expert]
        return quota
