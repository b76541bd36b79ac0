"""Absolutely balanced routing: what benchmarks and profiles simulate (deepseek-ai/profile-data README)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from sim.gating.select import Candidates, Select
from sim.model import Model
from sim.rng import stream
from sim.tokens import I16


class Balanced(Select):
    """k distinct experts per token, equally many in each of at most ``topk_group`` of ``n_group`` groups, whatever the
    scores.

    Token after token takes the next groups of a permutation, which changes whenever it is used up, and of each group the
    experts that have waited longest. The loads of a batch are equal where its tokens are a multiple of what meets all
    experts equally often (DeepSeek-V3: 32); otherwise the last round is cut short. n_group, topk_group: by default the
    model's.

    >>> balanced_ids(4, n_experts=8, k=2, n_group=4, topk_group=2).tolist()
    [[7, 2], [0, 5], [6, 1], [3, 4]]
    """

    kind: Literal["balanced"] = "balanced"
    per_token: ClassVar[bool] = False
    reads: ClassVar[Literal["nothing", "order", "differences", "sizes"]] = "nothing"
    n_group: int | None = Field(default=None, gt=0)
    topk_group: int | None = Field(default=None, gt=0)

    def for_model(self, model: Model) -> Self:
        return self.model_copy(
            update={"n_group": self.n_group or model.n_group, "topk_group": self.topk_group or model.topk_group}
        )

    def problems(self, model: Model) -> list[tuple[str, str]]:
        groups, limit = self.n_group or model.n_group, self.topk_group or model.topk_group
        experts, k = model.n_routed_experts, model.num_experts_per_tok
        if experts % groups:
            return [("n_group", f"must divide n_routed_experts = {experts}")]
        if limit > groups:
            return [("topk_group", f"must be <= n_group = {groups}")]
        if not groups_used(k, experts // groups, limit):
            return [("topk_group", f"num_experts_per_tok = {k} cannot be split evenly over <= {limit} groups")]
        return []

    def select(self, candidates: Candidates) -> I16:
        n_tokens, n_experts = candidates.scores.shape
        if self.n_group is None or self.topk_group is None:
            raise ValueError("balanced has no n_group and topk_group yet; take for_model(model) first")
        return balanced_ids(
            n_tokens, n_experts=n_experts, k=candidates.k, n_group=self.n_group, topk_group=self.topk_group
        )


def groups_used(k: int, group_size: int, topk_group: int) -> int:
    """Return the most groups, up to ``topk_group``, over which k experts split evenly; 0 if they do not.

    >>> groups_used(8, 32, 4), groups_used(6, 32, 4), groups_used(5, 4, 2)
    (4, 3, 0)
    """
    return max((g for g in range(1, topk_group + 1) if k % g == 0 and k // g <= group_size), default=0)


def balanced_ids(n_tokens: int, *, n_experts: int, k: int, n_group: int, topk_group: int) -> I16:
    """Return [n_tokens, k] int16 as `Balanced` says; a longer table begins with a shorter one."""
    size = n_experts // n_group
    limit = groups_used(k, size, topk_group)
    each = k // limit
    n_visits = n_tokens * limit
    keys = stream(0, "balanced", "groups").random((-(-n_visits // n_group), n_group))
    rounds = np.argsort(keys, axis=1, kind="stable")
    if n_group % limit:  # a token at the seam of two permutations must not meet a group twice
        rounds[:] = rounds[:1]
    # A permutation visits every group once, so visit v of the flat list is the (v // n_group)-th of its group.
    group = rounds.ravel()[:n_visits]
    first = np.arange(n_visits) // n_group * each
    order = np.argsort(stream(0, "balanced", "experts").random((n_group, size)), axis=1, kind="stable")
    place = (first[:, None] + np.arange(each)) % size
    ids = group[:, None] * size + order[group[:, None], place]
    table: I16 = ids.reshape(n_tokens, k).astype(np.int16)
    return table
