"""Published and measured figures beside ours. One module per group; its ``figures`` function is its registration.

A figure that misses its bar stays in the table, with the reason where it is known. Rows that a constant of the simulator
was set on are marked ``calibration``: they show that the constant is right, not that the model is. Rows that follow by arithmetic
from published figures or from another row are ``derived``. Neither counts as a prediction.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Figure:
    """One row.

    source: paper, section, table or row. published, ours: in ``unit``. bar: largest accepted relative error, or absolute
    one (``absolute``); for ``at_most`` and ``at_least`` rows how far ours may stand on the wrong side. kind: see above.
    reason: why it misses, or what else a reader must know.
    """

    name: str
    source: str
    published: float
    ours: float
    bar: float
    unit: str = ""
    absolute: bool = False
    relation: Literal["equal", "at_most", "at_least"] = "equal"
    kind: Literal["prediction", "calibration", "derived"] = "prediction"
    reason: str = ""

    @property
    def error(self) -> float:
        """Ours against the published value: relative, or the difference for ``absolute`` rows."""
        gap = self.ours - self.published
        return gap if self.absolute or self.published == 0 else gap / abs(self.published)

    @property
    def passed(self) -> bool:
        if math.isnan(self.ours):
            return False
        wrong = {"equal": abs(self.error), "at_most": self.error, "at_least": -self.error}[self.relation]
        return wrong <= self.bar


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where the groups find things. scenarios: the folder of the shipped scenario files. data: recorded traces, or None:
    rows that need them are then left out."""

    scenarios: Path
    data: Path | None = None


def groups() -> dict[str, Callable[[Inputs], Iterator[Figure]]]:
    """Return each group's ``figures`` by name: the modules of this folder."""
    found = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        found[info.name] = importlib.import_module(f"{__name__}.{info.name}").figures
    return found
