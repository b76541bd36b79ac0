"""Sigmoid affinities: experts are judged one by one (DeepSeek-V3 report, eq. 15; Kimi K2, GLM-4.5)."""

from __future__ import annotations

from typing import Literal

from sim.gating.score import Score
from sim.kernels.choose import Kernels
from sim.tokens import F32, F64


class Sigmoid(Score):
    """s = 1 / (1 + exp(-z)). With one expert per token and no normalisation this is Llama 4's weight, the sigmoid of the
    best logit.

    >>> import numpy as np
    >>> from sim.kernels import plain
    >>> logits = np.array([[0.0, 1.0986123, -1.0]], np.float32)
    >>> Sigmoid().scores(logits, plain).astype(float).round(4).tolist()
    [[0.5, 0.75, 0.2689]]
    """

    kind: Literal["sigmoid"] = "sigmoid"

    def scores(self, logits: F32, kernels: Kernels) -> F32:
        return kernels.sigmoid(logits)

    def slope(self, scores: F64) -> F64:
        return scores * (1.0 - scores)
