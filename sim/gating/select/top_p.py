"""Top-p routing: the fewest experts that together hold a share p of a token's affinity.

Huang et al., "Harder Tasks Need More Experts: Dynamic Routing in MoE Models" (arXiv 2403.07652), section 3.2.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from sim.gating.select import Candidates, Select
from sim.gating.select.threshold import most_experts, too_many
from sim.model import Model
from sim.tokens import I16


class TopP(Select):
    """Experts in the order of their (biased) scores until their unbiased affinities sum to ``p`` of the token's total.

    max_experts: by default twice the model's number of experts per token. A flat token takes many experts, a clear one
    few:

    >>> from sim.kernels import plain
    >>> scores, one = np.array([[0.25, 0.25, 0.25, 0.25], [0.9, 0.05, 0.05, 0.0]], np.float32), np.ones(4, np.float32)
    >>> TopP(p=0.6).select(Candidates(scores, one, 0 * one, 2, plain, np.random.default_rng)).tolist()
    [[0, 1, 2, -1], [0, -1, -1, -1]]
    """

    kind: Literal["top_p"] = "top_p"
    reads: ClassVar[Literal["nothing", "order", "differences", "sizes"]] = "sizes"
    varies: ClassVar[bool] = True
    p: float = Field(default=0.4, gt=0, le=1)
    """Share of a token's affinity that its experts hold together."""
    max_experts: int | None = Field(default=None, gt=0)

    def problems(self, model: Model) -> list[tuple[str, str]]:
        return too_many(self.max_experts, model)

    def select(self, candidates: Candidates) -> I16:
        c = candidates
        ids = c.kernels.topk(c.scores, c.scale, c.shift, most_experts(self.max_experts, c))
        total = np.zeros(len(ids))
        for column in c.unbiased.T:  # a written order of additions: np.sum's depends on the CPU
            total += column
        share = np.cumsum(c.kernels.picked(c.unbiased, ids).astype(np.float64), axis=1)
        full = share >= self.p * total[:, None]
        kept: I16 = ids.copy()
        kept[:, 1:][full[:, :-1]] = -1
        return kept
