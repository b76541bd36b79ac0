"""Loads without the tokens x experts matrix: a pilot's mean and covariance, then normal draws. About a hundred times faster.

A pilot routes some whole sequences token by token and keeps, of each, the vector of its counts: tokens per expert, per
destination rank and per node, and its kept and best affinity. Sequences of one stream are exchangeable, so the counts of
n sequences are nearly normal with n times the pilot's mean and covariance; tokens within a sequence may be as correlated
as they like. What order decides (capacity by arrival, losses within a sequence) cannot be drawn and stays token by token.

The pilot's mean is shared by all draws made from it: a relative error of sqrt(n / m) against the sampling noise of n
sequences, with m in the pilot. A controller that moves makes an old pilot wrong; a new one is taken then.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sim.tokens import F64, I64


@dataclass(frozen=True, slots=True)
class CountLaw:
    """Counts of a number of tokens, as a normal law of D components.

    rate: [D] mean per token. factor: [D, D] lower triangle, covariance per token = factor factor^T (that of one sequence
    over its length).
    """

    rate: F64
    factor: F64

    def draw(self, rng: np.random.Generator, n_tokens: int, size: int) -> F64:
        """Return [size, D] draws for ``n_tokens`` tokens each; not yet whole numbers, may be slightly negative."""
        noise = rng.standard_normal((size, len(self.rate))) * float(n_tokens) ** 0.5
        drawn = np.broadcast_to(self.rate * n_tokens, noise.shape).copy()
        for column in range(len(self.rate)):  # a written order of additions: BLAS has its own on every machine
            drawn[:, column:] += noise[:, column, None] * self.factor[column:, column]
        return drawn


def fit(counts: F64, tokens: I64) -> CountLaw:
    """Return the law of per-sequence ``counts`` [m, D] of sequences with ``tokens`` [m] tokens each.

    Sequences may differ in length; variance grows in proportion to it. Raises ValueError for fewer than two.
    """
    if len(counts) < 2:
        raise ValueError(f"a pilot needs at least 2 sequences, found {len(counts)}")
    total = float(tokens.sum())
    rate = _summed(counts) / total
    centred = (counts - tokens[:, None] * rate) / np.sqrt(tokens)[:, None]
    covariance = np.zeros((counts.shape[1], counts.shape[1]))
    for row in centred:
        covariance += row[:, None] * row
    return CountLaw(rate, cholesky(covariance / (len(counts) - 1)))


def _summed(rows: F64) -> F64:
    total = np.zeros(rows.shape[1])
    for row in rows:
        total += row
    return total


def cholesky(covariance: F64) -> F64:
    """Return the lower factor of a positive semidefinite [D, D] matrix; directions without variance get zero columns.

    Counts are tied to each other (experts sum to k per token), so the matrix is singular and LAPACK would refuse it.
    """
    left = covariance.copy()
    factor = np.zeros_like(left)
    tiny = 1e-9 * np.maximum(np.diag(covariance), np.finfo(np.float64).tiny)
    for column in range(len(left)):
        pivot = left[column, column]
        if pivot <= tiny[column]:
            continue
        factor[column:, column] = left[column:, column] / pivot**0.5
        below = factor[column + 1 :, column]
        left[column + 1 :, column + 1 :] -= below[:, None] * below
    return factor


def whole(values: F64, total: int, largest: int) -> I64:
    """Round [size, E] to whole numbers in [0, largest] that sum to ``total`` in each row, as near as can be.

    What clipping and rounding down leave over goes to the largest remainders; equal ones to the lower index. Raises
    ValueError if ``total`` exceeds E x largest.

    >>> whole(np.array([[1.4, 2.3, -0.2, 0.5]]), 4, 3).tolist()
    [[1, 2, 0, 1]]
    """
    width = values.shape[1]
    if total > width * largest:
        raise ValueError(f"{total} pairs do not fit into {width} experts of at most {largest} tokens")
    clipped = np.clip(values, 0.0, float(largest))
    counts = np.floor(clipped).astype(np.int64)
    for row, exact in zip(counts, clipped, strict=True):
        while (missing := total - int(row.sum())) != 0:
            room = row < largest if missing > 0 else row > 0
            order = np.argsort(row - exact if missing > 0 else exact - row, kind="stable")
            order = order[room[order]][: abs(missing)]
            row[order] += 1 if missing > 0 else -1
    return counts
