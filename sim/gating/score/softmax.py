"""Softmax affinities: experts compete (Switch, GShard, DeepSeekMoE, DeepSeek-V2, Mixtral, Qwen3)."""

from __future__ import annotations

from typing import Literal

from sim.gating.score import Score
from sim.kernels.choose import Kernels
from sim.tokens import F32, F64


class Softmax(Score):
    """s = exp(z) / sum(exp(z)). A softmax over the k selected logits (Mixtral) is this plus ``norm_topk_prob``.

    >>> import numpy as np
    >>> from sim.kernels import plain
    >>> logits = np.array([[0.0, 1.0986123, -1.0]], np.float32)
    >>> Softmax().scores(logits, plain).astype(float).round(4).tolist()
    [[0.2289, 0.6868, 0.0842]]
    """

    kind: Literal["softmax"] = "softmax"

    def scores(self, logits: F32, kernels: Kernels) -> F32:
        return kernels.softmax(logits)

    def slope(self, scores: F64) -> F64:
        return scores
