"""A random permutation per layer: what placement is worth is measured against this."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.placement import Observed, Placement
from sim.slots import Slots
from sim.tokens import I32


class RandomPlacement(Placement):
    """Every expert in one slot, redundant slots with different experts drawn at random; all orders equally likely."""

    kind: Literal["random"] = "random"

    def place(self, slots: Slots, observed: Observed, rng: np.random.Generator) -> I32:
        return np.stack([_layer(slots, rng) for _ in range(observed.expert_tokens.shape[1])])


def _layer(slots: Slots, rng: np.random.Generator) -> I32:
    experts = slots.n_routed_experts
    if not slots.num_redundant_experts:
        return rng.permutation(experts).astype(np.int32)
    rounds = -(-slots.n_slots // experts)
    filled = np.concatenate([np.arange(experts), *(rng.permutation(experts) for _ in range(rounds - 1))])
    return rng.permutation(filled[: slots.n_slots]).astype(np.int32)
