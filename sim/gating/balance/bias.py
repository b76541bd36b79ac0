"""Auxiliary-loss-free balancing: a bias per expert, used for selection only.

Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664), Algorithm 1;
DeepSeek-V3 report, sections 2.1.2 and 4.2 (rate 0.001 for the first 14.3T tokens, then 0).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from sim.gating.balance import Balance
from sim.tokens import F64, I64


class Bias(Balance):
    """After each step, raise the bias of underloaded experts and lower that of overloaded ones.

    bias_update_rate: u (called gamma in the V3 report). rule: ``sign`` moves every bias by u; ``proportional`` by u times
    the *relative* load error (mean - count) / mean (the paper leaves the error's scale open; with raw counts u = 0.001
    would be unstable). form: ``additive`` (s + b, from 0) or ``multiplicative`` (s * b, from 1; paper Table 4).
    scope: over which tokens a load is counted: the ``global_batch`` (all ranks and micro-batches; the published rule),
    each ``micro_batch`` (all ranks) or each ``rank`` of each micro-batch; updates of several groups are averaged.
    stop_after_step: from this step on the rate is 0, or has fallen to 0 linearly with ``decay: linear``.

    Of a mean of 4 tokens, three experts got 8, 4 and 0:

    >>> counts = np.array([[[8, 4, 0]]])
    >>> for rule in (Bias(), Bias(rule="proportional"), Bias(form="multiplicative")):
    ...     rule.update(rule.start(3), counts, step=0).tolist()
    [-0.001, 0.0, 0.001]
    [-0.001, 0.0, 0.001]
    [0.999, 1.0, 1.001]
    >>> Bias(rule="proportional").update(np.zeros(3), np.array([[[5, 4, 3]]]), step=0).tolist()
    [-0.00025, 0.0, 0.00025]
    """

    kind: Literal["bias"] = "bias"
    bias_update_rate: float = Field(default=1e-3, ge=0)
    rule: Literal["sign", "proportional"] = "sign"
    form: Literal["additive", "multiplicative"] = "additive"
    scope: Literal["global_batch", "micro_batch", "rank"] = "global_batch"
    stop_after_step: int | None = Field(default=None, ge=0)
    decay: Literal["constant", "linear"] = "constant"

    def start(self, n_routed_experts: int) -> F64:
        return np.full(n_routed_experts, 0.0 if self.form == "additive" else 1.0)

    def adjust(self, state: F64) -> tuple[F64 | float, F64 | float]:
        return (1.0, state) if self.form == "additive" else (state, 0.0)

    def rate(self, step: int) -> float:
        """Return the update rate after step ``step`` (from 0)."""
        if self.stop_after_step is None:
            return self.bias_update_rate
        if step >= self.stop_after_step:
            return 0.0
        left = 1.0 - step / self.stop_after_step if self.decay == "linear" else 1.0
        return self.bias_update_rate * left

    def update(self, state: F64, counts: I64, step: int, gain: float = 1.0) -> F64:
        axes = {"global_batch": (0, 1), "micro_batch": (1,), "rank": ()}[self.scope]
        loads = counts.sum(axis=axes).reshape(-1, counts.shape[-1])
        # Compared as whole numbers, so that an exactly average expert has sign 0.
        error = loads.sum(axis=1, keepdims=True) - loads * loads.shape[1]
        if self.rule == "sign":
            move = np.sign(error).astype(np.float64)
        else:
            move = error / np.maximum(loads.sum(axis=1, keepdims=True), 1)
        moved: F64 = state + self.rate(step) * gain * move.mean(axis=0)
        return moved
