"""The closest copy: on the own rank, else in the own node, else anywhere (SGLang ``--ep-dispatch-algorithm static``)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.replicas import Copies, ReplicaChoice
from sim.slots import Slots
from sim.tokens import I32, I64


class Nearest(ReplicaChoice):
    """A source sends all tokens for an expert to one slot: its own rank's if it has one, else one of its node's, else
    any. Sources that choose among the same slots are dealt out over them in turn, the lowest source first.

    >>> there = np.array([0, 1, 1, 2, 0, 3, 3, 2], dtype=np.int32)  # two nodes of two ranks of two slots
    >>> Nearest().quotas(np.tile([[5, 0, 0, 7]], (4, 1)), there, Slots(4, 4, 4, 2)).tolist()
    [[5, 0, 0, 0, 0, 7, 0, 0], [5, 0, 0, 0, 0, 0, 7, 0], [0, 0, 0, 0, 5, 7, 0, 0], [0, 0, 0, 0, 5, 0, 7, 0]]
    """

    kind: Literal["nearest"] = "nearest"

    def quotas(self, demand: I64, physical_to_logical_map: I32, slots: Slots) -> I64:
        copies = Copies.of(physical_to_logical_map, slots.n_routed_experts)
        rank, per_node = copies.slot // slots.slots_per_rank, slots.ranks_per_node
        node = np.arange(len(demand)) // per_node
        own = _first(rank, copies, slots.ep_size)
        first = _first(rank // per_node, copies, slots.n_nodes)[node]
        in_node: I64 = np.zeros((slots.n_nodes, slots.n_routed_experts), dtype=np.int64)
        np.add.at(in_node, (rank // per_node, copies.expert), 1)

        near, far = (own < 0) & (first >= 0), first < 0
        earlier: I64 = np.cumsum(near, axis=0) - near
        earlier = (
            earlier - earlier[node * per_node]
        )  # the sources of its node that chose among the same slots before it
        entry = np.where(near, first + earlier % np.maximum(in_node[node], 1), own)
        anywhere = copies.start[:-1] + (np.cumsum(far, axis=0) - far) % np.maximum(copies.counts, 1)
        entry = np.where(far, anywhere, entry)

        source, expert = np.nonzero((demand > 0) & (copies.counts > 0))
        quota: I64 = np.zeros((len(demand), slots.n_slots), dtype=np.int64)
        quota[source, copies.slot[entry[source, expert]]] = demand[source, expert]
        return quota


def _first(place: I64, copies: Copies, n_places: int) -> I64:
    """Return [places, E] the first entry of ``copies`` in each place [V] and expert, -1 without one.

    Within an expert the places ascend, as its slots do.
    """
    starts = np.flatnonzero((copies.ordinal == 0) | (np.diff(place, prepend=-1) != 0))
    found: I64 = np.full((n_places, len(copies.counts)), -1, dtype=np.int64)
    found[place[starts], copies.expert[starts]] = starts
    return found
