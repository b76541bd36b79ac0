"""Where experts may live: the slots of one MoE layer over the ranks of an expert-parallel (EP) group.

Sizes only. A placement fills slots with experts (``physical_to_logical_map``), a replica choice sends tokens to slots.
Slots are numbered rank after rank and ranks node after node, as in EPLB: slot s lives on rank s // slots_per_rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sim.tokens import I32


@dataclass(frozen=True, slots=True)
class Slots:
    """Sizes of a layer's slots. Raises ValueError unless every rank holds equally many.

    ranks_per_node: ranks that share NVLink; it divides ep_size or is larger. n_group: groups of consecutive experts
    that a group-limited gate keeps together, 1 without; it divides n_routed_experts.

    >>> s = Slots(n_routed_experts=256, ep_size=32, num_redundant_experts=32, ranks_per_node=8, n_group=8)
    >>> s.n_slots, s.slots_per_rank, s.n_nodes
    (288, 9, 4)
    """

    n_routed_experts: int
    ep_size: int
    num_redundant_experts: int = 0
    ranks_per_node: int = 8
    n_group: int = 1

    def __post_init__(self) -> None:
        if self.n_slots % self.ep_size:
            raise ValueError(
                f"n_routed_experts + num_redundant_experts = {self.n_slots} must be a multiple of ep_size = {self.ep_size}"
            )

    @property
    def n_slots(self) -> int:
        return self.n_routed_experts + self.num_redundant_experts

    @property
    def slots_per_rank(self) -> int:
        return self.n_slots // self.ep_size

    @property
    def n_nodes(self) -> int:
        return -(-self.ep_size // self.ranks_per_node)

    @property
    def slot_rank(self) -> I32:
        """[n_slots] rank of each slot."""
        return np.arange(self.n_slots, dtype=np.int32) // np.int32(self.slots_per_rank)
