"""Sinkhorn routing: probabilities scaled until all experts are wanted equally, then top-k (as Megatron-LM trains it).

Clark et al., "Unified Scaling Laws for Routed Language Models" (arXiv 2202.01169), appendix B (S-BASE). Gate weights are
those of the unscaled scores; at inference the published code takes plain top-k.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from sim.gating.select import Candidates, Select
from sim.model import Model
from sim.tokens import F64, I16


class Sinkhorn(Select):
    """Top-k of exp(logits) after alternately scaling tokens to 1/T and experts to 1/E, while ``training``.

    tolerance: mean change of the experts' factors at which the iteration stops. All three tokens prefer the first expert;
    the one that prefers it least is moved:

    >>> from sim.kernels import plain
    >>> logits, one = np.array([[2.0, 0.0], [1.5, 0.0], [0.2, 0.0]], np.float32), np.ones(2, np.float32)
    >>> Sinkhorn().select(Candidates(logits, one, 0 * one, 1, plain, np.random.default_rng, logits=logits)).tolist()
    [[0], [0], [1]]
    """

    kind: Literal["sinkhorn"] = "sinkhorn"
    per_token: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    ordinal: ClassVar[bool] = False
    tolerance: float = Field(default=1e-4, gt=0, le=1)
    max_iterations: int = Field(default=500, gt=0, le=100_000)
    training: bool = True

    def note(self, model: Model) -> str:
        if not self.training:
            return ""
        return "Sinkhorn scales each micro-batch in training only; serving takes plain top-k"

    def select(self, candidates: Candidates) -> I16:
        c = candidates
        if not self.training:
            return c.kernels.topk(c.scores, c.scale, c.shift, c.k)
        # The scaling absorbs each token's normaliser, so a softmax serves as exp(logits).
        cost = c.kernels.softmax(c.biased if c.logits is None else c.logits * c.scale + c.shift).astype(np.float64)
        n_tokens, n_experts = cost.shape
        columns = np.ascontiguousarray(cost.T)
        token, expert = np.ones(n_tokens), np.ones(n_experts)
        for _ in range(self.max_iterations):
            token = 1.0 / (n_tokens * _combine(columns, expert))
            before = expert
            expert = 1.0 / (n_experts * _combine(cost, token))
            if np.abs(expert - before).mean() < self.tolerance:
                break
        scaled = (cost * token[:, None] * n_tokens * expert).astype(np.float32)
        one = np.ones(n_experts, np.float32)
        return c.kernels.topk(scaled, one, one * np.float32(0), c.k)


def _combine(rows: F64, factor: F64) -> F64:
    """Sum of rows x factor over rows, in their order: the same bits on every CPU, which BLAS does not promise."""
    total = np.zeros(rows.shape[1])
    for row, f in zip(rows, factor, strict=True):
        total += row * f
    return total
