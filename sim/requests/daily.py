"""Poisson arrivals whose rate follows the time of day."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from sim.requests._generated import Draw, Generated, nobody, positions, within
from sim.tokens import I32, I64


class Daily(Generated):
    """rate(t) = rate_per_s (1 + (peak_to_mean - 1) cos(2 pi (t / period_s - peak_hour / 24))).

    By thinning: a Poisson process of the peak's rate, of which each request stays with probability rate(t) / peak (Lewis
    and Shedler, 1979). Time 0 is midnight. DeepSeek's online service had 278 nodes at its peak and 226.75 on average, a
    peak_to_mean of 1.23.
    """

    kind: Literal["daily"] = "daily"
    rate_per_s: float = Field(gt=0, le=1e6)
    """Mean over a period."""
    peak_to_mean: float = Field(default=1.23, ge=1, le=2)
    """Rate at the peak over the mean."""
    peak_hour: float = Field(default=15.0, ge=0, lt=24)
    """When the peak is, in 24ths of a period."""
    period_s: float = Field(default=86_400.0, ge=1, le=1e7)
    """Less than a day compresses the day."""

    def expected(self, duration_s: float) -> float:
        return self.rate_per_s * duration_s

    def arrive(self, duration_s: float, rng: Draw) -> tuple[I64, I32]:
        draw = rng("arrivals")
        peak = self.rate_per_s * self.peak_to_mean
        times = positions(peak * duration_s, draw.standard_exponential(), draw.standard_exponential)
        times /= peak
        turns = times / self.period_s - self.peak_hour / 24
        rate = 1 + (self.peak_to_mean - 1) * np.cos(2 * np.pi * turns)
        stays = rng("thinning").random(len(times)) * self.peak_to_mean < rate
        return nobody(within(times[stays], duration_s))
