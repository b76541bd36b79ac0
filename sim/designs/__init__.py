"""Which points of a space are tried: plug-ins that turn axes into points. Knows keys and values, no scenarios."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.plugin import Plugin
from sim.rng import stream
from sim.tokens import F64

MAX_POINTS = 10_000
"""Points of one sweep: each is a scenario to check, and a file."""


@dataclass(frozen=True)
class Axis:
    """A key and what it may be: ``values``, or else the range from ``low`` to ``high``.

    log: whether equal ratios are equally likely. whole: whether a range holds integers only.
    """

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def at(self, u: F64) -> list[Any]:
        """Return the values at places ``u`` [n], in [0, 1), of the axis; equal parts of it go to each of its values.

        >>> Axis("k", values=(2, 4, 8)).at(np.array([0.0, 0.4, 0.99]))
        [2, 4, 8]
        >>> Axis("k", low=0.01, high=1.0, log=True).at(np.array([0.0, 0.5]))
        [0.01, 0.1]
        """
        if self.values:
            return [self.values[min(int(x), len(self.values) - 1)] for x in (u * len(self.values)).tolist()]
        low, high = self.low, self.high + self.whole
        found = low * (high / low) ** u if self.log else low + (high - low) * u
        if self.whole:
            return [int(x) for x in np.clip(np.floor(found), self.low, self.high).tolist()]
        return [float(f"{x:.12g}") for x in np.clip(found, self.low, self.high).tolist()]


class Design(Plugin):
    """A rule that chooses points."""

    @abstractmethod
    def choose(self, axes: Sequence[Axis], points: int | None, seed: int) -> list[tuple[Any, ...]]:
        """Return the points to try, each with one value for every axis, in order; no point twice.

        points: how many, for designs that draw them. Raises ValueError that says what to change.
        """


def listed(axis: Axis, kind: str) -> tuple[Any, ...]:
    """Return the values of an axis. Raises ValueError for a range that does not hold integers: it has too many."""
    if axis.values:
        return axis.values
    if axis.whole:
        return tuple(range(int(axis.low), int(axis.low) + limited(int(axis.high - axis.low) + 1)))
    raise ValueError(
        f"{axis.key}: {axis.low:g} to {axis.high:g} is a range without a step: give a step or a list, or draw points "
        f"with --design latin_hypercube or sobol ({kind} takes every value)"
    )


def uncounted(points: int | None, kind: str) -> None:
    """Refuse a number of points where the axes say it."""
    if points is not None:
        raise ValueError(
            f"points = {points}: {kind} has as many points as the axes give; latin_hypercube and sobol draw some"
        )


def counted(points: int | None, kind: str) -> int:
    """Return the number of points to draw. Raises ValueError if there is none, or too many."""
    if points is None or points < 1:
        raise ValueError(f"{kind} draws points: say how many, e.g. --points 32")
    return limited(points)


def limited(points: int) -> int:
    """Return ``points``, refused beyond `MAX_POINTS`."""
    if points > MAX_POINTS:
        raise ValueError(
            f"{points:.10g} points exceed {MAX_POINTS}: give fewer values, draw some of them with --design sobol, or make "
            "several sweeps of it (--name)"
        )
    return points


def drawn(axes: Sequence[Axis], places: F64) -> list[tuple[Any, ...]]:
    """Return the points at ``places`` [n, axes] in [0, 1); those that fall together on few values once."""
    columns = [axis.at(places[:, i]) for i, axis in enumerate(axes)]
    found: dict[str, tuple[Any, ...]] = {}
    for point in zip(*columns, strict=True):
        found.setdefault(repr(point), point)
    return list(found.values())


def generator(seed: int, kind: str) -> np.random.Generator:
    """Return a generator of a named stream that has a seed sequence, without which SciPy's samplers take none."""
    return np.random.default_rng(int(stream(seed, "design", kind).integers(2**63)))


def steps(low: float, high: float, step: float) -> tuple[float, ...]:
    """Return ``low``, ``low + step``, ... up to ``high``, free of the rounding of sums. Raises ValueError for too many.

    >>> steps(0.1, 0.5, 0.1)
    (0.1, 0.2, 0.3, 0.4, 0.5)
    """
    count = limited(math.floor((high - low) / step + 1e-9) + 1)
    return tuple(float(f"{low + i * step:.12g}") for i in range(count))
