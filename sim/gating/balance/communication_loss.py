"""DeepSeek-V2's communication balance loss (report, eq. 29-31): each device should receive as much as it may send.

Counts tokens, not (token, expert) pairs: a device reached by two of a token's experts receives it once.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from sim.gating.balance import Sample
from sim.gating.balance.router_loss import BalanceLoss
from sim.gating.piece import GateShape
from sim.model import Model
from sim.tokens import F64, I16


class CommunicationLoss(BalanceLoss):
    """alpha sum_d f''_d P''_d, f''_d = D / (M T) x tokens sent to device d, P''_d = sum of P_i on it.

    n_group: D devices with consecutive experts; topk_group: M devices that a token may reach; by default the model's.
    Where tokens reach other than M devices on average (no device limit), the loss of perfect balance is not 1.

    Two devices of two experts, M = 1. Three tokens: experts 0 and 1 (one device), 2 and 3 (one), 0 and 2 (both), so
    that each device gets two of three tokens:

    >>> rule, shape = CommunicationLoss(n_group=2, topk_group=1), GateShape(4, 2)
    >>> from sim.gating.score.softmax import Softmax
    >>> ids, even = np.array([[0, 1], [2, 3], [0, 2]], np.int16), np.full((3, 4), 0.25, np.float32)
    >>> zeros = np.zeros(3, np.int32)
    >>> rule.units(Sample(0, 0, even, even, ids, zeros, zeros, Softmax()), shape).tolist()
    [[0, -1], [1, -1], [0, 1]]
    >>> rule.factors(np.array([[2.0, 2.0]]), np.array([3.0]), shape).round(3).tolist()
    [[1.333, 1.333, 1.333, 1.333]]
    """

    kind: Literal["communication_loss"] = "communication_loss"
    n_group: int | None = Field(default=None, gt=0)
    topk_group: int | None = Field(default=None, gt=0)
    exact: ClassVar[bool] = False

    def for_model(self, model: Model) -> Self:
        return self.model_copy(
            update={"n_group": self.n_group or model.n_group, "topk_group": self.topk_group or model.topk_group}
        )

    def problems(self, model: Model) -> list[tuple[str, str]]:
        found = super().problems(model)
        n_group, topk_group = self.n_group or model.n_group, self.topk_group or model.topk_group
        if model.n_routed_experts % n_group:
            found.append(("n_group", f"must divide n_routed_experts = {model.n_routed_experts}"))
        if topk_group > n_group:
            found.append(("topk_group", f"must be <= n_group = {n_group}"))
        return found

    def n_units(self, shape: GateShape) -> int:
        return self.n_group or shape.n_group

    def units(self, sample: Sample, shape: GateShape) -> I16:
        ids = sample.topk_ids
        size = shape.n_routed_experts // self.n_units(shape)
        devices = np.sort(np.where(ids >= 0, ids // size, -1), axis=1)
        repeated = np.zeros(devices.shape, dtype=bool)
        repeated[:, 1:] = devices[:, 1:] == devices[:, :-1]
        return np.where(repeated, -1, devices).astype(np.int16)

    def factors(self, counts: F64, n_tokens: F64, shape: GateShape) -> F64:
        n_group = self.n_units(shape)
        reach = n_group / (self.topk_group or shape.topk_group)
        per_device = counts * reach / np.maximum(n_tokens, 1.0)[:, None]
        return np.repeat(per_device, shape.n_routed_experts // n_group, axis=1)
