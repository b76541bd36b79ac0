"""What users and operators of a serving system ask for: pure functions of arrays, times in seconds unless said."""

from __future__ import annotations

import math

import numpy as np

from sim.tokens import F64, I64, Bool

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def spread(values: F64) -> dict[str, float]:
    """Return {mean, p50, p90, p99} of ``values`` [n], linear between order statistics; NaN for none.

    >>> spread(np.array([1.0, 2.0, 3.0]))["p50"]
    2.0
    """
    if not len(values):
        return dict.fromkeys(("mean", *QUANTILES), math.nan)
    found = np.quantile(values, list(QUANTILES.values())).tolist()
    return {"mean": float(values.mean()), **dict(zip(QUANTILES, found, strict=True))}


def weighted_spread(values: F64, weights: F64) -> dict[str, float]:
    """As `spread`, of values [n] that occur ``weights`` [n] times (equal values are added up; weights may be negative to
    take back some of them). A quantile q is the smallest value that at least a share q does not exceed.

    >>> weighted_spread(np.array([1.0, 9.0, 9.0]), np.array([99.0, 2.0, -1.0]))
    {'mean': 1.08, 'p50': 1.0, 'p90': 1.0, 'p99': 1.0}
    """
    distinct, at = np.unique(values, return_inverse=True)
    mass = np.bincount(at, weights=weights, minlength=len(distinct))
    total = mass.sum()
    if not total > 0:
        return dict.fromkeys(("mean", *QUANTILES), math.nan)
    reached = np.cumsum(mass) / total
    places = np.minimum(np.searchsorted(reached, list(QUANTILES.values()), side="left"), len(distinct) - 1)
    found = dict(zip(QUANTILES, distinct[places].tolist(), strict=True))
    return {"mean": float((distinct * mass).sum() / total), **found}


def tpot_s(first_s: F64, end_s: F64, output_tokens: I64) -> F64:
    """Return [n] time per output token after the first; NaN for requests of one token."""
    more = output_tokens - 1
    found: F64 = np.where(more > 0, (end_s - first_s) / np.maximum(more, 1), np.nan)
    return found


def meets(ttft_s: F64, tpot_s: F64, e2e_s: F64, limits: tuple[float | None, float | None, float | None]) -> Bool:
    """Return [n] whether a request keeps all ``limits`` (TTFT, TPOT, end to end) that are set; no TPOT (NaN) keeps any."""
    kept = np.ones(len(ttft_s), dtype=bool)
    for values, limit in zip((ttft_s, tpot_s, e2e_s), limits, strict=True):
        if limit is not None:
            kept &= ~(values > limit)
    return kept


def within(start_ps: I64, end_ps: I64, begin_ps: int, until_ps: int) -> I64:
    """Return [n] picoseconds of each interval that lie in [begin_ps, until_ps]."""
    found: I64 = np.maximum(np.minimum(end_ps, until_ps) - np.maximum(start_ps, begin_ps), 0)
    return found


def binned(start_ps: I64, end_ps: I64, rate: F64, edges_ps: I64) -> F64:
    """Return [bins] the integral over each bin of a quantity that is ``rate`` [n] during each of n intervals, which follow
    one another without overlap, and 0 between.

    >>> binned(np.array([0, 4]), np.array([2, 8]), np.array([1.0, 3.0]), np.array([0, 4, 8])).tolist()
    [2.0, 12.0]
    """
    if not len(start_ps):
        return np.zeros(len(edges_ps) - 1)
    times = np.stack([start_ps, end_ps], axis=1).ravel().astype(np.float64)
    grown = np.cumsum(rate * (end_ps - start_ps))
    sums = np.stack([np.concatenate(([0.0], grown[:-1])), grown], axis=1).ravel()
    found: F64 = np.diff(np.interp(edges_ps.astype(np.float64), times, sums))
    return found


def usd_per_million(tokens: float, device_hours: float, price_per_hour: float | None) -> float:
    """Return dollars per million tokens; NaN without a price or tokens."""
    if price_per_hour is None or not tokens > 0:
        return math.nan
    return device_hours * price_per_hour / tokens * 1e6
