"""Numba versions of the loops of `sim.replicas`, with the same results. Import loads Numba."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def assign(topk_ids, share, start, slots, out):  # type: ignore[no-untyped-def]
    """Fill ``out``; the slots of expert e are ``slots[start[e] : start[e + 1]]``, ``share`` their quotas, all above 0."""
    n_tokens, k = topk_ids.shape
    odd = np.ones(len(slots), dtype=np.int64)  # 2 g + 1 for the g-th turn that comes next
    for t in range(n_tokens):
        for i in range(k):
            e = topk_ids[t, i]
            if e < 0 or start[e] == start[e + 1]:
                continue
            best = start[e]
            for v in range(best + 1, start[e + 1]):
                if odd[v] * share[best] < odd[best] * share[v]:
                    best = v
            if odd[best] < 2 * share[best]:  # else all have had their turns: the last one of each is due before 1
                odd[best] += 2
                out[t, i] = slots[best]


@njit(cache=True, nogil=True)
def level(tokens, load, rank, start, experts, sweeps):  # type: ignore[no-untyped-def]
    """As `sim.replicas.least_loaded.level_plain`."""
    bins = np.empty(len(rank), dtype=np.int64)
    for _ in range(sweeps):
        for e in experts:
            n, size = 0, 0
            for v in range(start[e], start[e + 1]):
                n += tokens[v]
                load[rank[v]] -= tokens[v]
                tokens[v] = 0
            for v in range(start[e], start[e + 1]):
                if v > start[e] and rank[v] == rank[v - 1]:
                    continue
                at = size
                while at > 0 and load[rank[bins[at - 1]]] > load[rank[v]]:
                    bins[at] = bins[at - 1]
                    at -= 1
                bins[at] = v
                size += 1
            wet, sunk = 1, load[rank[bins[0]]]
            while wet < size and wet * load[rank[bins[wet]]] - sunk < n:
                sunk += load[rank[bins[wet]]]
                wet += 1
            water, more = (n + sunk) // wet, (n + sunk) % wet
            for i in range(wet):
                at = rank[bins[i]]
                tokens[bins[i]] = water + (i < more) - load[at]
                load[at] = water + (i < more)


@njit(cache=True, nogil=True)
def eliminate(rows):  # type: ignore[no-untyped-def]
    """As `sim.replicas.interior.eliminate_plain`."""
    n = len(rows)
    for j in range(n - 1):
        for i in range(j + 1, n):
            factor = rows[i, j] / rows[j, j]
            for c in range(j, n + 1):
                rows[i, c] -= factor * rows[j, c]
    for j in range(n - 1, -1, -1):
        rows[j, n] /= rows[j, j]
        for i in range(j):
            rows[i, n] -= rows[i, j] * rows[j, n]


@njit(cache=True, nogil=True)
def demand(topk_ids, first, out):  # type: ignore[no-untyped-def]
    """Count pairs of sources and experts in ``out``; source s has tokens ``first[s]`` to ``first[s + 1] - 1``."""
    for s in range(len(first) - 1):
        for t in range(first[s], first[s + 1]):
            for i in range(topk_ids.shape[1]):
                if topk_ids[t, i] >= 0:
                    out[s, topk_ids[t, i]] += 1


@njit(cache=True, nogil=True)
def reach(topk_ids, first, share, start, slots, slot_rank, slot_node, ranks, nodes):  # type: ignore[no-untyped-def]
    """`assign` the tokens of every source by its own row of ``share`` [sources, V], where quotas may be 0, and count in
    ``ranks`` and ``nodes`` those that reach each rank and node."""
    seen_rank, seen_node = np.full(ranks.shape[1], -1), np.full(nodes.shape[1], -1)  # by the token that was there last
    odd = np.empty(len(slots), dtype=np.int64)
    for s in range(len(first) - 1):
        odd[:] = 1
        for t in range(first[s], first[s + 1]):
            for i in range(topk_ids.shape[1]):
                e = topk_ids[t, i]
                if e < 0:
                    continue
                best = -1
                for v in range(start[e], start[e + 1]):
                    if best < 0 or odd[v] * share[s, best] < odd[best] * share[s, v]:
                        best = v
                if best < 0 or odd[best] >= 2 * share[s, best]:
                    continue
                odd[best] += 2
                rank, node = slot_rank[slots[best]], slot_node[slots[best]]
                if seen_rank[rank] != t:
                    seen_rank[rank] = t
                    ranks[s, rank] += 1
                if seen_node[node] != t:
                    seen_node[node] = t
                    nodes[s, node] += 1
