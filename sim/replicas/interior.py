"""A few interior-point steps towards the split with the smallest largest rank load, the way LPLB's kernel takes them.

The method is primal affine scaling (Dikin 1967): from a point inside, step down the projected gradient in coordinates
scaled by the point itself. No BLAS: sums in a fixed order, so every machine gets the same bits.
"""

from __future__ import annotations

import numpy as np

from sim.replicas import compiled
from sim.tokens import F64, I64

STEP = 0.99
"""How much of the way to the nearest bound a step takes."""
HEADROOM = 0.02
"""What the largest load starts above that of equal shares, in mean rank loads: slack, to start inside the bounds."""
ENOUGH = 0.1
"""Tokens: a largest load proved to be that near to the smallest one is good enough, as it gets rounded."""


def affine_scaling(rank: I64, expert: I64, demand: I64, base: I64, iterations: int) -> F64:
    """Return tokens [n] float64, not whole, of n slots on ``rank`` [n] that hold ``expert`` [n] (ascending, 0 to m - 1).

    Minimise z over x >= 0 with base[r] + (sum of x on rank r) + slack[r] = z, slack >= 0, and (sum of x of expert e) =
    demand[e] > 0. base: [P]. Of the points visited, equal shares first, the one with the smallest z is returned; stops
    early where the dual prices prove that it is all but optimal.
    """
    ranks, experts = len(base), len(demand)

    def per_rank(values: F64) -> F64:
        return np.bincount(rank, weights=values, minlength=ranks).astype(np.float64)

    def per_expert(values: F64) -> F64:
        return np.bincount(expert, weights=values, minlength=experts).astype(np.float64)

    counts = np.bincount(expert, minlength=experts)
    first = np.cumsum(counts) - counts
    left = np.repeat(np.arange(len(expert)), counts[expert])  # all pairs of slots of one expert
    right = np.arange(len(left)) - np.repeat(np.cumsum(counts[expert]) - counts[expert] - first[expert], counts[expert])
    cell = rank[left] * ranks + rank[right]

    x = demand[expert] / counts[expert]
    load = base + per_rank(x)
    z = load.max() + HEADROOM * _sum(load) / ranks
    best, best_x = load.max(), x
    for _ in range(iterations):
        slack, x2 = z - load, x * x
        of_expert = per_expert(x2)
        # Normal equations A X^2 A' prices = A X^2 cost; the experts' rows are eliminated, one per expert and diagonal.
        matrix = z * z - np.bincount(cell, x2[left] * x2[right] / of_expert[expert[left]], ranks * ranks).reshape(
            ranks, ranks
        )
        matrix[np.arange(ranks), np.arange(ranks)] += slack * slack + per_rank(x2)
        price = solve(matrix, np.full(ranks, z * z))
        expert_price = per_expert(x2 * price[rank]) / of_expert
        if best - _bound(price, base, rank, demand, expert, counts) < ENOUGH:
            break
        down_x, down_slack, down_z = x * (price[rank] - expert_price[expert]), slack * price, z * (1 - _sum(price))
        steepest = max(down_x.max(), down_slack.max(), down_z)
        if not steepest > 0:
            break
        x = x * (1 - STEP / steepest * down_x)
        x = x * (demand / per_expert(x))[expert]  # holds the sums against rounding
        z = z * (1 - STEP / steepest * down_z)
        load = base + per_rank(x)
        z = max(z, load.max() * (1 + 1e-12))
        if load.max() < best:
            best, best_x = load.max(), x
    return best_x


def solve(matrix: F64, right: F64) -> F64:
    """Return y with ``matrix`` [P, P] y = ``right`` [P], for a symmetric positive definite matrix, by elimination."""
    rows = np.concatenate([matrix, right[:, None]], axis=1)
    if compiled():
        from sim.kernels import replicas as kernel

        kernel.eliminate(rows)
    else:
        eliminate_plain(rows)
    return rows[:, -1]


def eliminate_plain(rows: F64) -> None:
    """Put the solution into the last column of ``rows`` [n, n + 1], a matrix and its right side, in place."""
    n = len(rows)
    for j in range(n - 1):
        rows[j + 1 :, j:] -= (rows[j + 1 :, j] / rows[j, j])[:, None] * rows[j, j:]
    for j in range(n - 1, -1, -1):
        rows[j, n] /= rows[j, j]
        rows[:j, n] -= rows[:j, j] * rows[j, n]


def _bound(price: F64, base: I64, rank: I64, demand: I64, expert: I64, counts: I64) -> float:
    """Return what no split's largest load is below: any weights >= 0 of the ranks that sum to 1 give such a bound."""
    weight = np.maximum(price, 0.0)
    total = _sum(weight)
    if not total > 0:
        return 0.0
    cheapest = np.minimum.reduceat(weight[rank], np.cumsum(counts) - counts)
    return (_sum(weight * base) + _sum(cheapest * demand)) / total


def _sum(values: F64) -> float:
    """Sum in order, which np.sum does not promise."""
    return float(np.cumsum(values)[-1])
