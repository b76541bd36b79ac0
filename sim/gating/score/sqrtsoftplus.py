"""Square root of softplus (DeepSeek-V4 config: ``scoring_func: sqrtsoftplus``)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.gating.score import Score
from sim.kernels.choose import Kernels
from sim.tokens import F32, F64


class SqrtSoftplus(Score):
    """s = sqrt(log(1 + exp(z))).

    >>> from sim.kernels import plain
    >>> logits = np.array([[0.0, 1.0986123, -1.0]], np.float32)
    >>> SqrtSoftplus().scores(logits, plain).astype(float).round(4).tolist()
    [[0.8326, 1.1774, 0.5597]]
    """

    kind: Literal["sqrtsoftplus"] = "sqrtsoftplus"

    def scores(self, logits: F32, kernels: Kernels) -> F32:
        wide = logits.astype(np.float64)
        softplus = np.maximum(wide, 0.0) + np.log1p(np.exp(-np.abs(wide)))
        scores: F32 = np.sqrt(softplus).astype(np.float32)
        return scores

    def slope(self, scores: F64) -> F64:
        # s^2 = log(1 + e^z), so sigmoid(z) = 1 - exp(-s^2).
        slope: F64 = -np.expm1(-(scores**2)) / (2.0 * np.maximum(scores, np.finfo(np.float64).tiny))
        return slope
