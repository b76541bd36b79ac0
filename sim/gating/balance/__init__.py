"""How a gate keeps experts evenly loaded: a state per layer, read by selection and updated once per step."""

from __future__ import annotations

from abc import abstractmethod

from sim.plugin import Plugin
from sim.tokens import F64, I64


class Balance(Plugin):
    """A balancing rule with a state of float64 [E] per layer.

    A step selects with the state as it stood before the step (causality); the counts it produced update the state after.
    """

    @abstractmethod
    def start(self, n_routed_experts: int) -> F64:
        """Return the state before the first step, [E]."""

    @abstractmethod
    def adjust(self, state: F64) -> tuple[F64 | float, F64 | float]:
        """Return ``(scale, shift)``, each [E] or a number: selection ranks ``score * scale + shift``."""

    @abstractmethod
    def update(self, state: F64, counts: I64, step: int, gain: float = 1.0) -> F64:
        """Return the state after a step.

        counts: [M, P, E] int64, tokens per micro-batch, source rank and expert. step: from 0. gain: multiplies the
        update rate while the controllers are warmed up, 1 otherwise.
        """
