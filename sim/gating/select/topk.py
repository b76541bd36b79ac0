"""Plain top-k (DeepSeekMoE, Mixtral, Qwen3, Kimi K2, ...): the k best experts, wherever they are."""

from __future__ import annotations

from typing import Literal

from sim.gating.select import Candidates, Select
from sim.tokens import I16


class TopK(Select):
    """The k largest (biased) scores of each token; equal ones go to the lower expert.

    >>> import numpy as np
    >>> from sim.kernels import plain
    >>> scores, scale = np.array([[0.2, 0.9, 0.6, 0.6]], np.float32), np.ones(4, np.float32)
    >>> for bias in ([0.0, 0.0, 0.0, 0.0], [0.0, -0.5, 0.0, 0.25]):
    ...     shift = np.array(bias, np.float32)
    ...     TopK().select(Candidates(scores, scale, shift, 2, plain, np.random.default_rng)).tolist()
    [[1, 2]]
    [[3, 2]]
    """

    kind: Literal["topk"] = "topk"

    def select(self, candidates: Candidates) -> I16:
        c = candidates
        return c.kernels.topk(c.scores, c.scale, c.shift, c.k)
