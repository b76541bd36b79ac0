"""How the shares of topics change from train step to train step: switches, linear drifts, random walks, day and night.

Applied in this order: the tree's own weights; `Shift`s by step, each towards the mixture it names; then the log-weights
of all leaves move by `Drift` and `Oscillation`, and the sum is made 1 again. A leaf that a shift sets to 0 stays at 0.
Warm-up batches have the tree's own weights, and drift starts from them at train step 0, so that what was learned in the
warm-up meets no jump. Everything is a pure function of (seed, replica, step): policies see the same mixtures.

The forms are the simulator's own; no measured time series of a serving or training mixture is public.
"""

from __future__ import annotations

import math
import threading
from typing import Annotated, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sim.kernels.elementary import exp, sine_of_turns
from sim.rng import stream
from sim.traffic.topics import Leaf


class Shift(BaseModel):
    """A change of the mixture: a switch (fine-tuning on other data) or, with ``over_steps``, a linear drift."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    step: int = Field(ge=0)
    """Train step at which the change begins."""
    over_steps: int = Field(default=0, ge=0)
    """Steps until it is complete; 0 = at once."""
    weights: dict[str, Annotated[float, Field(ge=0, le=1e9)]]
    """Leaf or group -> weight after the change; a group's is split as its leaves' own weights; others get 0."""

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if not sum(self.weights.values()) > 0:
            raise ValueError("weights must have a positive sum")
        return self

    def after(self, found: list[Leaf]) -> list[float]:
        """Return the leaf probabilities once the change is complete."""
        total = sum(self.weights.values())
        after = [0.0] * len(found)
        for name, weight in self.weights.items():
            chosen = members(name, found)
            whole = sum(found[i].probability for i in chosen)
            for i in chosen:
                after[i] += weight * (found[i].probability / whole) / total
        return after


class Drift(BaseModel):
    """A random walk of every leaf's log-weight that is pulled back to 0 (Ornstein-Uhlenbeck), from 0 at train step 0.

    After t steps the standard deviation is ``sd`` sqrt(1 - exp(-2 t / correlation_steps)).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    sd: float = Field(ge=0, le=5)
    """Standard deviation of a log-weight in the long run; 0.7 = shares vary by a factor of two."""
    correlation_steps: float = Field(ge=0.01, le=1e9)
    """Steps after which the correlation has fallen to 1/e."""


class Oscillation(BaseModel):
    """Day and night: the log-weights of some leaves move by amplitude sin(2 pi (step / period_steps + phase))."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    topics: tuple[str, ...] = Field(min_length=1)
    """Names of leaves or groups."""
    period_steps: float = Field(ge=1, le=1e9)
    """Steps of a whole period."""
    amplitude: float = Field(ge=0, le=5)
    """In log-weight: weights vary between e^-amplitude and e^amplitude."""
    phase: float = Field(default=0.0, ge=-1, le=1)
    """Turns by which these topics are ahead at train step 0."""


def members(name: str, found: list[Leaf]) -> list[int]:
    """Return the positions of the leaf called ``name`` or, if there is none, of the leaves in the group ``name``."""
    return [i for i, leaf in enumerate(found) if leaf.name == name] or [
        i for i, leaf in enumerate(found) if name in leaf.groups
    ]


def check_names(where: str, names: tuple[str, ...], found: list[Leaf]) -> None:
    """Raise ValueError, beginning with ``where``, if one of ``names`` is no leaf or group."""
    for name in names:
        if not members(name, found):
            known = ", ".join(leaf.name for leaf in found[:20]) + (", ..." if len(found) > 20 else "")
            raise ValueError(f"{where}: {name!r} is no leaf of topic_tree ({known})")


def shifted(found: list[Leaf], shifts: tuple[Shift, ...], step: int | None) -> list[float]:
    """Return the leaf probabilities at train ``step`` (None: before any shift); shifts apply in the order of steps."""
    now = [leaf.probability for leaf in found]
    for shift in sorted(shifts, key=lambda shift: shift.step):
        if step is None or step < shift.step:
            break
        done = min(1.0, (step - shift.step) / shift.over_steps) if shift.over_steps else 1.0
        now = [(1 - done) * p + done * q for p, q in zip(now, shift.after(found), strict=True)]
    return now


class Mixture:
    """The shares of ``found`` leaves over time, for one seed and replica. Thread-safe."""

    def __init__(
        self,
        found: list[Leaf],
        shifts: tuple[Shift, ...],
        drift: Drift | None,
        oscillation: tuple[Oscillation, ...],
        seed: int,
        replica: int,
    ) -> None:
        self._leaves, self._shifts, self._drift, self._oscillation = found, shifts, drift, oscillation
        self._moved = [sorted({i for name in wave.topics for i in members(name, found)}) for wave in oscillation]
        self._lock = threading.Lock()
        # One stream per leaf name: another topic's arrival does not change this one's walk.
        self._walks = [stream(seed, "traffic", "drift", leaf.name, replica) for leaf in found] if drift else []
        self._path = [np.zeros(len(found))]

    def at(self, step: int | None) -> list[float]:
        """Return the leaf probabilities at train ``step``; None: in the warm-up."""
        shares = shifted(self._leaves, self._shifts, step)
        if step is None or not (self._drift or self._oscillation):
            return shares
        move = self.walk(step).copy()
        for wave, chosen in zip(self._oscillation, self._moved, strict=True):
            move[chosen] += wave.amplitude * sine_of_turns(step / wave.period_steps + wave.phase)
        weights = [p * factor for p, factor in zip(shares, exp(move - move.max()).tolist(), strict=True)]
        total = sum(weights)
        return [weight / total for weight in weights]

    def walk(self, step: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return the log-weights' walk at train ``step``, [leaves] float64; zeros without drift.

        The path is extended from step 0 and kept: any order of questions gives the same answers.
        """
        if self._drift is None:
            return self._path[0]
        keep = float(exp(-1.0 / self._drift.correlation_steps))
        gain = self._drift.sd * math.sqrt(1.0 - keep * keep)
        with self._lock:
            while len(self._path) <= step:
                normals = np.array([walk.standard_normal() for walk in self._walks])
                self._path.append(keep * self._path[-1] + gain * normals)
            return self._path[step]
