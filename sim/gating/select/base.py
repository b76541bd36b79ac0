"""BASE layers: tokens are assigned, not routed, so that each expert gets exactly its share.

Lewis et al., "BASE Layers: Simplifying Training of Large, Sparse Models" (arXiv 2103.16716), section 3, and its published
code: training solves a balanced linear assignment on the raw affinities (token x expert centroid), inference takes each
token's best expert: what is served is not what was trained. The shuffle of tokens over workers before the assignment is
left out: it changes which tokens meet in an assignment, not the loads.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from sim.gating.assignment import balanced_assignment
from sim.gating.select import Candidates, Select
from sim.model import Model
from sim.tokens import I16


class Base(Select):
    """Balanced assignment on router logits while ``training``, plain top-k otherwise.

    >>> import numpy as np
    >>> from sim.kernels import plain
    >>> logits, one = np.array([[2.0, 1.5], [1.0, -2.0]], np.float32), np.ones(2, np.float32)
    >>> for training in (True, False):
    ...     rule = Base(training=training)
    ...     rule.select(Candidates(logits, one, 0 * one, 1, plain, np.random.default_rng, logits=logits)).tolist()
    [[1], [0]]
    [[0], [0]]
    """

    kind: Literal["base"] = "base"
    per_token: ClassVar[bool] = False
    extra_s_per_token: ClassVar[float] = 1e-4
    causal: ClassVar[bool] = False
    reads: ClassVar[Literal["nothing", "order", "differences", "sizes"]] = "differences"
    training: bool = True
    """False: each token's best experts, as its inference does."""

    def note(self, model: Model) -> str:
        if not self.training:
            return ""
        return "BASE solves an assignment per micro-batch in training only; serving takes each token's best experts"

    def select(self, candidates: Candidates) -> I16:
        c = candidates
        if not self.training:
            return c.kernels.topk(c.scores, c.scale, c.shift, c.k)
        affinity = c.biased if c.logits is None else c.logits * c.scale + c.shift
        return balanced_assignment(affinity, c.k, c.kernels)
