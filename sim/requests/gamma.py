"""Gamma renewal arrivals: gaps of a given coefficient of variation, 1 being Poisson."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sim.requests._generated import Draw, Generated, nobody, positions, within
from sim.tokens import I32, I64


class Gamma(Generated):
    """Independent gamma gaps of shape 1 / cv^2.

    Stationary from time 0: the first gap is what is left of one that is already under way (a gap drawn by its length, of
    shape 1 / cv^2 + 1, cut at a uniform place), so that the mean count is rate_per_s x duration at any cv.
    """

    kind: Literal["gamma"] = "gamma"
    rate_per_s: float = Field(gt=0, le=1e6)
    cv: float = Field(ge=0.01, le=100)
    """Standard deviation over mean of the gaps: 1.1 in Azure's conversations of 2023. The 13 of its code completions are a
    few long silences; a gamma law of that cv has nine gaps of ten below a millisecond, and ``bursty`` comes nearer."""

    def expected(self, duration_s: float) -> float:
        return self.rate_per_s * duration_s

    def arrive(self, duration_s: float, rng: Draw) -> tuple[I64, I32]:
        draw, first, shape = rng("arrivals"), rng("first arrival"), self.cv**-2
        under_way = first.standard_gamma(shape + 1) / shape * first.random()
        times = positions(self.rate_per_s * duration_s, under_way, lambda n: draw.standard_gamma(shape, n) / shape)
        return nobody(within(times / self.rate_per_s, duration_s))
