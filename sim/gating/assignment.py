"""Balanced assignment: the largest sum of scores when every expert gets its share of the tokens.

A transportation problem: maximise sum s[t, e] x[t, e] with k experts per token and a given load per expert, 0 <= x <= 1.
Its prices (the duals of the loads) are the ideal bias of loss-free balancing (arXiv 2512.03915 reads that rule as one
primal-dual step per iteration). Any prices bound the optimum from above; good ones leave only few pairs undecided, which
HiGHS then solves exactly. Which of several optima is found may depend on the version of HiGHS.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array

from sim.kernels.choose import Kernels
from sim.tokens import F32, F64, I16, I64, Bool

_ROUNDS = 60


class Prices(NamedTuple):
    """bound: no assignment with these loads has a larger sum of scores. price: [E] float64, added to a load's cost."""

    bound: float
    price: F64


def even_loads(n_tokens: int, k: int, n_experts: int) -> I64:
    """Return [E] loads that sum to tokens x k and differ by at most one, larger ones first."""
    share, more = divmod(n_tokens * k, n_experts)
    return share + (np.arange(n_experts) < more).astype(np.int64)


def balanced_bound(scores: F32, k: int, kernels: Kernels) -> Prices:
    """Bound what any perfectly balanced choice of ``k`` experts per token can sum to, for scores [T, E] float32.

    D(b) = sum_t (sum of the k largest s_t - b) + sum_e b_e T k / E is convex in the prices b and at least the optimum for
    every b; the best of 60 rounds of a shrinking subgradient step is returned.
    """
    n_tokens, n_experts = scores.shape
    share = n_tokens * k / n_experts
    price, best = np.zeros(n_experts), Prices(np.inf, np.zeros(n_experts))
    one = np.ones(n_experts, np.float32)
    spread = float(scores.std()) or 1.0
    for turn in range(_ROUNDS):
        ids = kernels.topk(scores, one, (-price).astype(np.float32), k)
        taken = float(kernels.picked(scores, ids).sum(dtype=np.float64))
        counts = kernels.expert_tokens(ids, n_experts)
        bound = taken - float((price * (counts - share)).sum())
        if bound < best.bound:
            best = Prices(bound, price)
        step = 0.3 * spread * 0.92**turn
        price = price + step * np.clip(counts / share - 1.0, -1.0, 1.0)
    return best


def balanced_assignment(scores: F32, k: int, kernels: Kernels, loads: I64 | None = None) -> I16:
    """Return [T, k] int16 expert ids, best first, of an optimal assignment with ``loads`` [E] (by default even ones).

    scores: [T, E] float32 finite. Raises ValueError if the loads do not sum to T x k or an expert's exceeds T.
    """
    n_tokens, n_experts = scores.shape
    wanted = even_loads(n_tokens, k, n_experts) if loads is None else loads
    if int(wanted.sum()) != n_tokens * k or wanted.max(initial=0) > n_tokens or wanted.min(initial=0) < 0:
        raise ValueError(f"loads must sum to tokens x k = {n_tokens * k} with 0 to {n_tokens} each, found {wanted}")
    if k == n_experts:
        return np.tile(np.arange(n_experts, dtype=np.int16), (n_tokens, 1))
    price = balanced_bound(scores, k, kernels).price
    priced = scores.astype(np.float64) - price
    # Midway between the k-th and the next: a pair far from it is decided, one near it is for the solver.
    edge = np.partition(priced, n_experts - k - 1, axis=1)[:, n_experts - k - 1 : n_experts - k + 1].mean(axis=1)
    margin = priced - edge[:, None]
    width = 0.05 * float(scores.std()) or 1.0
    while True:
        chosen = _solve(scores, margin, width, k, wanted)
        if chosen is not None:
            break
        width *= 3.0
    order = np.argsort(np.where(chosen, -scores, np.inf), axis=1, kind="stable")[:, :k]
    return order.astype(np.int16)


def _solve(scores: F32, margin: F64, width: float, k: int, loads: I64) -> Bool | None:
    """Solve with pairs beyond ``width`` of the edge decided; None if that was wrong (infeasible or not optimal)."""
    n_tokens, n_experts = scores.shape
    chosen: Bool = margin > width
    token, expert = np.nonzero(np.abs(margin) <= width)
    per_token = k - chosen.sum(axis=1)
    per_expert = loads - chosen.sum(axis=0)
    if per_token.min(initial=0) < 0 or per_expert.min(initial=0) < 0:
        return None
    n_pairs = len(token)
    if n_pairs == 0:
        return chosen if not per_token.any() and not per_expert.any() else None
    column = np.arange(n_pairs)
    sums = csr_array(
        (np.ones(2 * n_pairs), (np.r_[token, n_tokens + expert], np.r_[column, column])),
        shape=(n_tokens + n_experts, n_pairs),
    )
    cost = -scores[token, expert].astype(np.float64)
    done = linprog(cost, A_eq=sums, b_eq=np.r_[per_token, per_expert], bounds=(0, 1), method="highs-ds")
    if done.status != 0:
        return None
    # Certificate: under the solver's prices no decided pair would want to change.
    marginal = done.eqlin.marginals
    reduced = -scores.astype(np.float64) - marginal[:n_tokens, None] - marginal[n_tokens:]
    reduced[token, expert] = 0.0
    slack = 1e-7 * max(1.0, float(np.abs(scores).max()))
    if (reduced[chosen] > slack).any() or (reduced[~chosen] < -slack).any():
        return None
    chosen[token, expert] = done.x > 0.5
    return chosen
