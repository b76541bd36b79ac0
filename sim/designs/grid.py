"""Every combination of the axes' values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

from sim.designs import Axis, Design, limited, listed, uncounted


class Grid(Design):
    """Every combination of the axes' values, the last axis fastest."""

    kind: Literal["grid"] = "grid"

    def choose(self, axes: Sequence[Axis], points: int | None, seed: int) -> list[tuple[Any, ...]]:
        """
        >>> Grid().choose([Axis("a", (1, 2)), Axis("b", ("x", "y"))], None, 0)
        [(1, 'x'), (1, 'y'), (2, 'x'), (2, 'y')]
        """
        uncounted(points, self.kind)
        values = [listed(axis, self.kind) for axis in axes]
        limited(math.prod(map(len, values)))
        return list(itertools.product(*values))
