"""Which rank hosts which expert. Knows experts and slots only; one file per rule."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from sim.plugin import Plugin
from sim.tokens import I32


class Placement(Plugin):
    """A placement rule. Slots are numbered rank after rank: slot s lives on rank s // (slots per rank)."""

    @abstractmethod
    def place(self, n_routed_experts: int, ep_size: int, rng: np.random.Generator) -> I32:
        """Return ``physical_to_logical_map``, [slots] int32: the expert in each slot of one layer.

        ep_size divides n_routed_experts. rng: the stream of this (replica, layer).
        """


def expert_to_rank(physical_to_logical_map: I32, n_routed_experts: int, ep_size: int) -> I32:
    """Return the rank of each expert, [E] int32. Raises ValueError unless every expert has exactly one slot."""
    if not np.array_equal(np.sort(physical_to_logical_map), np.arange(n_routed_experts)):
        raise ValueError("a placement without replicas must hold every expert exactly once")
    ranks = np.empty(n_routed_experts, dtype=np.int32)
    per_rank = len(physical_to_logical_map) // ep_size
    ranks[physical_to_logical_map] = np.arange(len(physical_to_logical_map), dtype=np.int32) // per_rank
    return ranks
