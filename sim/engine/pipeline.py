"""The timing of a pipeline: every rank runs its program, waiting for neighbours; integer picoseconds.

A chunk starts when the rank's previous one has ended and its inputs are there: a forward needs the output of the stage
before, a backward the gradient from the stage behind, each ``transfer_ps`` after the chunk that made it has ended (on
another rank: neighbouring stages never share one).
Transfers run beside compute and never queue. A send that has no receiver yet waits in memory, as in DualPipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simpy

from sim.pipeline import Chunk, Pass, passes
from sim.tokens import I64

Programs = Sequence[Sequence[Chunk]]


@dataclass(frozen=True, slots=True)
class PipelineTimeline:
    """Starts and ends of every chunk: per rank an int64 array [n chunks]. n_events: as in `sim.engine.plan.Timeline`."""

    start_ps: list[I64]
    end_ps: list[I64]
    n_events: int

    @property
    def makespan_ps(self) -> int:
        return max((int(end[-1]) for end in self.end_ps if len(end)), default=0)


def _needs(chunk: Chunk, n_stages: int) -> list[tuple[Pass, bool]]:
    """What ``chunk`` waits for, as (pass, backward) of other chunks. Own chunks come earlier in the program anyway."""
    found = []
    for (micro, stage), backward in passes(chunk):
        if backward and stage < n_stages - 1:
            found.append((Pass(micro, stage + 1), True))
        elif not backward and stage > 0:
            found.append((Pass(micro, stage - 1), False))
    return found


def _checked(programs: Programs, duration_ps: Sequence[I64]) -> None:
    for rank, (program, times) in enumerate(zip(programs, duration_ps, strict=True)):
        if times.shape != (len(program),) or times.dtype != np.int64 or times.min(initial=0) < 0:
            raise ValueError(f"rank {rank} needs {len(program)} int64 durations, none negative")


def recurrence(programs: Programs, duration_ps: Sequence[I64], transfer_ps: int) -> PipelineTimeline:
    """Return the times of all chunks, rank by rank as far as inputs allow; ValueError if a program can never go on."""
    _checked(programs, duration_ps)
    n_ranks = len(programs)
    made: dict[tuple[Pass, bool], int] = {}  # when
    start = [np.zeros(len(p), dtype=np.int64) for p in programs]
    end = [np.zeros(len(p), dtype=np.int64) for p in programs]
    at, clock = [0] * n_ranks, [0] * n_ranks
    needs = [[_needs(chunk, n_ranks) for chunk in program] for program in programs]
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                i = at[rank]
                wanted = needs[rank][i]
                if any(key not in made for key in wanted):
                    break
                begin = max([clock[rank], *(made[key] + transfer_ps for key in wanted)])
                start[rank][i], clock[rank] = begin, begin + int(duration_ps[rank][i])
                end[rank][i] = clock[rank]
                for key in passes(program[i]):
                    made[key] = clock[rank]
                at[rank] += 1
                moved = True
    for rank, program in enumerate(programs):
        if at[rank] < len(program):
            raise ValueError(f"the pipeline stands still: rank {rank} waits for ever at chunk {at[rank]}")
    return PipelineTimeline(start, end, 0)


def simulate(programs: Programs, duration_ps: Sequence[I64], transfer_ps: int) -> PipelineTimeline:
    """As `recurrence`, by discrete events in SimPy: one process per rank, one event per chunk's end."""
    _checked(programs, duration_ps)
    env = simpy.Environment()
    n_ranks = len(programs)
    start = [np.zeros(len(p), dtype=np.int64) for p in programs]
    end = [np.zeros(len(p), dtype=np.int64) for p in programs]
    events: dict[tuple[Pass, bool], simpy.Event] = {}
    finished = [False] * n_ranks
    for program in programs:
        for chunk in program:
            for key in (*passes(chunk), *_needs(chunk, n_ranks)):
                events.setdefault(key, env.event())

    def run(rank: int) -> simpy.events.ProcessGenerator:
        for i, chunk in enumerate(programs[rank]):
            ready = 0
            for key in _needs(chunk, n_ranks):
                ended = yield events[key]
                ready = max(ready, ended + transfer_ps)
            if ready > env.now:
                yield env.timeout(ready - int(env.now))
            start[rank][i] = env.now
            yield env.timeout(int(duration_ps[rank][i]))
            end[rank][i] = env.now
            for key in passes(chunk):
                events[key].succeed(int(env.now))
        finished[rank] = True

    for rank in range(n_ranks):
        env.process(run(rank))
    env.run()
    if not all(finished):
        raise ValueError(f"the pipeline stands still: rank {finished.index(False)} waits for ever")
    return PipelineTimeline(start, end, next(env._eid))
