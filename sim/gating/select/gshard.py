"""GShard's top-2 with a random second expert: a weak second choice is often not worth its trip.

Lepikhin et al., "GShard" (arXiv 2006.16668), Algorithm 1: with g2' = g2 / (g1 + g2) the second expert is used if
2 g2' > U(0, 1). Mesh-TensorFlow's variant (``transformer/moe.py``, policy ``random``) uses it with probability
min(1, g2' / threshold), 0.2 by default. GShard's counters (first choices before second ones) are ``capacity: {kind:
expert_capacity, drop_policy: position}``; in the listing a second expert that the draw dismisses has advanced its expert's
counter all the same, in Mesh-TensorFlow it has not. Both normalise the gates before anything is dismissed or dropped.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from sim.gating.select import Candidates, Select
from sim.model import Model
from sim.tokens import F64, I16


class GShard(Select):
    """The best expert, and the second best by chance. Needs ``num_experts_per_tok: 2``.

    second_policy_threshold: None for GShard's rule, Mesh-TensorFlow's threshold otherwise.

    Where g2' is 0.47 the second expert is used in 94 % of the cases, where it is 0.1 in 20 % (50 % with threshold 0.2):

    >>> from sim.kernels import plain
    >>> from sim.rng import stream
    >>> scores, one = np.array([[0.45, 0.4, 0.15]] * 4 + [[0.9, 0.1, 0.0]] * 4, np.float32), np.ones(3, np.float32)
    >>> given = Candidates(scores, one, 0 * one, 2, plain, lambda: stream(0, "gate"))
    >>> given.rng().random(8).round(2).tolist()
    [0.88, 0.05, 0.66, 0.65, 0.23, 0.93, 0.71, 0.87]
    >>> GShard().select(given)[:, 1].tolist(), GShard(second_policy_threshold=0.2).select(given)[:, 1].tolist()
    ([1, 1, 1, 1, -1, -1, -1, -1], [1, 1, 1, 1, 1, -1, -1, -1])
    """

    kind: Literal["gshard"] = "gshard"
    reads: ClassVar[Literal["nothing", "order", "differences", "sizes"]] = "sizes"
    varies: ClassVar[bool] = True
    second_policy_threshold: float | None = Field(default=None, gt=0, le=1)

    def problems(self, model: Model) -> list[tuple[str, str]]:
        if model.num_experts_per_tok != 2:
            return [("kind", f"gshard chooses 2 experts; num_experts_per_tok is {model.num_experts_per_tok}")]
        return []

    @property
    def dismissed_take_places(self) -> bool:
        return self.second_policy_threshold is None

    def before_chance(self, candidates: Candidates) -> I16:
        c = candidates
        return c.kernels.topk(c.scores, c.scale, c.shift, 2)

    def select(self, candidates: Candidates) -> I16:
        c = candidates
        ids = self.before_chance(c)
        gate: F64 = c.kernels.picked(c.unbiased, ids).astype(np.float64)
        second = gate[:, 1] / np.maximum(gate[:, 0] + gate[:, 1], np.finfo(np.float64).tiny)
        chance = second * 2.0 if self.second_policy_threshold is None else second / self.second_policy_threshold
        ids[c.rng().random(len(ids)) >= chance, 1] = -1
        return ids
