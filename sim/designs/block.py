"""The ``sweep`` block of a scenario file: what `sim.sweep` varies when the command line says nothing else."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from sim.designs import MAX_POINTS, Design
from sim.designs.grid import Grid
from sim.plugin import Choice


class Range(BaseModel):
    """From ``low`` to ``high``, both included: every ``step`` from ``low`` on, else integers if both are, else all between.
    log: whether equal ratios are equally likely where points are drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    low: int | float
    """Smallest value."""
    high: int | float
    """Largest value."""
    step: Annotated[int | float, Field(gt=0)] | None = None
    """Distance of neighbours; null: 1 between whole numbers, else any number between may be drawn."""
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"high must be at least low = {self.low:g}")
        if self.log and self.low <= 0:
            raise ValueError("low must be > 0 with log")
        if self.log and self.step is not None:
            raise ValueError("step and log exclude each other")
        return self


def _form(value: Any) -> str:
    if isinstance(value, dict | Range):
        return "range"
    return "text" if isinstance(value, str) else "list"


Axes = Annotated[
    Annotated[Range, Tag("range")]
    | Annotated[tuple[Any, ...], Field(min_length=1), Tag("list")]
    | Annotated[str, Tag("text")],
    Discriminator(_form),
]


class SweepBlock(BaseModel):
    """What `sim.sweep` does with the scenario; a run as it stands ignores it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    vary: dict[str, Axes] = {}
    """Values by key (any key of ``--set``): a list, ``{low:, high:}`` with ``step:`` or ``log:``, or text as in ``--vary``
    such as ``1:8``."""
    design: Annotated[Design, Choice(Design)] = Grid()
    points: int | None = Field(default=None, gt=0, le=MAX_POINTS)
    """How many points latin_hypercube and sobol draw."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the points that are drawn, not of the runs."""
