"""Auxiliary-loss-free balancing: a bias per expert, used for selection only.

Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664), Algorithm 1;
DeepSeek-V3 report, sections 2.1.2 and 4.2 (rate 0.001 for the first 14.3T tokens, then 0).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from sim.gating.balance import Adjustment, Balance, Seen, scheduled
from sim.gating.piece import GateShape
from sim.tokens import F64, I64


class Bias(Balance):
    """After each step, raise the bias of underloaded experts and lower that of overloaded ones.

    bias_update_rate: u (called gamma in the V3 report). rule: ``sign`` moves every bias by u; ``proportional`` by u times
    the *relative* load error (mean - count) / mean (the paper leaves the error's scale open; with raw counts u = 0.001
    would be unstable). form: ``additive`` (s + b, from 0) or ``multiplicative`` (s * b, from 1; paper Table 4).
    scope: over which tokens a load is counted: ``global_batch`` (the published rule), ``ep_group`` or ``micro_batch``;
    moves of several groups are averaged. per: one bias for all tokens, or one for each ``modality``, moved by the loads of
    its own tokens (as a write-up of DeepSeek-V4.1 describes). stop_after_step: from this step on the rate is 0, or has
    fallen to 0 linearly with ``decay: linear``.

    Of a mean of 4 tokens, three experts got 8, 4 and 0:

    >>> seen, shape = Seen(np.array([[[8, 4, 0]]])), GateShape(3, 1)
    >>> for rule in (Bias(), Bias(rule="proportional"), Bias(form="multiplicative")):
    ...     rule.update(rule.start(shape), seen, shape, step=0).tolist()
    [[-0.001, 0.0, 0.001]]
    [[-0.001, 0.0, 0.001]]
    [[0.999, 1.0, 1.001]]

    Text tokens overload the first expert, image tokens the third; together they look balanced:

    >>> shape = GateShape(3, 1, modalities=("text", "image"))
    >>> seen = Seen(np.array([[[5, 5, 5]]]), topic_counts=np.array([[5, 3, 1], [0, 2, 4]]))
    >>> [Bias(per=per).update(Bias(per=per).start(shape), seen, shape, step=0).tolist() for per in ("all", "modality")]
    [[[0.0, 0.0, 0.0]], [[-0.001, 0.0, 0.001], [0.001, 0.0, -0.001]]]
    """

    kind: Literal["bias"] = "bias"
    bias_update_rate: float = Field(default=1e-3, ge=0, le=1e3)
    rule: Literal["sign", "proportional"] = "sign"
    form: Literal["additive", "multiplicative"] = "additive"
    scope: Literal["global_batch", "ep_group", "micro_batch"] = "global_batch"
    per: Literal["all", "modality"] = "all"
    stop_after_step: int | None = Field(default=None, ge=0)
    decay: Literal["constant", "linear"] = "constant"
    """How the rate reaches 0 at ``stop_after_step``."""

    def start(self, shape: GateShape) -> F64:
        rows = len(set(shape.modalities)) if self.per == "modality" else 1
        return np.full((rows, shape.n_routed_experts), 0.0 if self.form == "additive" else 1.0)

    def adjust(self, state: F64, shape: GateShape) -> Adjustment:
        bias = state[shape.modality_of_topic] if self.per == "modality" else state[0]
        return Adjustment(shift=bias) if self.form == "additive" else Adjustment(scale=bias)

    def rate(self, step: int) -> float:
        """Return the update rate after step ``step`` (from 0; -1: warming up)."""
        return scheduled(self.bias_update_rate, step, self.stop_after_step, self.decay)

    def _groups(self, seen: Seen, shape: GateShape) -> I64:
        """Return [rows of the state, groups, E] loads."""
        if self.per == "all" or seen.topic_counts is None:
            return seen.loads(self.scope)[None]
        loads = np.zeros((len(set(shape.modalities)), 1, shape.n_routed_experts), dtype=np.int64)
        for modality, counts in zip(shape.modality_of_topic, seen.topic_counts, strict=True):
            loads[modality, 0] += counts
        return loads

    def update(self, state: F64, seen: Seen, shape: GateShape, step: int, gain: float = 1.0) -> F64:
        loads = self._groups(seen, shape)
        # Compared as whole numbers, so that an exactly average expert has sign 0.
        total = loads.sum(axis=-1, keepdims=True)
        error = total - loads * loads.shape[-1]
        move = np.sign(error).astype(np.float64) if self.rule == "sign" else error / np.maximum(total, 1)
        moved: F64 = state + self.rate(step) * gain * move.mean(axis=1)
        return moved

    def problems(self, model: object) -> list[tuple[str, str]]:
        if self.per == "modality" and self.scope != "global_batch":
            return [("per", "a bias per modality counts the global_batch")]
        return []
