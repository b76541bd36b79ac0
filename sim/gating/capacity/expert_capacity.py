"""Expert capacity: a fixed number of places per expert; what does not fit skips the layer, what is empty is padding.

Fedus et al., "Switch Transformer" (arXiv 2101.03961), section 2.2, equation 3; Megatron-LM's generalisation to top-k
(capacity = ceil(T k / E x factor), ``moe_token_drop_policy``); GShard's counters (arXiv 2006.16668, Algorithm 1); V-MoE's
batch-prioritised order (arXiv 2106.05974, section 4.1).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field

from sim.gating.capacity import Asked, Capacity
from sim.tokens import I16, I64


class ExpertCapacity(Capacity):
    """Each expert takes at most ceil(tokens x k / experts x capacity_factor) tokens of a rank's micro-batch.

    drop_policy: who gets the places. ``probs``: the choices with the highest gate weight; ``position``: all first choices
    before any second choice, and among equals the earlier token (Switch, GShard); ``batch_prioritized``: as ``position``,
    tokens in the order of their best affinity. (Megatron-LM's own ``position`` does not ask for the rank of a choice.)
    min_capacity: at least this many. pad_to_capacity: experts compute all their places, used or not (static shapes); the
    exchange still carries real tokens only.

    Three tokens want expert 0, which has ceil(3 x 1 / 2 x 1.0) = 2 places:

    >>> ids, affinity = np.zeros((3, 1), np.int16), np.array([[0.5], [0.9], [0.7]], np.float32)
    >>> asked = Asked(ids, affinity, np.zeros(3, np.int32), 2, np.random.default_rng)
    >>> for policy in ("probs", "position", "batch_prioritized"):
    ...     ExpertCapacity(capacity_factor=1.0, drop_policy=policy).keep(asked).ravel().tolist()
    [-1, 0, 0]
    [0, 0, -1]
    [-1, 0, 0]
    """

    kind: Literal["expert_capacity"] = "expert_capacity"
    capacity_factor: float = Field(default=1.25, gt=0, le=1e4)
    """Places over the mean number of tokens."""
    min_capacity: int = Field(default=0, ge=0)
    drop_policy: Literal["probs", "position", "batch_prioritized"] = "position"
    pad_to_capacity: bool = False

    def capacity(self, n_tokens: int, k: int, n_routed_experts: int) -> int:
        """Return the places of each expert for ``n_tokens`` of one rank's micro-batch."""
        return min(n_tokens, max(self.min_capacity, places(n_tokens, k, n_routed_experts, self.capacity_factor)))

    def padded_tokens(self, n_tokens: int, k: int, n_routed_experts: int) -> int | None:
        return self.capacity(n_tokens, k, n_routed_experts) if self.pad_to_capacity else None

    def keep(self, asked: Asked) -> I16:
        n_tokens, k = asked.topk_ids.shape
        capacity = self.capacity(n_tokens, asked.experts_per_token, asked.n_routed_experts)
        if self.drop_policy == "probs":
            weight = asked.affinity if asked.weight is None else asked.weight
            order = np.argsort(-weight.ravel(), kind="stable")
        else:
            token = np.arange(n_tokens)
            if self.drop_policy == "batch_prioritized":
                token = np.argsort(-asked.affinity.max(axis=1, initial=0.0), kind="stable")
            order = (token[None, :] * k + np.arange(k)[:, None]).ravel()
        in_line = (asked.topk_ids if asked.in_line is None else asked.in_line).ravel()
        kept = asked.topk_ids.ravel().copy()
        kept[order[place_in_line(in_line[order], asked.n_routed_experts) >= capacity]] = -1
        return kept.reshape(n_tokens, k)


def places(n_tokens: int, k: int, n_experts: int, capacity_factor: float) -> int:
    """Return ceil(T k / E x factor), at most T.

    >>> places(3, 1, 2, 1.0), places(4096, 8, 256, 1.1), places(10, 1, 4, 100.0)
    (2, 141, 10)
    """
    # A product that should be whole must not be lifted to the next integer by its last bit.
    return min(n_tokens, math.ceil(n_tokens * k * capacity_factor / n_experts * (1.0 - 1e-12)))


def place_in_line(groups: I16 | I64, n_groups: int) -> I64:
    """Return how many entries of the same group stand before each entry; 0 for entries of group -1.

    >>> place_in_line(np.array([1, 0, 1, -1, 1]), 2).tolist()
    [0, 0, 1, 0, 2]
    """
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups.astype(np.int64) + 1, minlength=n_groups + 1)
    starts = np.cumsum(sizes) - sizes
    place = np.empty(len(groups), dtype=np.int64)
    place[order] = np.arange(len(groups)) - starts[groups[order].astype(np.int64) + 1]
    return np.where(groups >= 0, place, 0)
