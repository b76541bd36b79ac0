"""The axes side by side: the first values of all, then the second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sim.designs import Axis, Design, limited, listed, uncounted


class List(Design):
    """Axes of one length, taken together: the n-th point has the n-th value of each."""

    kind: Literal["list"] = "list"

    def choose(self, axes: Sequence[Axis], points: int | None, seed: int) -> list[tuple[Any, ...]]:
        """
        >>> List().choose([Axis("a", (1, 2)), Axis("b", ("x", "y"))], None, 0)
        [(1, 'x'), (2, 'y')]
        """
        uncounted(points, self.kind)
        values = [listed(axis, self.kind) for axis in axes]
        if len({len(column) for column in values}) > 1:
            lengths = ", ".join(f"{axis.key} has {len(column)}" for axis, column in zip(axes, values, strict=True))
            raise ValueError(f"list takes the axes side by side, so they need one length: {lengths}")
        limited(len(values[0]))
        return list(zip(*values, strict=True))
