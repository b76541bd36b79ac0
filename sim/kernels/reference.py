"""The obvious version of every selection kernel: a stable sort per token. Slow; tests compare the fast ones to it."""

from __future__ import annotations

import numpy as np

from sim.tokens import F32, I16


def topk(scores: F32, k: int) -> I16:
    """Return [T, k] int16 ids of the k largest of each row, best first, equal scores by lower index."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int16)


def group_limited_topk(scores: F32, k: int, n_group: int, topk_group: int, n_best: int) -> I16:
    """Top-k within the ``topk_group`` groups whose ``n_best`` largest scores sum highest (ties to the lower group)."""
    n_tokens, n_experts = scores.shape
    grouped = scores.reshape(n_tokens, n_group, n_experts // n_group)
    best = -np.sort(-grouped, axis=2)[:, :, :n_best]
    group_score = best[:, :, 0]
    for i in range(1, best.shape[2]):
        group_score = group_score + best[:, :, i]
    kept = np.argsort(-group_score, axis=1, kind="stable")[:, :topk_group]
    allowed = np.zeros((n_tokens, n_group), dtype=bool)
    np.put_along_axis(allowed, kept, True, axis=1)
    masked = np.where(np.repeat(allowed, n_experts // n_group, axis=1), scores, -np.inf)
    return topk(masked.astype(np.float32), k)
