"""Points of a Sobol' sequence, which fill the space evenly in all axes at once.

Sobol', USSR Comput. Math. Math. Phys. 7 (1967); scrambled as in Owen, J. Complexity 14 (1998).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sim.designs import Axis, Design, counted, drawn, generator


class Sobol(Design):
    """The first 2^m points of a scrambled Sobol' sequence: any half, quarter, ... of an axis has its share of them."""

    kind: Literal["sobol"] = "sobol"

    def choose(self, axes: Sequence[Axis], points: int | None, seed: int) -> list[tuple[Any, ...]]:
        n = counted(points, self.kind)
        if n & (n - 1):
            below = 1 << n.bit_length() - 1
            raise ValueError(f"points = {n}: sobol is even for powers of two only: {below} or {2 * below}")
        from scipy.stats import qmc

        sequence = qmc.Sobol(len(axes), scramble=True, rng=generator(seed, self.kind))
        return drawn(axes, sequence.random_base2(n.bit_length() - 1))
