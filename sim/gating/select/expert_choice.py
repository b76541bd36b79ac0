"""Expert choice: experts pick tokens, so loads are equal by construction and tokens get as many experts as want them.

Zhou et al., "Mixture-of-Experts with Expert Choice Routing" (arXiv 2202.09368), equation 1. Not causal: whether an expert
takes a token depends on the tokens after it (arXiv 2408.15664, section 5.2 and appendix D.1), so a decoder cannot use it.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from sim.gating.select import Candidates, Select
from sim.model import Model
from sim.tokens import I16


class ExpertChoice(Select):
    """Each expert takes its ``tokens x capacity_factor / experts`` best tokens of the micro-batch, earlier ones in a tie.

    capacity_factor: c of the paper, the mean number of experts per token; by default the model's.

    Four tokens, two experts, one expert per token on average: each takes two; the first token gets both, the last none.

    >>> from sim.kernels import plain
    >>> scores, one = np.array([[0.9, 0.8], [0.7, 0.1], [0.2, 0.6], [0.1, 0.2]], np.float32), np.ones(2, np.float32)
    >>> ExpertChoice().select(Candidates(scores, one, 0 * one, 1, plain, np.random.default_rng)).tolist()
    [[0, 1], [0, -1], [1, -1], [-1, -1]]
    >>> round(leakage_bits_per_token_and_layer(16, 2), 2)
    5.61
    """

    kind: Literal["expert_choice"] = "expert_choice"
    per_token: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    varies: ClassVar[bool] = True
    capacity_factor: float | None = Field(default=None, gt=0, le=1e4)

    def note(self, model: Model) -> str:
        per_token = self.capacity_factor or float(model.num_experts_per_tok)
        bits = leakage_bits_per_token_and_layer(model.n_routed_experts, per_token)
        return (
            "expert choice is not causal: a token's experts depend on later tokens, which a decoder does not have; what "
            f"training can leak that way exceeds {bits:.1f} bits per token and layer (arXiv 2408.15664, appendix D.1)"
        )

    def select(self, candidates: Candidates) -> I16:
        biased = candidates.biased
        n_tokens, n_experts = biased.shape
        wanted = self.capacity_factor or float(candidates.k)
        # A product that should be whole must not lose a token to its last bit.
        takes = min(n_tokens, max(1, int(n_tokens * wanted / n_experts * (1.0 + 1e-12))))
        taken = np.zeros(biased.shape, dtype=bool)
        np.put_along_axis(taken, np.argsort(-biased, axis=0, kind="stable")[:takes], True, axis=0)
        width = int(taken.sum(axis=1).max(initial=0))
        order = np.argsort(np.where(taken, -biased, np.inf), axis=1, kind="stable")[:, :width]
        ids: I16 = np.where(np.take_along_axis(taken, order, axis=1), order, -1).astype(np.int16)
        return ids


def leakage_bits_per_token_and_layer(n_routed_experts: int, num_experts_per_tok: float) -> float:
    """Return K log2((1 - R) / R) with R = K / N: what expert choice can tell a token about its successors, at least
    (arXiv 2408.15664, section 5.2); 0 where half of the experts or more are chosen anyway."""
    share = num_experts_per_tok / n_routed_experts
    return num_experts_per_tok * math.log2((1 - share) / share) if share < 0.5 else 0.0
