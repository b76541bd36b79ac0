"""Poisson arrivals whose rate jumps between two values: a two-state Markov-modulated Poisson process."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from sim.requests._generated import Draw, Generated, check_count, nobody, positions, within
from sim.tokens import F64, I32, I64


class Bursty(Generated):
    """Bursts of exponential length with exponential calm between them.

    burst_factor 20, burst_share 0.1 and burst_length_s 10 at 3.2 requests/s come near the counts of Azure's code completions
    of 2023 over 1 to 60 s.

    Over times much longer than a burst, the variance of counts is 1 + 2 r s (1 - s)^2 b (f - 1)^2 / (1 - s + s f)^2 times
    their mean, with rate_per_s r, burst_share s, burst_length_s b and burst_factor f (from Fischer and Meier-Hellstern,
    Performance Evaluation 18, 1993).
    """

    kind: Literal["bursty"] = "bursty"
    rate_per_s: float = Field(gt=0, le=1e6)
    """Mean over bursts and calm."""
    burst_factor: float = Field(default=5.0, ge=1, le=1e6)
    """Rate in a burst over the rate between bursts."""
    burst_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of time in bursts."""
    burst_length_s: float = Field(default=60.0, ge=1e-3, le=1e7)
    """Mean length of a burst."""

    def expected(self, duration_s: float) -> float:
        return self.rate_per_s * duration_s

    def arrive(self, duration_s: float, rng: Draw) -> tuple[I64, I32]:
        times, upto = self._expected(duration_s, rng)
        draw = rng("arrivals")
        total = float(np.interp(duration_s, times, upto))
        points = positions(total, draw.standard_exponential(), draw.standard_exponential)
        return nobody(within(np.interp(points, upto, times), duration_s))

    def _expected(self, duration_s: float, rng: Draw) -> tuple[F64, F64]:
        """Return the times at which the rate jumps, from 0 to beyond ``duration_s``, and the requests expected until then."""
        draw, share = rng("bursts"), self.burst_share
        length = np.array([self.burst_length_s, self.burst_length_s * (1 - share) / share])
        check_count(2 * duration_s / float(length.sum()))
        calm_rate = self.rate_per_s / (1 - share + share * self.burst_factor)
        rate = np.array([calm_rate * self.burst_factor, calm_rate])
        if draw.random() >= share:
            length, rate = length[::-1], rate[::-1]
        stays: list[F64] = [np.zeros((1, 2))]
        spent = 0.0
        while spent <= duration_s:
            pairs = 16 + int((duration_s - spent) / length.sum())
            stays.append(draw.standard_exponential((pairs, 2)) * length)
            spent += float(stays[-1].sum())
        stay = np.concatenate(stays)
        return np.cumsum(stay), np.cumsum(stay * rate)
