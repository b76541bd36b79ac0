"""All requests present at the start: what a throughput benchmark sends."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from sim.requests import MAX_REQUESTS
from sim.requests._generated import Draw, Generated, nobody
from sim.tokens import I32, I64


class Saturated(Generated):
    """``count`` requests at time 0; the units' own limits decide how many run at a time."""

    kind: Literal["saturated"] = "saturated"
    count: int = Field(gt=0, le=MAX_REQUESTS)
    """Requests present at the start."""

    def expected(self, duration_s: float) -> float:
        return float(self.count)

    def arrive(self, duration_s: float, rng: Draw) -> tuple[I64, I32]:
        return nobody(np.zeros(self.count, dtype=np.int64))
