"""Softmax affinities: experts compete (Switch, GShard, DeepSeekMoE, DeepSeek-V2, Mixtral, Qwen3)."""

from __future__ import annotations

from typing import Literal

from sim.gating.score import Score
from sim.kernels.choose import Kernels
from sim.tokens import F32


class Softmax(Score):
    """s = exp(z) / sum(exp(z)). A softmax over the k selected logits (Mixtral) is this plus ``norm_topk_prob``."""

    kind: Literal["softmax"] = "softmax"

    def scores(self, logits: F32, kernels: Kernels) -> F32:
        return kernels.softmax(logits)
