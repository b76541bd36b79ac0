"""Clients of ServeGen (alibaba/ServeGen, Apache-2.0): who sends how much, and how irregularly, in every window of a day.

csv: ``client,t_s,rate_rps,family,arg1`` and columns that are not read. In each window of each client, arrivals are a
stationary renewal process of mean rate ``rate_rps`` whose gaps are ``Gamma`` or ``Weibull`` of shape ``arg1``. The fit's
scale is not used: where a client pauses it disagrees with the rate by a factor of two and more, and load is what counts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field
from scipy.special import gamma

from sim.digest import digest
from sim.kernels.elementary import exp, log
from sim.requests._files import content, refuse_first, table
from sim.requests._generated import LONGEST_S, Draw, Generated, check_count
from sim.tokens import F64, I32, I64, Bool
from sim.units import Seconds, to_ps

_LEAST_SHAPE, _MOST_SHAPE = 1e-3, 1e3


class Windows(NamedTuple):
    """What each line of the file says: client [w] int64, start_s, rate_per_s and shape [w] float64, weibull [w] bool."""

    client: I64
    start_s: F64
    rate_per_s: F64
    shape: F64
    weibull: Bool


class ServeGen(Generated):
    """Clients with rates and gaps of their own in every window, drawn anew for every seed and replica.

    Lengths are the scenario's, for the file has none.
    """

    kind: Literal["servegen"] = "servegen"
    path: str = Field(min_length=1)
    """csv, gzip or not."""
    rate_scale: float = Field(default=1.0, ge=1e-3, le=1e3)
    """Plays the file this many times faster: windows and gaps are divided by it."""
    start_s: Seconds = 0.0
    """Where to begin, in the file's own ``t_s``."""
    window_s: float = Field(default=600.0, gt=0, le=86_400)
    """Length of a window."""

    def fingerprint(self) -> str:
        return digest(self.path)

    def windows(self) -> Windows:
        """Return the file's windows. Raises ValueError, one line, naming the file and place of what is wrong."""
        found = table(
            self.path,
            content(self.path),
            {"client": "index", "t_s": "number", "rate_rps": "number", "family": "text", "arg1": "number"},
        )
        family, rate, shape = found["family"], found["rate_rps"], found["arg1"]
        refuse_first(self.path, "rate_rps", rate < 0, rate, "at least 0")
        refuse_first(self.path, "family", ~np.isin(family, ("Gamma", "Weibull")), family, "Gamma or Weibull")
        wrong = (shape < _LEAST_SHAPE) | (shape > _MOST_SHAPE)
        refuse_first(self.path, "arg1", wrong, shape, f"a shape from {_LEAST_SHAPE:g} to {_MOST_SHAPE:g}")
        return Windows(found["client"], found["t_s"], rate, shape, family == "Weibull")

    def expected(self, duration_s: float) -> float:
        windows = self.windows()
        asked = self.start_s <= windows.start_s
        asked &= windows.start_s < self.start_s + duration_s * self.rate_scale
        return float((windows.rate_per_s * self.window_s)[asked].sum())

    def arrive(self, duration_s: float, rng: Draw) -> tuple[I64, I32]:
        windows = self.windows()
        check_count(float((windows.rate_per_s * self.window_s).sum()))
        end_s = float(windows.start_s.max()) + self.window_s
        if not self.start_s < end_s:
            raise ValueError(f"{self.path}: expected windows after start_s = {self.start_s:g}, found none")
        # All windows are drawn whatever is asked for, so that a longer run begins with the same requests.
        window, offset = renewals(windows, self.window_s, rng("arrivals"))
        seconds = (windows.start_s[window] + offset - self.start_s) / self.rate_scale
        kept = (seconds >= 0) & (seconds < min(duration_s, LONGEST_S))
        arrival_ps, window = to_ps(seconds[kept]), window[kept]
        inside = arrival_ps < to_ps(min(duration_s, LONGEST_S))
        arrival_ps, window = arrival_ps[inside], window[inside]
        order = np.argsort(arrival_ps, kind="stable")
        return arrival_ps[order], windows.client[window[order]].astype(np.int32)


def renewals(windows: Windows, window_s: float, rng: np.random.Generator) -> tuple[I64, F64]:
    """Return the window [n] int64 and the place in it [n] float64, in seconds, of every arrival.

    Each window's process is stationary: its first gap is already under way when the window opens.
    """
    total = windows.rate_per_s * window_s
    at = _gaps(windows, np.arange(len(total)), rng, longer=True) * rng.random(len(total))
    parts: list[tuple[I64, F64]] = []
    alive = np.flatnonzero(at < total)
    while len(alive):
        parts.append((alive, at[alive]))
        many = ((total - at)[alive] * 1.1).astype(np.int64) + 8
        window = np.repeat(alive, many)
        upto = np.cumsum(_gaps(windows, window, rng))
        last = np.cumsum(many) - 1
        before = np.concatenate([[0.0], upto[last[:-1]]])
        place = upto - np.repeat(before - at[alive], many)
        at[alive] = place[last]
        place[last] = np.inf  # the next round's first
        inside = place < total[window]
        parts.append((window[inside], place[inside]))
        alive = alive[at[alive] < total[alive]]
    window = np.concatenate([part[0] for part in parts]) if parts else np.zeros(0, dtype=np.int64)
    place = np.concatenate([part[1] for part in parts]) if parts else np.zeros(0)
    return window, place / windows.rate_per_s[window]


def _gaps(windows: Windows, window: I64, rng: np.random.Generator, longer: bool = False) -> F64:
    """Return a gap of mean 1 of each ``window``'s law; ``longer``: of the gap that an instant falls in."""
    shape, weibull = windows.shape[window], windows.weibull[window]
    gap = np.empty(len(window))
    k = shape[~weibull]
    gap[~weibull] = rng.standard_gamma(k + longer) / k
    k = shape[weibull]
    # A Weibull gap is a power of an exponential one, drawn by its length of a gamma one.
    draw = rng.standard_gamma(1 + 1 / k) if longer else rng.standard_exponential(len(k))
    gap[weibull] = exp(log(np.maximum(draw, 1e-300)) / k) / gamma(1 + 1 / k)
    return gap
