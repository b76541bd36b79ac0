"""Experts that tokens choose together on one node: cuts the nodes that a token is sent to.

The co-activation graph of a layer has an edge between two experts, as heavy as the number of tokens that chose both. It is
cut into nodes of equal size and nearly equal load by exchanges (Kernighan and Lin 1970), which on whole counts gives one
plan on every machine. Negative result: spectral bisection or networkx's Kernighan-Lin as the start, brought to the same
limit of load, end between 0.6 % more and 2.3 % fewer nodes per token on recorded routing of DeepSeek-V2-Lite (ESFT tasks,
2 to 8 nodes, judged on the other half of the tokens); eigenvectors differ between machines.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from sim.placement import Evidence, Observed, Placement
from sim.placement.eplb import balanced_packing, seen_load
from sim.placement.greedy import lightest_first
from sim.slots import Slots
from sim.tokens import F64, I32, I64


class Coactivation(Placement):
    """Cut the co-activation graph into nodes; spare slots copy hot experts; inside a node, lightest rank first.

    A node starts with experts packed by load, and slots that are left count as experts without load. Any two slots of
    different nodes trade places while that brings more chosen pairs under one roof, and neither node's load ends above
    (1 + load_tolerance) times the mean, or above the heavier of the two before. A spare slot then goes to the expert with
    the most load per replica that its node lacks, on the node that holds most of its companions.

    load_tolerance: what load between nodes may be paid for less traffic between them.

    Tokens choose experts 0 and 2, or 1 and 3:

    >>> pairs = np.array([[[5, 0, 5, 0], [0, 4, 0, 4], [5, 0, 5, 0], [0, 4, 0, 4]]], float)
    >>> observed = Observed(np.array([[[5.0, 4, 5, 4]]]), coactivation=pairs)
    >>> slots = Slots(4, 2, ranks_per_node=1)
    >>> Coactivation(load_tolerance=0.2).place(slots, observed, np.random.default_rng(0)).tolist()
    [[1, 3, 0, 2]]
    """

    kind: Literal["coactivation"] = "coactivation"
    needs: ClassVar[frozenset[Evidence]] = frozenset({"expert_tokens", "coactivation"})
    load_tolerance: Annotated[float, Field(ge=0, le=10)] = 0.1

    def place(self, slots: Slots, observed: Observed, rng: np.random.Generator) -> I32:
        load, experts = seen_load(observed), slots.n_routed_experts
        seen = np.zeros((1, experts, experts)) if observed.coactivation is None else observed.coactivation
        pairs = np.where(np.eye(experts, dtype=bool), 0.0, np.broadcast_to(seen, (len(load), experts, experts)))
        spare = ((0, 0), (0, slots.num_redundant_experts))
        node = _cut(np.pad(pairs, (*spare, spare[1])), np.pad(load, spare), slots.n_nodes, self.load_tolerance)
        held, count = _fill(node, pairs, load, slots)
        # Ranks: nodes of all layers are rows of one array.
        rows = len(load) * slots.n_nodes
        expert = held.reshape(rows, -1)
        share = np.take_along_axis(load / count, held.reshape(len(load), -1), axis=-1).reshape(rows, -1)
        return lightest_first(expert, share, slots.ep_size // slots.n_nodes, experts).reshape(len(load), -1)


def _cut(pairs: F64, load: F64, n_nodes: int, tolerance: float) -> I64:
    """Return the node [L, S] of every item, S / n_nodes on each; ``pairs`` [L, S, S] (diagonal 0), ``load`` [L, S]."""
    layers, n = np.arange(len(load)), load.shape[1]
    node = np.empty((len(load), n), dtype=np.int64)
    packed = balanced_packing(load, n_nodes)
    np.put_along_axis(node, packed, np.broadcast_to(np.arange(n) // (n // n_nodes), node.shape), axis=-1)
    with_node = pairs @ (node[..., None] == np.arange(n_nodes)).astype(np.float64)  # [L, S, N] companions on each node
    total = np.zeros((len(load), n_nodes))
    np.add.at(total, (layers[:, None], node), load)
    limit = (1 + tolerance) * total.mean(axis=-1, keepdims=True)
    least = 1e-9 * pairs.sum(axis=(-1, -2))  # less is rounding, if counts are not whole
    order = np.argsort(-load, axis=-1, kind="stable").T
    moved = True
    while moved:
        moved = False
        for e in order:
            a, there = node[layers, e], total[layers[:, None], node]
            own = np.take_along_axis(with_node, node[..., None], axis=-1)[..., 0]
            gain = with_node[layers[:, None], e[:, None], node] - own[layers, e][:, None]
            gain += with_node[layers, :, a] - own - 2 * pairs[layers, e]
            here, more = total[layers, a][:, None], load[layers, e][:, None] - load
            bound = np.maximum(limit, np.maximum(here, there))
            gain[(here - more > bound) | (there + more > bound) | (node == a[:, None])] = 0.0
            f = gain.argmax(axis=-1)
            taken = np.flatnonzero(gain[layers, f] > least)
            if not len(taken):
                continue
            moved = True
            e, f, a = e[taken], f[taken], a[taken]
            b = node[taken, f]
            change = pairs[taken, f] - pairs[taken, e]
            with_node[taken, :, a] += change
            with_node[taken, :, b] -= change
            change_load = load[taken, f] - load[taken, e]
            total[taken, a] += change_load
            total[taken, b] -= change_load
            node[taken, e], node[taken, f] = b, a
    return node


def _fill(node: I64, pairs: F64, load: F64, slots: Slots) -> tuple[I64, I64]:
    """Return the expert in each slot of each node [L, N, S / N], spare slots filled, and the replicas [L, E].

    node: [L, S] of the experts, then of the spare slots.
    """
    layers, experts, nodes = np.arange(len(load)), slots.n_routed_experts, slots.n_nodes
    held = np.zeros((len(load), nodes, experts), dtype=np.int64)
    held[layers[:, None], node[:, :experts], np.arange(experts)] = 1
    free = slots.n_slots // nodes - held.sum(axis=-1)
    count = np.ones((len(load), experts), dtype=np.int64)
    with_node = np.einsum("lne,lef->lnf", held.astype(np.float64), pairs)
    for _ in range(slots.num_redundant_experts):
        open_to = (free > 0)[..., None] & (held == 0)
        # Where no node lacks an expert any more, second copies on one node are all that is left.
        open_to |= (free > 0)[..., None] & ~open_to.any(axis=(-1, -2), keepdims=True)
        hottest = np.where(open_to.any(axis=1), load / count, -1.0).argmax(axis=-1)
        best = np.where(open_to[layers, :, hottest], with_node[layers, :, hottest], -1.0).argmax(axis=-1)
        held[layers, best, hottest] += 1
        free[layers, best] -= 1
        count[layers, hottest] += 1
    copies = held.reshape(-1, experts)
    return np.repeat(np.tile(np.arange(experts), len(copies)), copies.ravel()).reshape(len(load), nodes, -1), count
