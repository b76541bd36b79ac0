"""Square root of softplus (DeepSeek-V4 config: ``scoring_func: sqrtsoftplus``)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.gating.score import Score
from sim.kernels import elementary, plain
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
        # log(1 + e) = 2 atanh(e / (2 + e)) with e at most 1: nine terms, and no C library (see `sim.kernels.elementary`).
        e = plain.exp(-np.abs(logits)).astype(np.float64)
        ratio = e / (2.0 + e)
        square = ratio * ratio
        series = np.full_like(ratio, 1.0 / 17.0)
        for n in range(15, 0, -2):
            series *= square
            series += 1.0 / n
        scores: F32 = np.sqrt(np.maximum(logits, np.float32(0.0)) + 2.0 * ratio * series).astype(np.float32)
        return scores

    def slope(self, scores: F64) -> F64:
        # s^2 = log(1 + e^z), so sigmoid(z) = 1 - exp(-s^2), and ds/dz = sigmoid(z) / 2s.
        square = np.minimum(scores * scores, 100.0)  # e^-100 is nothing beside 1
        series = square * (1.0 - square / 2.0 * (1.0 - square / 3.0))
        sigmoid = np.where(square < 1e-4, series, 1.0 - elementary.exp(-square))
        slope: F64 = sigmoid / (2.0 * np.maximum(scores, np.finfo(np.float64).tiny))
        return slope
