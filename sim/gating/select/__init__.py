"""Which experts a token goes to, given its (biased) scores. One file per rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np

from sim.kernels.choose import Kernels
from sim.model import Model
from sim.plugin import Plugin
from sim.tokens import F32, I16


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a selection rule may look at; it never sees a clock, a device or another token's future.

    scores: [T, E] float32 unbiased affinities. scale, shift: [E] float32; selection ranks ``scores * scale + shift``.
    k: experts per token. kernels: the numeric kernels to use. rng: makes the stream of this (replica, step, layer,
    rank), the same for every policy. recorded: [T, k] int16 choices of a replayed trace, or None.
    """

    scores: F32
    scale: F32
    shift: F32
    k: int
    kernels: Kernels
    rng: Callable[[], np.random.Generator]
    recorded: I16 | None = None


class Select(Plugin):
    """A selection rule."""

    needs: ClassVar[Literal["logits", "ids"]] = "logits"
    """What the traffic has to provide: router logits, or recorded choices."""

    @abstractmethod
    def select(self, candidates: Candidates) -> I16:
        """Return expert ids, [T, k] int16, best first, distinct per token; equal scores go to the lower expert."""

    def for_model(self, model: Model) -> Self:
        """Return a copy whose unset fields hold the model's own values."""
        return self

    def problems(self, model: Model) -> list[tuple[str, str]]:
        """Return ``(field, rule)`` for each setting (of `for_model`'s copy) that ``model`` cannot serve."""
        return []
