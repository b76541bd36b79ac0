"""How a gate keeps experts evenly loaded: a state per layer, read by the router and updated once per step."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sim.gating.piece import GateShape, Piece
from sim.gating.score import Score
from sim.tokens import F32, F64, I16, I32, I64

Scope = Literal["sequence", "micro_batch", "ep_group", "global_batch"]
"""Over which tokens a load is counted: one sequence; one rank's micro-batch; one micro-batch on all ranks of the EP group;
all ranks and micro-batches of the step. Groups are averaged."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Some tokens of one rank's micro-batch, evenly spaced, as the router saw them (S tokens).

    part, rank: micro-batch and source rank. logits, scores: [S, E] float32, offsets included, biases not. topk_ids:
    [S, k] int16 chosen, -1 = none. topic, sequence: [S] int32. score: the score function that made ``scores``.
    """

    part: int
    rank: int
    logits: F32
    scores: F32
    topk_ids: I16
    topic: I32
    sequence: I32
    score: Score


@dataclass(frozen=True, slots=True)
class Seen:
    """What one step showed of one layer, before any capacity dropped something.

    counts: [M, P, E] int64, tokens per micro-batch, source rank and expert. topic_counts: [topics, E] int64 over all of
    them, or None if the traffic has one topic. samples: of every rank and micro-batch, for rules that ask for them.
    """

    counts: I64
    topic_counts: I64 | None = None
    samples: tuple[Sample, ...] = ()

    def loads(self, scope: Scope) -> I64:
        """Return [groups, E] loads of each group of ``scope`` (not ``sequence``, which needs samples)."""
        axes = {"global_batch": (0, 1), "ep_group": (1,), "micro_batch": ()}[scope]
        loads: I64 = self.counts.sum(axis=axes).reshape(-1, self.counts.shape[-1])
        return loads


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What a state does to the router; each a number, [E], or [topics, E] float64.

    offset is added to the logits and moves scores and weights with them (a trained router moved). Selection then ranks
    ``score * scale + shift``; weights do not see scale and shift.
    """

    scale: F64 | float = 1.0
    shift: F64 | float = 0.0
    offset: F64 | float = 0.0


class Balance(Piece):
    """A balancing rule with a float64 state per layer.

    A step selects with the state as it stood before the step (causality); what it showed updates the state after.
    """

    learns: ClassVar[bool] = True
    """Whether steps change the state."""
    assumes: ClassVar[bool] = False
    """Whether it is an assumption about the router itself (`Scenario.router_dynamics`) rather than a way of balancing."""
    ranks_alone: ClassVar[bool] = False
    """Whether its update reranks tokens by its own state, so that another rule's bias would mislead it."""
    samples: ClassVar[bool] = False
    """Whether `update` looks at `Seen.samples`."""
    rests_when_even: ClassVar[bool] = True
    """Whether equal loads, with equal affinities, leave the first state as it is."""

    @abstractmethod
    def start(self, shape: GateShape) -> F64:
        """Return the state before the first step, an array of any shape."""

    @abstractmethod
    def adjust(self, state: F64, shape: GateShape) -> Adjustment:
        """Return what ``state`` does to the router."""

    @abstractmethod
    def update(self, state: F64, seen: Seen, shape: GateShape, step: int, gain: float = 1.0) -> F64:
        """Return the state after a step, leaving ``state`` as it is.

        step: from 0; -1 while the controllers are warmed up. gain: multiplies the update rate then, 1 otherwise.
        """


def scheduled(rate: float, step: int, stop_after_step: int | None, decay: Literal["constant", "linear"]) -> float:
    """Return the update rate after ``step``: 0 from ``stop_after_step`` on, fallen to 0 linearly by then with ``linear``
    decay; the full ``rate`` while warming up (step -1) and without a stop.

    >>> [scheduled(1.0, step, 4, decay) for step in (-1, 0, 3, 4) for decay in ("constant", "linear")]
    [1.0, 1.0, 1.0, 1.0, 1.0, 0.25, 0.0, 0.0]
    """
    if stop_after_step is None or step < 0:
        return rate
    if step >= stop_after_step:
        return 0.0
    return rate * (1.0 - step / stop_after_step) if decay == "linear" else rate


def relative(loads: I64) -> F64:
    """Return load / mean load - 1 of [..., E]; 0 where nothing was routed."""
    total = loads.sum(axis=-1, keepdims=True)
    error: F64 = (loads * loads.shape[-1] - total) / np.maximum(total, 1)
    return error
