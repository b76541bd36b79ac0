"""Who wins, and by how much: pure functions of a metric's values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sim.statistics import paired
from sim.tokens import F64, I64


@dataclass(frozen=True)
class Standing:
    """The winner and the runner-up by number, and what the runner-up is behind: the mean paired difference over replicas, its
    95 % half-width (NaN with one replica), and both as a share of the winner's mean (``ahead``)."""

    winner: int
    runner_up: int
    margin: float
    half_width: float
    ahead: float
    ahead_half_width: float


def standing(values: F64, sign: float) -> Standing:
    """Return the standing of ``values`` [policies, replicas], of which less is better for ``sign`` 1 and more for -1; ties go
    to the lower number."""
    means = sign * values.mean(axis=1)
    first, second = np.argsort(means, kind="stable")[:2].tolist()
    difference = paired(sign * values[second], sign * values[first])
    scale = abs(float(values[first].mean())) or 1.0
    return Standing(
        first, second, difference.mean, difference.half_width, difference.mean / scale, difference.half_width / scale
    )


def winners(values: F64, sign: float) -> I64:
    """Return the winner's number [n] of ``values`` [n, policies, replicas]."""
    found: I64 = np.argmin(sign * values.mean(axis=2), axis=1)
    return found
