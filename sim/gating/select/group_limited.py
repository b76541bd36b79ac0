"""Device- and node-limited routing: first the groups, then the experts inside them.

DeepSeek-V2 report, section 2.2.2 (groups = devices, score = best affinity, M = 3) and DeepSeek-V3 report, section 2.1.2
(groups = nodes, score = sum of the K/M best biased affinities, M = 4). Published code writes the V3 sum as the two best
(K/M = 8/4). Experts of other groups are masked with -inf; the 0.0 of a widespread port lets a token leave its groups
when few biased scores are positive.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field

from sim.gating.select import Candidates, Select
from sim.model import Model
from sim.tokens import I16


class GroupLimited(Select):
    """Top-k within the ``topk_group`` best of ``n_group`` equal groups of consecutive experts.

    n_group, topk_group: by default the model's. group_score: ``max`` (V2), ``top2_sum`` (V3's code) or ``topk_sum`` (the
    sum of the k/topk_group best, V3's text). Group scores use biased affinities; equal groups go to the lower index.

    Of the pairs (0.9, 0.1), (0.6, 0.5) and (0.7, 0.2), the second has the largest sum, the first the largest score:

    >>> import numpy as np
    >>> from sim.kernels import plain
    >>> scores = np.array([[0.9, 0.1, 0.6, 0.5, 0.7, 0.2]], np.float32)
    >>> one, zero = np.ones(6, np.float32), np.zeros(6, np.float32)
    >>> for group_score in ("top2_sum", "max"):
    ...     rule = GroupLimited(n_group=3, topk_group=1, group_score=group_score)
    ...     rule.select(Candidates(scores, one, zero, 2, plain, np.random.default_rng)).tolist()
    [[2, 3]]
    [[0, 1]]
    """

    kind: Literal["group_limited"] = "group_limited"
    reads: ClassVar[Literal["nothing", "order", "differences", "sizes"]] = "differences"
    n_group: int | None = Field(default=None, gt=0)
    topk_group: int | None = Field(default=None, gt=0)
    group_score: Literal["max", "top2_sum", "topk_sum"] = "top2_sum"

    def for_model(self, model: Model) -> Self:
        return self.model_copy(
            update={"n_group": self.n_group or model.n_group, "topk_group": self.topk_group or model.topk_group}
        )

    def problems(self, model: Model) -> list[tuple[str, str]]:
        n_group, topk_group = self.n_group or model.n_group, self.topk_group or model.topk_group
        experts, k = model.n_routed_experts, model.num_experts_per_tok
        if experts % n_group:
            return [("n_group", f"must divide n_routed_experts = {experts}")]
        if topk_group > n_group:
            return [("topk_group", f"must be <= n_group = {n_group}")]
        if topk_group * (experts // n_group) < k:
            reach = topk_group * (experts // n_group)
            return [("topk_group", f"{topk_group} groups hold {reach} experts, fewer than num_experts_per_tok = {k}")]
        return []

    def select(self, candidates: Candidates) -> I16:
        c = candidates
        if self.n_group is None or self.topk_group is None:
            raise ValueError("group_limited has no n_group and topk_group yet; take for_model(model) first")
        n_best = {"max": 1, "top2_sum": 2, "topk_sum": max(1, c.k // self.topk_group)}[self.group_score]
        return c.kernels.group_limited_topk(c.scores, c.scale, c.shift, c.k, self.n_group, self.topk_group, n_best)
