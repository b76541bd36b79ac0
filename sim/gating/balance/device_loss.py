"""DeepSeek-V2's device-level balance loss (report, eq. 26-28; DeepSeekMoE, arXiv 2401.06066, eq. 15-17).

Balances devices (or nodes: the model's groups of experts) and lets the experts of one device differ.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field

from sim.gating.balance.router_loss import ExpertLoss
from sim.gating.piece import GateShape
from sim.model import Model
from sim.tokens import F64


class DeviceLoss(ExpertLoss):
    """alpha sum_d f'_d P'_d, f'_d = mean of f_i on device d, P'_d = sum of P_i on it; hence F_i = f'_d(i).

    n_group: number of devices, each with consecutive experts; by default the model's.

    Four experts on two devices; expert 0 alone has all tokens, so f = (4, 0, 0, 0) and f' = (2, 0):

    >>> DeviceLoss(n_group=2).factors(np.array([[5.0, 0.0, 0.0, 0.0]]), np.array([5.0]), GateShape(4, 1)).tolist()
    [[2.0, 2.0, 0.0, 0.0]]
    """

    kind: Literal["device_loss"] = "device_loss"
    n_group: int | None = Field(default=None, gt=0)

    def for_model(self, model: Model) -> Self:
        return self.model_copy(update={"n_group": self.n_group or model.n_group})

    def problems(self, model: Model) -> list[tuple[str, str]]:
        found = super().problems(model)
        if model.n_routed_experts % (self.n_group or model.n_group):
            found.append(("n_group", f"must divide n_routed_experts = {model.n_routed_experts}"))
        return found

    def factors(self, counts: F64, n_tokens: F64, shape: GateShape) -> F64:
        per_expert = super().factors(counts, n_tokens, shape)
        n_group = self.n_group or shape.n_group
        by_device = per_expert.reshape(len(per_expert), n_group, -1)
        return np.repeat(by_device.sum(axis=2) / by_device.shape[2], by_device.shape[2], axis=1)
