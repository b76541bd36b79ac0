"""Who wins, and by how much: pure functions of a metric's values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sim.statistics import paired
from sim.tokens import F64, I64

NOBODY = -1
"""Number of the winner where no policy has a value."""


@dataclass(frozen=True)
class Standing:
    """The winner and the runner-up by number, and what the runner-up is behind: the mean paired difference over replicas, its
    95 % half-width (NaN with one replica), and both as a share of the winner's mean (``ahead``).

    A policy without a value (NaN in any replica) is last: the one before it is ahead by infinity. Where none has one, the
    winner and the runner-up are `NOBODY`.
    """

    winner: int
    runner_up: int
    margin: float
    half_width: float
    ahead: float
    ahead_half_width: float


def standing(values: F64, sign: float) -> Standing:
    """Return the standing of ``values`` [policies, replicas], of which less is better for ``sign`` 1 and more for -1; ties go
    to the lower number."""
    means = _losses(values, sign)
    first, second = np.argsort(means, kind="stable")[:2].tolist()
    if np.isnan(values[first]).any():
        return Standing(NOBODY, NOBODY, math.nan, math.nan, math.nan, math.nan)
    if np.isnan(values[second]).any():
        return Standing(first, second, math.inf, math.nan, math.inf, math.nan)
    difference = paired(sign * values[second], sign * values[first])
    scale = abs(float(values[first].mean())) or 1.0
    return Standing(
        first, second, difference.mean, difference.half_width, difference.mean / scale, difference.half_width / scale
    )


def winners(values: F64, sign: float) -> I64:
    """Return the winner's number [n] of ``values`` [n, policies, replicas], `NOBODY` where no policy has a value."""
    dead = np.all(np.isnan(values).any(axis=2), axis=1)
    found: I64 = np.where(dead, NOBODY, np.argmin(_losses(values, sign), axis=1))
    return found


def _losses(values: F64, sign: float) -> F64:
    """Means over replicas [...] of which less is better; infinite where there is no value."""
    means = sign * values.mean(axis=-1)
    found: F64 = np.where(np.isnan(means), np.inf, means)
    return found
