"""What the ranks of a group ask of a layer's experts, and how many of their tokens reach each rank and node.

Everything for all source ranks at once, in Numba or in NumPy with the same counts.
"""

from __future__ import annotations

import numpy as np

from sim.kernels.plain import group_tokens
from sim.replicas import Copies, assign
from sim.slots import Slots
from sim.tokens import I16, I32, I64


def demand(ids: I16, first: I64, n_experts: int, *, compiled: bool) -> I64:
    """Return [sources, n_experts] (token, expert) pairs of tokens ``ids`` [T, k]; source s has tokens first[s] to
    first[s + 1] - 1. Ids of -1 count nowhere."""
    n_sources = len(first) - 1
    if compiled:
        from sim.kernels import replicas as kernel

        counts: I64 = np.zeros((n_sources, n_experts), dtype=np.int64)
        kernel.demand(ids, first, counts)
        return counts
    place = np.repeat(np.arange(n_sources) * (n_experts + 1) + 1, np.diff(first) * ids.shape[1])
    counted = np.bincount(place + ids.ravel(), minlength=n_sources * (n_experts + 1))
    return counted.reshape(n_sources, n_experts + 1)[:, 1:].astype(np.int64)


def reach(
    ids: I16, first: I64, quota: I64, physical_to_logical_map: I32, slots: Slots, *, compiled: bool
) -> tuple[I64, I64]:
    """Return tokens [sources, P] and [sources, nodes] with at least one expert on a rank and on a node.

    ids, first: as in `demand`. quota: [sources, S] tokens of each source for each slot, handed out by
    `sim.replicas.assign`.
    """
    n_sources, slot_rank = len(first) - 1, slots.slot_rank
    slot_node = (slot_rank // slots.ranks_per_node).astype(np.int32)
    ranks: I64 = np.zeros((n_sources, slots.ep_size), dtype=np.int64)
    nodes: I64 = np.zeros((n_sources, slots.n_nodes), dtype=np.int64)
    if compiled:
        from sim.kernels import replicas as kernel

        copies = Copies.of(physical_to_logical_map, slots.n_routed_experts)
        share = quota[:, copies.slot]
        kernel.reach(ids, first, share, copies.start, copies.slot, slot_rank, slot_node, ranks, nodes)
        return ranks, nodes
    for source in range(n_sources):
        taken = assign(ids[first[source] : first[source + 1]], quota[source], physical_to_logical_map)
        ranks[source] = group_tokens(taken, slot_rank, slots.ep_size)
        nodes[source] = group_tokens(taken, slot_node, slots.n_nodes)
    return ranks, nodes


def scaled(quota: I64, demand: I64, shown: I64, physical_to_logical_map: I32) -> I64:
    """Return the quotas [sources, S] of those tokens that ask for ``shown`` [sources, E] of ``demand`` [sources, E]: in
    the shares of all, rounded up."""
    expert = np.maximum(physical_to_logical_map, 0)
    exact = quota * shown[:, expert] / np.maximum(demand[:, expert], 1)
    rounded: I64 = np.where(physical_to_logical_map >= 0, np.ceil(exact - 1e-9), 0).astype(np.int64)
    return rounded
