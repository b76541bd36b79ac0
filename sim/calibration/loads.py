"""The tokens of each of rank 0's experts behind a row of an aiconfigurator MoE table.

``balanced``: token t takes the experts t + i*ceil(E/k), spread evenly where there are fewer tokens than that stride.
``power_law_A``: loads by inverse CDF from p(x) ~ x^-A on [1, 0.8 T] (T k > E) or [0.01, 2], rescaled to T k, rounded,
clipped at T; the hottest rank is measured. One draw stands behind each row, so ours are several, for an expectation.
"""

from __future__ import annotations

import math

import numpy as np

from sim.tokens import F64


def balanced(num_tokens: int, num_experts: int, topk: int, ep_size: int) -> F64:
    """Return rank 0's loads [E / ep_size]."""
    stride = math.ceil(num_experts / topk)
    token, choice = np.arange(num_tokens)[:, None], np.arange(topk)[None, :]
    place = token if num_tokens >= stride else token * stride / num_tokens
    ids = np.floor(place + choice * stride).astype(np.int64) % num_experts
    return np.bincount(ids.ravel(), minlength=num_experts)[: num_experts // ep_size].astype(np.float64)


def power_law(
    num_tokens: int, num_experts: int, topk: int, ep_size: int, alpha: float, draws: int, rng: np.random.Generator
) -> F64:
    """Return the hottest rank's loads in each of ``draws`` draws, [draws, E / ep_size]; ``alpha`` must not be 1."""
    pairs = num_tokens * topk
    low, high = (1.0, 0.8 * num_tokens) if pairs > num_experts else (0.01, 2.0)
    share = rng.random((draws, num_experts))
    if alpha == 1:
        x = low * (high / low) ** share
    else:
        ends = low ** (1 - alpha), high ** (1 - alpha)
        x = (ends[0] + (ends[1] - ends[0]) * share) ** (1 / (1 - alpha))
    loads = np.minimum(np.round(x / x.sum(axis=1, keepdims=True) * pairs), num_tokens)
    for row, drawn in zip(loads, x, strict=True):
        _settle(row, drawn, pairs, num_tokens)
    ranks = loads.reshape(draws, ep_size, -1)
    hottest: F64 = ranks[np.arange(draws), ranks.sum(axis=2).argmax(axis=1)]
    return hottest


def _settle(loads: F64, drawn: F64, pairs: int, limit: int) -> None:
    """Bring the sum to ``pairs`` in place, one pair each in turn: what lacks goes to the hottest experts below the limit,
    what is over comes from the coldest. Of equal loads the larger draw is the hotter; its index would put them side by
    side on one rank."""
    order = np.argsort(-drawn, kind="stable")
    while (gap := int(pairs - loads.sum())) != 0:
        able = order[loads[order] < limit] if gap > 0 else order[::-1][loads[order[::-1]] > 0]
        loads[able[: abs(gap)]] += np.sign(gap)
