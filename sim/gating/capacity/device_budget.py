"""DeepSeek-V2's device-level token dropping: each device computes its average share; the least wanted go.

DeepSeek-V2 report, section 2.2.4: capacity factor 1.0, lowest affinities dropped first, tokens of about 10 % of the
training sequences never dropped; no dropping in evaluation. The text leaves open whether a token or one of its choices is
dropped: here it is the (token, expert) pair, judged by its own affinity. Devices are the model's groups of experts. Each
source rank's micro-batch has its own share of a device's budget, which drops more than one budget for all ranks would:
small micro-batches lose more to chance. A protected sequence is so in all layers.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from sim.gating.capacity import Asked, Capacity
from sim.gating.capacity.expert_capacity import place_in_line
from sim.model import Model
from sim.tokens import I16


class DeviceBudget(Capacity):
    """A device keeps ``capacity_factor`` times the mean number of pairs per device, those with the highest affinity.

    n_devices: by default the model's ``n_group``. protected_share: chance of a sequence to lose nothing; with many of them
    a device stays over its budget.

    Three of four pairs go to the first of two devices, whose budget is 2:

    >>> ids, affinity = np.array([[0], [1], [0], [3]], np.int16), np.array([[0.5], [0.9], [0.7], [0.1]], np.float32)
    >>> asked = Asked(ids, affinity, np.zeros(4, np.int32), 4, np.random.default_rng)
    >>> DeviceBudget(n_devices=2, protected_share=0).keep(asked).ravel().tolist()
    [-1, 1, 0, 3]
    >>> DeviceBudget(n_devices=2, protected_share=1).keep(asked).ravel().tolist()
    [0, 1, 0, 3]
    """

    kind: Literal["device_budget"] = "device_budget"
    lots: ClassVar[bool] = True
    n_devices: int | None = Field(default=None, gt=0)
    capacity_factor: float = Field(default=1.0, gt=0, le=1e4)
    """Budget over the mean number of pairs."""
    protected_share: float = Field(default=0.1, ge=0, le=1)

    def for_model(self, model: Model) -> Self:
        return self.model_copy(update={"n_devices": self.n_devices or model.n_group})

    def problems(self, model: Model) -> list[tuple[str, str]]:
        n_devices, experts = self.n_devices or model.n_group, model.n_routed_experts
        if n_devices > experts or experts % n_devices:
            return [("n_devices", f"must divide n_routed_experts = {experts}")]
        return []

    def keep(self, asked: Asked) -> I16:
        if self.n_devices is None:
            raise ValueError("device_budget has no n_devices yet; take for_model(model) first")
        ids = asked.topk_ids.ravel()
        device = np.where(ids >= 0, ids // (asked.n_routed_experts // self.n_devices), -1)
        # A product that should be whole must not lose a pair to its last bit.
        budget = int(np.count_nonzero(ids >= 0) * self.capacity_factor / self.n_devices * (1.0 + 1e-12))
        lot = asked.lot
        if lot is None:
            lot = asked.rng().random(int(asked.sequence.max(initial=0)) + 1)[asked.sequence]
        protected = np.repeat(lot < self.protected_share, asked.topk_ids.shape[1])
        order = np.lexsort((-asked.affinity.ravel(), ~protected))  # protected pairs first, then by affinity
        dropped = np.zeros(len(ids), dtype=bool)
        dropped[order] = place_in_line(device[order], self.n_devices) >= budget
        return np.where(dropped & ~protected, np.int16(-1), ids).reshape(asked.topk_ids.shape)
