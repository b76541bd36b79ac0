"""LPLB's placement: one replica each of the heaviest experts, along the edges of a small graph of ranks.

Follows github.com/deepseek-ai/LPLB (README: an early research stage). It serves the replica choice ``lp``, which moves
tokens over those edges batch by batch; EPLB without redundancy supplies the order underneath.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from sim.placement import Evidence, Observed, Placement
from sim.placement.eplb import rebalance_experts
from sim.slots import Slots
from sim.tokens import I32, I64

Topology = Literal["cube", "hypercube", "torus", "ring"]


class Lplb(Placement):
    """Every expert once, packed evenly by load as EPLB does; then the d-th heaviest expert of a rank once more, on the
    rank that the d-th edge of the ``topology`` leads to. No expert has more than two slots. A layer without traffic keeps
    its experts in order.

    cube: groups of 8 ranks, two edges per rank, one round a ring of four and one across to the other ring (straight one
    way, half a turn on the other). hypercube: groups of 16, two edges, one round a ring of four and one round a ring of
    such rings. torus: the whole EP group, two edges, to the next node and to the next rank of the node. ring: each node by
    itself, one edge to the next rank. Edges point from the replica to the original. With a multiple of that many redundant
    slots per rank the next heaviest experts follow, over the same edges in turn.

    Raises ValueError unless ranks fill whole groups, num_redundant_experts is a multiple of ranks times edges, and every
    rank has as many experts of its own to replicate as it has redundant slots.
    """

    kind: Literal["lplb"] = "lplb"
    needs: ClassVar[frozenset[Evidence]] = frozenset({"expert_tokens"})
    topology: Topology = "cube"
    """Which graph of ranks the replicas follow."""

    def place(self, slots: Slots, observed: Observed, rng: np.random.Generator) -> I32:
        source = edges(self.topology, slots)
        ranks, degree = source.shape
        extra, own = slots.num_redundant_experts // ranks, slots.n_routed_experts // ranks
        if slots.n_routed_experts % ranks:
            raise ValueError(
                f"lplb needs n_routed_experts = {slots.n_routed_experts} to be a multiple of {ranks} ranks"
            )
        if extra * ranks != slots.num_redundant_experts or extra % degree or not extra:
            raise ValueError(
                f"lplb {self.topology} has {degree} edge(s) per rank: num_redundant_experts = "
                f"{slots.num_redundant_experts} must be a positive multiple of {degree * ranks}"
            )
        if extra > own:
            raise ValueError(f"lplb replicates a rank's own experts: {extra} redundant slots per rank, {own} experts")
        load = observed.load
        packed = rebalance_experts(load, slots.n_routed_experts, slots.n_group, slots.n_nodes, ranks)[0]
        packed = np.where(load.sum(axis=1, keepdims=True) > 0, packed, np.arange(slots.n_routed_experts))
        heaviest = np.argsort(-np.take_along_axis(load, packed, axis=1).reshape(-1, ranks, own), axis=-1, kind="stable")
        originals = np.take_along_axis(packed.reshape(-1, ranks, own), heaviest, axis=-1)
        d = np.arange(extra)
        replicas = originals[:, source[:, d % degree], d]
        return np.concatenate([originals, replicas], axis=-1).reshape(len(load), -1).astype(np.int32)


def edges(topology: Topology, slots: Slots) -> I64:
    """Return [P, degree] int64: the rank whose expert the d-th redundant slot of each rank repeats (LPLB's ``r2o``).

    Each column is a permutation of the ranks. Raises ValueError where the ranks do not fill whole groups.

    >>> edges("cube", Slots(16, 8, 16)).T.tolist()
    [[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]
    """
    ranks, nodes = slots.ep_size, slots.n_nodes
    node = ranks // nodes
    size = {"cube": 8, "hypercube": 16, "torus": ranks, "ring": node}[topology]
    if ranks % size:
        raise ValueError(f"lplb {topology} needs ep_size = {ranks} to be a multiple of {size} ranks")
    if node < 2 and topology in ("ring", "torus"):
        raise ValueError(f"lplb {topology} needs two or more ranks in a node")
    if nodes < 2 and topology == "torus":
        raise ValueError("lplb torus needs two or more nodes")
    rank = np.arange(size)
    if topology == "ring":
        columns = [(rank + 1) % size]
    elif topology == "torus":
        columns = [(rank + node) % size, rank // node * node + (rank + 1) % node]
    else:
        across = np.where(rank < 4, 4 + (rank + 2) % 4, rank - 4) if topology == "cube" else (rank - 4) % size
        columns = [rank // 4 * 4 + (rank - 1) % 4, across]
    group = np.arange(0, ranks, size)
    return (group[:, None, None] + np.stack(columns, axis=-1)).reshape(ranks, -1).astype(np.int64)
