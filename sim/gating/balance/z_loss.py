"""The router z-loss of ST-MoE (Zoph et al., arXiv 2202.08906, eq. 5): small logits, for the sake of numerics.

Not a balance loss: it flattens scores, whoever they favour. Megatron's ``moe_z_loss_coeff``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from sim.gating.balance import Sample, Seen
from sim.gating.balance.router_loss import Push, RouterLoss
from sim.gating.piece import GateShape
from sim.kernels import elementary, plain
from sim.tokens import F32, F64


class ZLoss(RouterLoss):
    """coef x mean over tokens of logsumexp(z)^2, whatever the score function.

    Two experts with logits 0: logsumexp is log 2, the gradient 2 log 2 x 1/2 for each:

    >>> from sim.gating.score.softmax import Softmax
    >>> zeros, half = np.zeros((1, 2), np.float32), np.full((1, 2), 0.5, np.float32)
    >>> topic = np.zeros(1, np.int32)
    >>> seen = Seen(np.array([[[1, 0]]]), None, (Sample(0, 0, zeros, half, topic[None].astype(np.int16), topic, topic, Softmax()),))
    >>> rule, shape = ZLoss(), GateShape(2, 1)
    >>> round(rule.value(seen, shape), 4), rule.gradient(seen, shape)[0].round(4).tolist()
    (0.4805, [[0.6931, 0.6931]])
    """

    kind: Literal["z_loss"] = "z_loss"
    rests_when_even: ClassVar[bool] = False  # it lowers logits, whoever is chosen
    router_z_loss_coef: float = Field(default=1e-3, ge=0, le=1e15)
    """The coefficient."""

    @property
    def coefficient(self) -> float:
        return self.router_z_loss_coef

    def pushes(self, seen: Seen, shape: GateShape) -> Iterator[tuple[Sample, Push]]:
        for sample in seen.samples:
            p, level = _softmax(sample.logits)
            yield sample, Push(2.0 * level * p, 2.0 * p * (1.0 + 2.0 * np.abs(level)))

    def value(self, seen: Seen, shape: GateShape) -> float:
        if not seen.samples:
            return 0.0
        levels = np.concatenate([_softmax(sample.logits)[1] for sample in seen.samples])
        return float(np.square(levels).mean())


def _softmax(logits: F32) -> tuple[F64, F64]:
    """[S, E] probabilities and [S, 1] logsumexp, the latter from the largest probability."""
    p = plain.softmax(logits).astype(np.float64)
    level: F64 = logits.max(axis=1, keepdims=True).astype(np.float64) - elementary.log(p.max(axis=1, keepdims=True))
    return p, level
