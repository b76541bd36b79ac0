"""What both timing engines read and write: operations in program order in, a timeline in integer picoseconds out.

An expert-parallel group of P ranks. Each rank has two streams in the sense of CUDA, "compute" and "communication",
that execute the same program in the same order on every rank. An operation starts on a rank as soon as (a) the
previous operation of its stream on that rank has ended and (b) the operations it names in ``after`` have ended there.
A compute operation ends ``duration_ps[r]`` later. A communication operation on rank r ends at

    max(start[r] + duration_ps[r],  max over s with transfer_ps[s, r] >= 0 of  start[s] + transfer_ps[s, r])

so a rank waits only for the peers that really send to it; there is no barrier over the group.

Nothing can deadlock: each end depends only on starts of the same operation, and each start only on ends of operations
with lower indices, so by induction every operation of a valid plan ends on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np

from sim.tokens import I64

Stream = Literal["compute", "communication"]
STREAMS: tuple[Stream, Stream] = ("compute", "communication")

# Names that `sim.engine.accounting.breakdown` gives to idle time.
IDLE_PARTS = ("exposed_communication", "waiting")

# No time of a valid plan reaches the first; the second stays below every time whatever one adds to it.
LATEST_PS = 2**62
NEVER_PS = -(2**62)


class EventOrder(IntEnum):
    """The written order of events at one instant: the lower first, then the lower id.

    Data that arrives is there before work that ends is noted, both before outputs are combined, and the placement
    changes last, when the instant is over. Values start above SimPy's own priorities (URGENT 0, NORMAL 1), so
    bookkeeping by plain SimPy events comes first.
    """

    ARRIVE = 2
    FINISH = 3
    COMBINE = 4
    REBALANCE = 5


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One operation, executed once by every rank (P = number of ranks).

    phase: "attention", "gate", "dispatch", "experts", "combine", ...; free text, the key of time accounting.
    layer, micro_batch, backward: where in the step it belongs; labels only, they do not change the timing.
    stream: the stream that executes it.
    after: indices (in `Plan.ops`) of earlier operations, on either stream, that must have ended on the same rank.
    duration_ps: [P] int64 picoseconds. Compute: the time it takes. Communication: the least time that it occupies the
        rank's communication stream (the send side), counted from the rank's own start.
    transfer_ps: [P, P] int64 picoseconds or None, communication only. [s, r] = time from s's start of this operation
        until all of s's data for r has arrived at r; -1 where s sends nothing to r.
    """

    phase: str
    layer: int
    micro_batch: int
    backward: bool
    stream: Stream
    after: tuple[int, ...]
    duration_ps: I64
    transfer_ps: I64 | None = None

    @property
    def order(self) -> EventOrder:
        """Where the end of this operation ranks among events of the same instant."""
        if self.phase == "rebalance":
            return EventOrder.REBALANCE
        if self.stream == "compute":
            return EventOrder.FINISH
        return EventOrder.COMBINE if self.phase == "combine" else EventOrder.ARRIVE


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The program of one expert-parallel group. Raises ValueError, naming the operation and the rule, if malformed."""

    n_ranks: int
    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        if self.n_ranks < 1:
            raise ValueError(f"n_ranks must be at least 1, got {self.n_ranks!r}")
        longest_ps = 0
        for index, op in enumerate(self.ops):
            try:
                longest_ps += _checked(index, op, self.n_ranks)
            except ValueError as error:
                raise ValueError(f"ops[{index}] ({op.phase!r}, layer {op.layer}): {error}") from None
        # Fully serial execution is an upper bound of every time, so this excludes overflow in both engines.
        if longest_ps >= LATEST_PS:
            raise ValueError(f"the plan may last {longest_ps} ps; the clock holds less than {LATEST_PS} ps (53 days)")


def _checked(index: int, op: Op, n_ranks: int) -> int:
    """Return the longest time that ``op`` can take once all ranks have started it; ValueError if it is malformed."""
    if op.stream not in STREAMS:
        raise ValueError(f"stream must be one of {', '.join(STREAMS)}, got {op.stream!r}")
    if op.phase in IDLE_PARTS:
        raise ValueError("this phase name is reserved for idle time")
    for before in op.after:
        if not (isinstance(before, (int, np.integer)) and 0 <= before < index):
            raise ValueError(f"after must name earlier operations (0 <= index < {index}), got {before!r}")
    longest_ps = _longest("duration_ps", op.duration_ps, (n_ranks,), 0)
    if op.transfer_ps is not None:
        if op.stream == "compute":
            raise ValueError("transfer_ps is for communication operations only; it must be None here")
        longest_ps = max(longest_ps, _longest("transfer_ps", op.transfer_ps, (n_ranks, n_ranks), -1))
    return longest_ps


def _longest(name: str, value: Any, shape: tuple[int, ...], least: int) -> int:
    if not isinstance(value, np.ndarray) or value.dtype != np.int64 or value.shape != shape:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{name} must be an int64 array of shape {list(shape)}, got {got}")
    if value.min() < least:
        raise ValueError(f"{name} must be >= {least} ps, got {value.min()}")
    return int(value.max())


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """When every operation ran (n_ops = len(plan.ops), P ranks; all arrays int64 picoseconds from the plan's start).

    start_ps, end_ps: [n_ops, P].
    peer_start_ps: [n_ops, P] the latest start among the ranks that send to r in that operation, r's own included;
        equal to start_ps where nobody sends.
    n_events: SimPy events processed; 0 when the times come from the max-plus recurrence.
    """

    start_ps: I64
    end_ps: I64
    peer_start_ps: I64
    n_events: int

    @property
    def makespan_ps(self) -> int:
        """The end of the last operation on any rank; 0 for an empty plan."""
        return int(self.end_ps.max(initial=0))
