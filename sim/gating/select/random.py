"""Uniformly random experts: the floor under every balance figure, and the worst case of kept affinity."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from sim.gating.select import Candidates, Select
from sim.tokens import I16


class Random(Select):
    """k distinct experts per token, all sets equally likely, whatever the scores; the order within a set means nothing.

    >>> from sim.kernels import plain
    >>> from sim.rng import stream
    >>> scores, one = np.array([[0.2, 0.9, 0.6, 0.1]] * 3, np.float32), np.ones(4, np.float32)
    >>> Random().select(Candidates(scores, one, 0 * one, 2, plain, lambda: stream(0, "gate"))).tolist()
    [[0, 3], [0, 3], [1, 0]]
    """

    kind: Literal["random"] = "random"
    reads: ClassVar[Literal["nothing", "order", "differences", "sizes"]] = "nothing"

    def select(self, candidates: Candidates) -> I16:
        n_tokens, n_experts = candidates.scores.shape
        return distinct_draws(candidates.rng(), n_tokens, n_experts, candidates.k)


def distinct_draws(rng: np.random.Generator, n_rows: int, n_experts: int, k: int) -> I16:
    """Return [n_rows, k] int16: in each row k distinct experts of n_experts, all sets equally likely."""
    # Floyd's algorithm, one column for all rows at a time: k draws instead of a permutation of E.
    ids = np.empty((n_rows, k), dtype=np.int16)
    for i in range(k):
        last = n_experts - k + i
        draw = rng.integers(0, last + 1, size=n_rows, dtype=np.int16)
        taken = (ids[:, :i] == draw[:, None]).any(axis=1)
        ids[:, i] = np.where(taken, np.int16(last), draw)
    return ids
