"""Points that spread over every axis by itself.

McKay, Beckman & Conover, "A comparison of three methods for selecting values of input variables", Technometrics 21 (1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sim.designs import Axis, Design, counted, drawn, generator


class LatinHypercube(Design):
    """Of N points, one in each Nth part of every axis, at random within it."""

    kind: Literal["latin_hypercube"] = "latin_hypercube"

    def choose(self, axes: Sequence[Axis], points: int | None, seed: int) -> list[tuple[Any, ...]]:
        n = counted(points, self.kind)
        from scipy.stats import qmc

        return drawn(axes, qmc.LatinHypercube(len(axes), rng=generator(seed, self.kind)).random(n))
