"""Full copies: the hottest experts on every rank, all others packed evenly (ATOM ``--eplb-placement-policy biased``).

ATOM pull request 1210. With a replica choice that prefers the own rank (``nearest``) the hottest experts' tokens never
leave their device, and each rank's share of them is its own.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from sim.placement import Evidence, Observed, Placement
from sim.placement.eplb import balanced_packing, replicate_experts, seen_load
from sim.slots import Slots
from sim.tokens import I32


class Biased(Placement):
    """The num_redundant_experts // ep_size hottest experts go to every rank; slots that are left copy the hottest others.

    Without as many redundant experts as ranks it is a packing of single experts.

    >>> hot = Observed(np.array([[[9.0, 1.0, 8.0, 2.0]]]))
    >>> Biased().place(Slots(4, 2, 2), hot, np.random.default_rng(0)).tolist()
    [[0, 2, 3, 0, 2, 1]]
    """

    kind: Literal["biased"] = "biased"
    needs: ClassVar[frozenset[Evidence]] = frozenset({"expert_tokens"})

    def place(self, slots: Slots, observed: Observed, rng: np.random.Generator) -> I32:
        load = seen_load(observed)
        layers = len(load)
        everywhere = min(slots.num_redundant_experts // slots.ep_size, slots.n_routed_experts - 1)
        order = np.argsort(-load, axis=-1, kind="stable")
        # Ascending ids: a set that stays hot stays where it is.
        hot, cold = np.sort(order[:, :everywhere], axis=-1), np.sort(order[:, everywhere:], axis=-1)
        weight = np.take_along_axis(load, cold, axis=-1)
        room = slots.slots_per_rank - everywhere
        replica, _, count = replicate_experts(weight, slots.ep_size * room)
        share = np.take_along_axis(weight / count, replica, axis=-1)
        packed = np.take_along_axis(replica, balanced_packing(share, slots.ep_size), axis=-1)
        packed = np.take_along_axis(cold, packed, axis=-1).astype(np.int32)
        copies = np.broadcast_to(hot[:, None].astype(np.int32), (layers, slots.ep_size, everywhere))
        return np.concatenate([copies, packed.reshape(layers, slots.ep_size, room)], axis=-1).reshape(layers, -1)
