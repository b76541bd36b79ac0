"""The oracle: the most affinity that perfect balance can keep. No router; what every policy is measured against."""

from __future__ import annotations

from typing import ClassVar, Literal

from sim.gating.assignment import balanced_assignment
from sim.gating.select import Candidates, Select
from sim.model import Model
from sim.tokens import I16


class Oracle(Select):
    """An optimal assignment of each rank's micro-batch under exactly even loads (a linear program, see `assignment`).

    Both tokens prefer the first expert; one of them has to give way, the one that loses less:

    >>> import numpy as np
    >>> from sim.kernels import plain
    >>> scores, one = np.array([[0.9, 0.8], [0.7, 0.1]], np.float32), np.ones(2, np.float32)
    >>> Oracle().select(Candidates(scores, one, 0 * one, 1, plain, np.random.default_rng)).tolist()
    [[1], [0]]
    """

    kind: Literal["oracle"] = "oracle"
    per_token: ClassVar[bool] = False
    extra_s_per_token: ClassVar[float] = 1.5e-4
    causal: ClassVar[bool] = False
    reads: ClassVar[Literal["nothing", "order", "differences", "sizes"]] = "differences"

    def note(self, model: Model) -> str:
        return "the oracle solves each micro-batch as a linear program after having seen all of it; no router can"

    def select(self, candidates: Candidates) -> I16:
        return balanced_assignment(candidates.biased, candidates.k, candidates.kernels)
