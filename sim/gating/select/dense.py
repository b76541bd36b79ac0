"""Every expert for every token: a mixture of experts run as the dense layer it was cut from."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from sim.gating.select import Candidates, Select
from sim.tokens import I16


class Dense(Select):
    """All E experts, in index order; load is exactly even and nothing is gained from sparsity.

    >>> from sim.kernels import plain
    >>> scores, one = np.array([[0.2, 0.9, 0.6]], np.float32), np.ones(3, np.float32)
    >>> Dense().select(Candidates(scores, one, 0 * one, 1, plain, np.random.default_rng)).tolist()
    [[0, 1, 2]]
    """

    kind: Literal["dense"] = "dense"
    reads: ClassVar[Literal["nothing", "order", "differences", "sizes"]] = "nothing"
    varies: ClassVar[bool] = True

    def select(self, candidates: Candidates) -> I16:
        n_tokens, n_experts = candidates.scores.shape
        return np.tile(np.arange(n_experts, dtype=np.int16), (n_tokens, 1))
