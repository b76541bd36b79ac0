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

_EPS = 1e-8
"""Megatron's guard against an expert that no token wants at all."""


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
    extra_s_per_token: ClassVar[float] = 1e-5
    causal: ClassVar[bool] = False
    reads: ClassVar[Literal["nothing", "order", "differences", "sizes"]] = "differences"
    tolerance: float = Field(default=1e-4, gt=0, le=1)
    max_iterations: int = Field(default=500, gt=0, le=100_000)
    """At which the iteration stops in any case."""
    training: bool = True
    """False: plain top-k, as its inference does."""

    def note(self, model: Model) -> str:
        if not self.training:
            return ""
        return "Sinkhorn scales each micro-batch in training only; serving takes plain top-k"

    def select(self, candidates: Candidates) -> I16:
        c = candidates
        if not self.training or len(c.scores) == 0:
            return c.kernels.topk(c.scores, c.scale, c.shift, c.k)
        # The scaling absorbs each token's normaliser, so a softmax serves as exp(logits).
        cost = c.kernels.softmax(c.biased if c.logits is None else c.logits * c.scale + c.shift).astype(np.float64)
        n_tokens, n_experts = cost.shape
        expert = np.ones(n_experts)
        for _ in range(self.max_iterations):
            token = 1.0 / (n_tokens * (_total(cost * expert, 1) + _EPS))
            before = expert
            expert = 1.0 / (n_experts * (_total(cost * token[:, None], 0) + _EPS))
            if _total(np.abs(expert - before), 0) <= self.tolerance * n_experts:
                break
        scaled = (cost * (token * n_tokens)[:, None] * expert).astype(np.float32)
        one = np.ones(n_experts, np.float32)
        return c.kernels.topk(scaled, one, one * np.float32(0), c.k)


def _total(values: F64, axis: int) -> F64:
    """Sum over an axis from the first to the last: the same bits on every CPU, which np.sum and BLAS do not promise."""
    total: F64 = values.cumsum(axis=axis).take(-1, axis=axis)
    return total
