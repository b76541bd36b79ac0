"""Balanced assignment: the largest sum of scores when every expert gets its share of the tokens.

A transportation problem: maximise sum s[t, e] x[t, e] with k experts per token and a given load per expert, 0 <= x <= 1.
Its prices (the duals of the loads) are the ideal bias of loss-free balancing (arXiv 2512.03915 reads that rule as one
primal-dual step per iteration). Any prices bound the optimum from above; good ones leave only few pairs per token open,
which HiGHS solves; pairs that its prices show to be decided wrongly are opened in turn, until none is: then the choice is
optimal. Which of several optima is found may depend on the version of HiGHS.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.kernels.choose import Kernels
from sim.rng import stream
from sim.tokens import F32, F64, I16, I64, Bool

_ROUNDS = 60
_OPEN_PER_TOKEN = 3
_OPEN_MORE = 2
_PENALTY = 10.0  # of a missing or a surplus pair, for scores in 0..1
_TOLERANCE = 2e-7  # twice the solver's own
_TIE_BREAK = 1e-5  # of the scores' range: so much may a pair's score be off in the optimum that is found


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
    every b; the best of 60 rounds of a shrinking subgradient step is returned. Where E does not divide T k, perfectly
    balanced loads differ by one, and the r = T k mod E dearest experts may have the larger ones.
    """
    n_tokens, n_experts = scores.shape
    share = n_tokens * k / n_experts
    price, best = np.zeros(n_experts), Prices(np.inf, np.zeros(n_experts))
    spread, more = float(scores.std(dtype=np.float64)) or 1.0, n_tokens * k % n_experts
    for turn in range(_ROUNDS):
        bound, counts = _dual(scores, price, k, kernels)
        bound += float(np.sort(price)[n_experts - more :].sum() - more * price.mean())
        if bound < best.bound:
            best = Prices(bound, price)
        step = 0.3 * spread * 0.92**turn
        price = price + step * np.clip(counts / share - 1.0, -1.0, 1.0)
    return best


def _dual(scores: F32, price: F64, k: int, kernels: Kernels) -> tuple[float, I64]:
    """Return D(price) and the [E] loads of the choice that attains it."""
    n_tokens, n_experts = scores.shape
    ids = kernels.topk(scores, np.ones(n_experts, np.float32), (-price).astype(np.float32), k)
    counts = kernels.expert_tokens(ids, n_experts)
    taken = float(kernels.picked(scores, ids).sum(dtype=np.float64))
    return taken - float((price * (counts - n_tokens * k / n_experts)).sum()), counts


def balanced_share(scores: F32, k: int, kernels: Kernels) -> float:
    """Return how much of the unrestricted top-k's affinity a perfectly balanced choice can keep, at most; of a large
    batch of which ``scores`` [T, E] float32 is a sample.

    Prices are found on every other token and judged on those between: a sample balanced by itself would be asked to even
    out its own chance as well, which the batch does not have. 2 x 2048 tokens, top-8 of 256 sigmoid scores, give the
    bound of 32k tokens to 0.0003; for top-1 and top-2 of softmax scores it is up to 0.012 too high and varies by 0.005.

    >>> from sim.kernels import plain
    >>> balanced_share(np.tile(np.array([[3.0, 1.0], [2.0, 1.5]], np.float32).repeat(2, axis=0), (9, 1)), 1, plain)
    0.9
    """
    found, judged = scores[0::2], scores[1::2]
    price = balanced_bound(found, k, kernels).price
    best, _ = _dual(judged, np.zeros_like(price), k, kernels)
    return min(1.0, _dual(judged, price, k, kernels)[0] / best) if best > 0 else 1.0


def balanced_assignment(scores: F32, k: int, kernels: Kernels, loads: I64 | None = None) -> I16:
    """Return [T, k] int16 expert ids, best first, of an optimal assignment with ``loads`` [E] (by default even ones).

    Optimal to within 1e-5 of the scores' range per pair, by which ties are broken.
    scores: [T, E] float32 finite. Raises ValueError if the loads do not sum to T x k or an expert's exceeds T.
    """
    n_tokens, n_experts = scores.shape
    wanted = even_loads(n_tokens, k, n_experts) if loads is None else loads
    if int(wanted.sum()) != n_tokens * k or wanted.max(initial=0) > n_tokens or wanted.min(initial=0) < 0:
        raise ValueError(f"loads must sum to tokens x k = {n_tokens * k} with 0 to {n_tokens} each, found {wanted}")
    if k == n_experts or n_tokens == 0:
        return np.tile(np.arange(n_experts, dtype=np.int16), (n_tokens, 1))[:, :k]
    exact = scores.astype(np.float64)
    exact = (exact - exact.min()) / (float(np.ptp(exact)) or 1.0)  # the solver's tolerances are absolute
    # Ties make the program slow by orders of magnitude, and saturated scores are full of them.
    exact += _TIE_BREAK * stream(0, "assignment", "ties").random(exact.shape)
    priced = exact - balanced_bound(exact.astype(np.float32), k, kernels).price
    best = np.argsort(-priced, axis=1, kind="stable")
    likely: Bool = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(likely, best[:, :k], True, axis=1)
    # Midway between the k-th and the next: pairs far from it are decided, the nearest ones are for the solver.
    edge = np.take_along_axis(priced, best[:, k - 1 : k + 1], axis=1).mean(axis=1, keepdims=True)
    open_: Bool = np.zeros(scores.shape, dtype=bool)
    near = np.argsort(np.abs(priced - edge), axis=1, kind="stable")[:, :_OPEN_PER_TOKEN]
    np.put_along_axis(open_, near, True, axis=1)
    while True:
        chosen, wrong = _solve(exact, likely & ~open_, open_, k, wanted)
        if not wrong.any():
            break
        # The most wrong first: a program of all of them is far slower than a few more rounds.
        worst = np.argsort(-wrong, axis=1, kind="stable")[:, :_OPEN_MORE]
        more = np.take_along_axis(open_, worst, axis=1) | (np.take_along_axis(wrong, worst, axis=1) > 0)
        np.put_along_axis(open_, worst, more, axis=1)
    order = np.argsort(np.where(chosen, -scores, np.inf), axis=1, kind="stable")[:, :k]
    return order.astype(np.int16)


def _solve(scores: F64, decided: Bool, open_: Bool, k: int, loads: I64) -> tuple[Bool, F64]:
    """Solve for ``scores`` [T, E] in 0..1 with only the ``open_`` pairs free, those ``decided`` chosen and no others.

    Return [T, E] chosen, and wrong: by how much a pair that was not open would gain from a change under the solver's
    prices; all 0 = optimal.

    Shortage and surplus of an expert are allowed at a price that no score can pay, so that a solution always exists; its
    prices then show which pairs to open.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csc_array

    n_tokens, n_experts = scores.shape
    token, expert = np.nonzero(open_)
    n, pair, experts = len(token), np.arange(len(token)), np.arange(n_experts)
    rows = np.r_[token, n_tokens + expert, n_tokens + experts, n_tokens + experts]
    columns = np.r_[pair, pair, n + experts, n + n_experts + experts]
    ones = np.ones(n_experts)
    sums: Any = csc_array(
        (np.r_[np.ones(2 * n), ones, -ones], (rows, columns)), shape=(n_tokens + n_experts, n + 2 * n_experts)
    )
    done = linprog(
        np.r_[-scores[token, expert], np.full(2 * n_experts, _PENALTY)],
        A_eq=sums,
        b_eq=np.r_[k - decided.sum(axis=1), loads - decided.sum(axis=0)].astype(np.float64),
        bounds=np.c_[np.zeros(n + 2 * n_experts), np.r_[np.ones(n), np.full(2 * n_experts, np.inf)]],
        method="highs-ds",
    )
    if done.status != 0 or done.x is None:
        raise RuntimeError(f"the assignment's linear program failed: {done.message}")
    price = done.eqlin.marginals
    reduced = -scores - price[:n_tokens, None] - price[n_tokens:]
    by = np.where(decided, reduced, -reduced)
    wrong = np.where(~open_ & (by > _TOLERANCE), by, 0.0)
    if done.x[n:].sum() > 0.5 and not wrong.any():
        raise RuntimeError("the assignment's linear program found no pairs to balance its loads with")
    chosen = decided.copy()
    chosen[token, expert] = done.x[:n] > 0.5
    return chosen, wrong
