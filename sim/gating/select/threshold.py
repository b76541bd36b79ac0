"""Threshold routing: as many experts as score high enough, so that easy tokens cost less.

Known from dynamic routing (e.g. "Harder Tasks Need More Experts", arXiv 2403.07652, whose rule is ``top_p``); here the cut
is on the affinity itself.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from sim.gating.select import Candidates, Select
from sim.model import Model
from sim.tokens import I16


class Threshold(Select):
    """The experts whose (biased) score is at least ``threshold``: at least ``min_experts``, at most ``max_experts``.

    max_experts: by default twice the model's number of experts per token.

    >>> from sim.kernels import plain
    >>> scores, one = np.array([[0.2, 0.9, 0.6, 0.1], [0.3, 0.1, 0.2, 0.0]], np.float32), np.ones(4, np.float32)
    >>> rule = Threshold(threshold=0.5)
    >>> rule.select(Candidates(scores, one, 0 * one, 2, plain, np.random.default_rng)).tolist()
    [[1, 2, -1, -1], [0, -1, -1, -1]]
    """

    kind: Literal["threshold"] = "threshold"
    reads: ClassVar[Literal["nothing", "order", "differences", "sizes"]] = "sizes"
    varies: ClassVar[bool] = True
    threshold: float = Field(default=0.5, ge=0, le=1e6)
    """Smallest (biased) score that is chosen."""
    min_experts: int = Field(default=1, ge=0)
    """Experts that a token gets in any case."""
    max_experts: int | None = Field(default=None, gt=0)

    def problems(self, model: Model) -> list[tuple[str, str]]:
        most = self.max_experts or min(2 * model.num_experts_per_tok, model.n_routed_experts)
        if self.min_experts > most:
            return [("min_experts", f"must be <= max_experts = {most}")]
        return too_many(self.max_experts, model)

    def select(self, candidates: Candidates) -> I16:
        c = candidates
        width = most_experts(self.max_experts, c)
        ids = c.kernels.topk(c.scores, c.scale, c.shift, width)
        passes = c.kernels.picked(c.biased, ids) >= np.float32(self.threshold)
        passes[:, : self.min_experts] = True
        kept: I16 = np.where(passes, ids, np.int16(-1))
        return kept


def most_experts(max_experts: int | None, candidates: Candidates) -> int:
    """Return how many experts a token may get at most."""
    return min(max_experts or 2 * candidates.k, int(candidates.scores.shape[1]))


def too_many(max_experts: int | None, model: Model) -> list[tuple[str, str]]:
    """Return the problem of a ``max_experts`` that the model does not have."""
    if max_experts is not None and max_experts > model.n_routed_experts:
        return [("max_experts", f"must be <= n_routed_experts = {model.n_routed_experts}")]
    return []
