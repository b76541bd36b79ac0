"""How a balancing controller behaves over steps: when it has settled, how much it ripples, which experts change places."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_WINDOW = 10
MIN_STEPS = 4 * _WINDOW
"""Fewer steps say nothing about a controller."""


def settling_step(max_vio: npt.ArrayLike) -> float:
    """Return the first step from which the ten-step mean of ``max_vio`` [S] stays within a factor 1.25 of its final level.

    The final level is the mean of the last quarter. NaN for fewer than 40 steps, or if the series is still moving: if its
    last two eighths differ by more than a tenth, or its mean leaves the band in the last quarter.

    >>> settling_step([2.0] * 30 + [0.1] * 90)
    30.0
    >>> settling_step([0.1 + 0.01 * step for step in range(200)])
    nan
    """
    series = np.asarray(max_vio, dtype=np.float64)
    if len(series) < MIN_STEPS:
        return math.nan
    eighth = len(series) // 8
    before, after = series[-2 * eighth : -eighth].mean(), series[-eighth:].mean()
    if max(before, after) > 1.1 * min(before, after):
        return math.nan
    level = series[-(len(series) // 4) :].mean()
    means = np.convolve(series, np.full(_WINDOW, 1.0 / _WINDOW), mode="valid")
    outside = np.flatnonzero((means > 1.25 * level) | (means < level / 1.25))
    if len(outside) == 0:
        return 0.0
    return float(outside[-1] + 1) if outside[-1] < len(series) - len(series) // 4 else math.nan


def ripple(max_vio: npt.ArrayLike) -> float:
    """Return the standard deviation of ``max_vio`` [S] over its last quarter; NaN for fewer than 40 steps."""
    series = np.asarray(max_vio, dtype=np.float64)
    return float(series[-(len(series) // 4) :].std()) if len(series) >= MIN_STEPS else math.nan


def churn(loads: npt.ArrayLike) -> float:
    """Return the mean share of the hottest eighth of experts that were not so in the step before; NaN for one step.

    loads: [S, E]. Equal loads rank by index. 1 - 1/8 = 0.875 would be chance.

    >>> churn([[9, 1, 1, 1, 1, 1, 1, 1], [9, 1, 1, 1, 1, 1, 1, 1], [1, 9, 1, 1, 1, 1, 1, 1]])
    0.5
    """
    load = np.asarray(loads)
    n_hot = max(1, load.shape[1] // 8)
    if len(load) < 2:
        return math.nan
    hot = np.zeros(load.shape, dtype=bool)
    np.put_along_axis(hot, np.argsort(-load, axis=1, kind="stable")[:, :n_hot], True, axis=1)
    return float(1.0 - (hot[1:] & hot[:-1]).sum(axis=1).mean() / n_hot)
