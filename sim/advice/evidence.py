"""How sure a gain is: a block bootstrap over batches, in blocks of their autocorrelation time."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from sim.rng import stream
from sim.statistics import autocorrelation_time
from sim.tokens import F64

_RESAMPLES = 2000
_LEVEL = 0.95


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


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
