"""GShard's top-2 with a random second expert: a weak second choice is often not worth its trip.

Lepikhin et al., "GShard" (arXiv 2006.16668), Algorithm 1: the second expert is used with probability min(1, 2 g2') where
g2' = g2 / (g1 + g2). Mesh-TensorFlow's variant uses min(1, g2 / threshold) with 0.2. GShard's counters (first choices
before second ones, a full expert's counter still advances) are ``capacity: {kind: expert_capacity, drop_policy:
position}``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from sim.gating.select import Candidates, Select
from sim.model import Model
from sim.tokens import I16


class GShard(Select):
    """The best expert, and the second best by chance. Needs ``num_experts_per_tok: 2``.

    second_policy_threshold: None for GShard's rule, Mesh-TensorFlow's threshold otherwise.

    Of a nearly equal pair the second is always used (2 x 0.47 x U < 1 rarely fails), of 9 : 1 in a fifth of the cases:

    >>> from sim.kernels import plain
    >>> from sim.rng import stream
    >>> scores, one = np.array([[0.45, 0.4, 0.15]] * 4 + [[0.9, 0.1, 0.0]] * 4, np.float32), np.ones(3, np.float32)
    >>> ids = GShard().select(Candidates(scores, one, 0 * one, 2, plain, lambda: stream(0, "gate")))
    >>> ids[:, 0].tolist(), ids[:, 1].tolist()
    ([0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, -1, -1, -1, -1])
    """

    kind: Literal["gshard"] = "gshard"
    ordinal: ClassVar[bool] = False
    varies: ClassVar[bool] = True
    second_policy_threshold: float | None = Field(default=None, gt=0, le=1)

    def problems(self, model: Model) -> list[tuple[str, str]]:
        if model.num_experts_per_tok != 2:
            return [("kind", f"gshard chooses 2 experts; num_experts_per_tok is {model.num_experts_per_tok}")]
        return []

    def select(self, candidates: Candidates) -> I16:
        c = candidates
        ids = c.kernels.topk(c.scores, c.scale, c.shift, 2)
        gate = c.kernels.picked(c.scores, ids).astype(np.float64)
        if self.second_policy_threshold is None:
            chance = 2.0 * gate[:, 1] / np.maximum(gate.sum(axis=1), np.finfo(np.float64).tiny)
        else:
            chance = gate[:, 1] / self.second_policy_threshold
        ids[c.rng().random(len(ids)) >= chance, 1] = -1
        return ids
