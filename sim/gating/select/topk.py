"""Plain top-k (DeepSeekMoE, Mixtral, Qwen3, Kimi K2, ...): the k best experts, wherever they are."""

from __future__ import annotations

from typing import Literal

from sim.gating.select import Candidates, Select
from sim.tokens import I16


class TopK(Select):
    """The k largest (biased) scores of each token."""

    kind: Literal["topk"] = "topk"

    def select(self, candidates: Candidates) -> I16:
        c = candidates
        return c.kernels.topk(c.scores, c.scale, c.shift, c.k)
