"""Quantile balancing: each expert's threshold is set where it would take its share of the last batch.

As Megatron-LM's ``qb_dual_update`` does (used for Kimi K3): one exact step per batch on the dual of the assignment
problem, with no rate to tune. Knows no expert groups: with group-limited selection its shares are not met. Known from
code and secondary reports; no paper describes its convergence.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from sim.gating.balance import Adjustment, Balance, Seen
from sim.gating.piece import GateShape
from sim.tokens import F32, F64


class Quantile(Balance):
    """Select the top-k of s - beta. With alpha_t the (k+1)-th largest of a token's s - beta, the next beta_e is the
    (q+1)-th largest of s[t, e] - alpha_t over T tokens, q = T k / E: then q tokens would have preferred e to their
    (k+1)-th choice. Thresholds of several groups are averaged.

    scope: ``micro_batch`` (one rank's, as in Megatron), ``ep_group`` or ``global_batch``. Sampled tokens stand for all.

    Four tokens, two experts, k = 1, q = 2. All like expert 1 better, by 4, 3, 2 and 1; with a threshold of 2 the third
    token stands on the edge, and a tie goes to expert 0:

    >>> from sim.gating.balance import Sample
    >>> from sim.gating.score.softmax import Softmax
    >>> scores, zeros = np.array([[0, 4], [0, 3], [0, 2], [0, 1]], np.float32), np.zeros(4, np.int32)
    >>> seen = Seen(np.array([[[0, 4]]]), None, (Sample(0, 0, scores, scores, np.ones((4, 1), np.int16), zeros, zeros, Softmax()),))
    >>> rule, shape = Quantile(), GateShape(2, 1)
    >>> beta = rule.update(rule.start(shape), seen, shape, step=0)
    >>> beta.tolist(), ((scores - beta).argmax(axis=1)).tolist()
    ([0.0, 2.0], [1, 1, 0, 0])
    """

    kind: Literal["quantile"] = "quantile"
    scope: Literal["micro_batch", "ep_group", "global_batch"] = "micro_batch"
    samples: ClassVar[bool] = True
    ranks_alone: ClassVar[bool] = True

    def start(self, shape: GateShape) -> F64:
        return np.zeros(shape.n_routed_experts)

    def adjust(self, state: F64, shape: GateShape) -> Adjustment:
        return Adjustment(shift=-state)

    def update(self, state: F64, seen: Seen, shape: GateShape, step: int, gain: float = 1.0) -> F64:
        if shape.num_experts_per_tok >= shape.n_routed_experts:
            return state
        groups: dict[tuple[int, ...], list[F32]] = {}
        for sample in seen.samples:
            key = {"micro_batch": (sample.part, sample.rank), "ep_group": (sample.part,)}.get(self.scope, ())
            groups.setdefault(key, []).append(sample.scores)
        found = [_thresholds(np.concatenate(scores), state, shape.num_experts_per_tok) for scores in groups.values()]
        return np.array(found).sum(axis=0) / len(found) if found else state


def _thresholds(scores: F32, beta: F64, k: int) -> F64:
    """[E] thresholds from [T, E] scores."""
    n_tokens, n_experts = scores.shape
    wide = scores.astype(np.float64)
    next_best = np.partition(wide - beta, n_experts - k - 1, axis=1)[:, n_experts - k - 1, None]
    rank = min(n_tokens - 1, n_tokens * k // n_experts)
    thresholds: F64 = np.partition(wide - next_best, n_tokens - 1 - rank, axis=0)[n_tokens - 1 - rank]
    return thresholds
