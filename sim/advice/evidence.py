"""How sure a gain is: autocorrelation of the batches, and a block bootstrap over them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from sim.rng import stream
from sim.tokens import F64

MIN_TIMES = 50
"""Autocorrelation times that the judged batches must span (the rule of thumb of emcee's documentation)."""
_RESAMPLES = 2000
_LEVEL = 0.95


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def autocorrelation_time(series: F64) -> float:
    """Return the integrated autocorrelation time of ``series`` [n], in samples, at least 1.

    tau = 1 + 2 sum of rho(t) up to the first window M >= 5 tau (Sokal's automatic windowing).

    >>> autocorrelation_time(np.ones(9))
    1.0
    """
    n = len(series)
    centred = series - series.mean()
    variance = float(centred @ centred)
    if n < 2 or variance <= 1e-24 * max(float(series @ series), 1e-300):
        return 1.0
    tau = 1.0
    for lag in range(1, n):
        tau += 2 * float(centred[lag:] @ centred[:-lag]) / variance
        if lag >= 5 * tau:
            break
    return max(1.0, tau)


def ratio(gain: F64, base: F64, seed: int) -> Interval:
    """Return the mean of ``gain`` [n] over the mean of ``base`` [n], with a circular block bootstrap over batches.

    Blocks are as long as the autocorrelation time, and at least n^(1/3) (the rate of the optimal length). Of fewer than two
    blocks there is no interval: NaN.
    """
    n = len(gain)
    length = min(n, max(int(np.ceil(autocorrelation_time(gain))), int(np.ceil(n ** (1 / 3)))))
    mean = float(gain.mean() / base.mean())
    if n < 2 * length:
        return Interval(mean, math.nan, math.nan)
    starts = stream(seed, "advice", "bootstrap").integers(n, size=(_RESAMPLES, -(-n // length)))
    rows = ((starts[..., None] + np.arange(length)) % n).reshape(_RESAMPLES, -1)[:, :n]
    drawn = gain[rows].mean(axis=1) / base[rows].mean(axis=1)
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))
