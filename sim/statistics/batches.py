"""The mean of one long run: its warm-up cut off, an interval by batch means, or a refusal that says what is missing."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from sim.statistics.autocorrelation import autocorrelation_time
from sim.statistics.intervals import t_quantile, variance
from sim.tokens import F64

MIN_TIMES = 50
"""Autocorrelation times that a series must span before its mean gets an interval (the rule of thumb of emcee's
documentation, which also refuses with the number)."""
_BATCH = 5  # of MSER-5
_FEWEST, _MOST = 10, 30  # batches of an interval (Schmeiser, Operations Research 30, 1982)


class NotEnough(ValueError):
    """A series too short for an interval. times: autocorrelation times that it spans. needed: samples that would do, 0
    where nobody can tell since it never settles."""

    def __init__(self, why: str, times: float, samples: int, needed: int) -> None:
        super().__init__(why)
        self.times, self.samples, self.needed = times, samples, needed


class Steady(NamedTuple):
    """A mean with its 95 % half-width. warm_up: samples cut off. times: autocorrelation times in the ``samples`` left."""

    mean: float
    half_width: float
    samples: int
    warm_up: int
    times: float


def warm_up(series: F64) -> int:
    """Return how many first samples of ``series`` [n] to leave out, by MSER-5: of all cuts between batches of five the one
    after which the squared standard error of the remaining batches' mean is least (White, Cobb and Spratt, A comparison of
    five steady-state truncation heuristics for simulation, WSC 2000).

    The last five batches are no candidates, since so few agree by chance. Raises NotEnough where the best cut lies in the
    second half: such a run has not settled. A series of fewer than ten batches is left whole.

    >>> warm_up(np.concatenate([np.full(20, 9.0), np.tile([1.0, 2.0], 100)]))
    20
    """
    n = len(series) // _BATCH
    if n < 2 * _BATCH:
        return 0
    means = series[: n * _BATCH].reshape(n, _BATCH).mean(axis=1)
    means = means - means.mean()
    left = np.arange(n, 0, -1)
    sums, squares = (np.cumsum(values[::-1])[::-1] for values in (means, means * means))
    error = ((squares - sums * sums / left) / left**2)[: n - _BATCH]
    cut = int(np.argmin(np.maximum(error, 0.0)))
    if cut > n // 2:
        raise NotEnough(
            f"still settling: warm-up seems to last beyond {cut * _BATCH} of {len(series)}", 0.0, len(series), 0
        )
    return cut * _BATCH


def batch_means(series: F64, unit: str = "samples") -> Steady:
    """Return the mean of ``series`` [n] of a run that has settled, with its interval over 10 to 30 batches of at least five
    autocorrelation times. Raises NotEnough below `MIN_TIMES` of these; ``unit`` is what its text counts.

    Of two estimates of the mean's variance the larger counts: that of the batches, and the samples' times tau / n. Either
    alone covers too seldom near the limit, where a tau that came out small lets a series pass.
    """
    n, tau = len(series), autocorrelation_time(series)
    if n < MIN_TIMES * tau:
        needed = math.ceil(MIN_TIMES * tau)
        raise NotEnough(
            f"{n / tau:.3g} autocorrelation times in {n} {unit}, {MIN_TIMES} needed: about {needed} {unit}",
            n / tau, n, needed,
        )  # fmt: skip
    batches = min(_MOST, max(_FEWEST, int(n / (_BATCH * tau))))
    length = n // batches
    means = series[n - batches * length :].reshape(batches, length).mean(axis=1)
    error = math.sqrt(max(variance(means) / batches, variance(series) * tau / n))
    return Steady(float(series.mean()), t_quantile(batches - 1) * error, n, 0, n / tau)


def steady(series: F64, unit: str = "samples") -> Steady:
    """Return `batch_means` of what `warm_up` leaves of ``series`` [n]; raises NotEnough."""
    cut = warm_up(series)
    return batch_means(series[cut:], unit)._replace(warm_up=cut)
