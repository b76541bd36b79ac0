"""Interpolation in measured tables: times over two positive axes, of which one need not be measured on a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from sim.tokens import F64

Law = Callable[[F64, F64], F64]
"""Seconds of a law at (outer, inner), arrays of one shape: how a table is continued past its ends."""


@dataclass(frozen=True, eq=False, slots=True)
class Curves:
    """One measured curve of seconds over an ``inner`` axis for each value of an ``outer`` one.

    outer: [c], ascending. inner, seconds: c arrays each, ascending and positive.
    """

    outer: F64
    inner: tuple[F64, ...]
    seconds: tuple[F64, ...]

    @classmethod
    def of(cls, rows: Iterable[tuple[float, float, float]]) -> Curves:
        """Build from (outer, inner, seconds); of rows at one point the quickest counts."""
        best: dict[float, dict[float, float]] = {}
        for outer, inner, seconds in rows:
            curve = best.setdefault(float(outer), {})
            curve[float(inner)] = min(seconds, curve.get(float(inner), np.inf))
        keys = sorted(best)
        curves = [sorted(best[key].items()) for key in keys]
        return cls(
            np.array(keys),
            tuple(np.array([point for point, _ in curve]) for curve in curves),
            tuple(np.array([seconds for _, seconds in curve]) for curve in curves),
        )

    def at(self, outer: F64, inner: F64, law: Law) -> F64:
        """Return seconds at (outer, inner): log-log linear between the points, equal to them there, so monotone between
        two points. Past an end the last point is scaled by the ratio of ``law`` there and here."""
        outer, inner = np.broadcast_arrays(np.asarray(outer, np.float64), np.asarray(inner, np.float64))
        shape, outer, inner = outer.shape, outer.ravel(), inner.ravel()
        held = np.clip(outer, self.outer[0], self.outer[-1])
        above = np.searchsorted(self.outer, held, side="left")
        below = np.where(self.outer[above] > held, above - 1, above)
        logs = np.zeros((2, held.size))
        for place, (key, points, seconds) in enumerate(zip(self.outer, self.inner, self.seconds, strict=True)):
            for side, chosen in enumerate((below, above)):
                here = chosen == place
                if not here.any():
                    continue
                wanted = inner[here]
                inside = np.clip(wanted, points[0], points[-1])
                found = np.interp(np.log(inside), np.log(points), np.log(seconds))
                past = inside != wanted
                if past.any():
                    same = np.full(int(past.sum()), key)
                    found[past] += np.log(law(same, wanted[past]) / law(same, inside[past]))
                logs[side][here] = found
        low, high = np.log(self.outer[below]), np.log(self.outer[above])
        weight = np.divide(np.log(held) - low, high - low, out=np.zeros(held.shape), where=high > low)
        result: F64 = np.exp(logs[0] + weight * (logs[1] - logs[0]))
        moved = held != outer
        if moved.any():
            result[moved] *= law(outer[moved], inner[moved]) / law(held[moved], inner[moved])
        return result.reshape(shape)
