"""Poisson arrivals: independent exponential gaps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sim.requests._generated import Draw, Generated, nobody, positions, within
from sim.tokens import I32, I64


class Poisson(Generated):
    """Requests that know nothing of each other."""

    kind: Literal["poisson"] = "poisson"
    rate_per_s: float = Field(gt=0, le=1e6)

    def expected(self, duration_s: float) -> float:
        return self.rate_per_s * duration_s

    def arrive(self, duration_s: float, rng: Draw) -> tuple[I64, I32]:
        draw = rng("arrivals")
        times = positions(self.rate_per_s * duration_s, draw.standard_exponential(), draw.standard_exponential)
        return nobody(within(times / self.rate_per_s, duration_s))
