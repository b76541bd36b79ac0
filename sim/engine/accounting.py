"""Where each rank's time went, and the laws of time that any timeline must keep. Integers throughout, so exact."""

from __future__ import annotations

import numpy as np

from sim.engine.plan import STREAMS, Plan, Timeline
from sim.tokens import I64


def breakdown(plan: Plan, timeline: Timeline) -> dict[str, I64]:
    """Split the makespan of every rank into busy time by phase and two kinds of idle time (law C7).

    Returns ``{part: [P] int64 picoseconds}``: each phase of the compute stream in order of first appearance, then
    ``exposed_communication`` and ``waiting``; on every rank the parts sum to ``timeline.makespan_ps`` exactly.

    An instant at which a rank's compute stream is idle is judged by the operation that its own communication stream
    executes then:

    - exposed_communication, if every peer that sends to the rank in that operation has started
      (t >= peer_start): data are in transfer, and nothing is left to overlap them with;
    - waiting, if some such peer has not started yet, or if the communication stream is idle too (only after the
      rank's last operation, until the slowest rank is done).

    An idle gap before a compute operation always lies under communication: what the gap ends with is the end of a
    communication operation X named in ``after``, and X's stream runs without pause from the start of the gap to X's
    end. So for X alone the gap splits at peer_start[X]; where X was queued behind another operation of its stream,
    that operation is judged by the same rule. An operation that transfers while compute is busy is overlapped and
    counts nowhere.
    """
    parts: dict[str, I64] = {}
    compute = [index for index, op in enumerate(plan.ops) if op.stream == "compute"]
    communication = [index for index, op in enumerate(plan.ops) if op.stream == "communication"]
    for index in compute:
        phase = plan.ops[index].phase
        busy = timeline.end_ps[index] - timeline.start_ps[index]
        parts[phase] = parts[phase] + busy if phase in parts else busy
    work_start, work_end = timeline.start_ps[compute], timeline.end_ps[compute]
    flight_start, flight_end = timeline.peer_start_ps[communication], timeline.end_ps[communication]
    exposed = (flight_end - flight_start).sum(axis=0)
    for rank in range(plan.n_ranks):
        flights = flight_start[:, rank], flight_end[:, rank]
        exposed[rank] -= (_covered(*flights, work_end[:, rank]) - _covered(*flights, work_start[:, rank])).sum()
    busy = (work_end - work_start).sum(axis=0)
    parts["exposed_communication"] = exposed
    parts["waiting"] = timeline.makespan_ps - busy - exposed
    return parts


def _covered(start: I64, end: I64, until: I64) -> I64:
    """Return how much of [0, ``until``] the intervals [start, end) cover; these are disjoint and in order of time."""
    total = np.concatenate(([0], np.cumsum(end - start)))
    done = np.searchsorted(end, until, side="right")
    # The interval after those that are done may be under way; after the last one there is none.
    current = np.append(start, np.iinfo(np.int64).max)[done]
    return np.asarray(total[done] + np.maximum(until - np.minimum(until, current), 0), dtype=np.int64)


def violations(plan: Plan, timeline: Timeline) -> list[str]:
    """Return the laws that ``timeline`` breaks as a timing of ``plan``, one sentence each; empty if it keeps them all.

    Laws, per operation and rank: it starts at the later of the end of its stream's previous operation and the ends of
    what it comes ``after`` (so no stream runs two at once, and none idles without cause); it ends when its work and
    all its arrivals have; peer_start is the latest start of its senders. For the whole: the makespan is at least the
    work of any one stream.
    """
    broken: list[str] = []
    previous: dict[str, int] = {}
    work = {name: np.zeros(plan.n_ranks, dtype=np.int64) for name in STREAMS}
    for index, op in enumerate(plan.ops):
        start, end = timeline.start_ps[index], timeline.end_ps[index]
        causes = [timeline.end_ps[before] for before in op.after]
        if op.stream in previous:
            causes.append(timeline.end_ps[previous[op.stream]])
        previous[op.stream] = index
        work[op.stream] += op.duration_ps
        peer_start = start
        ends = start + op.duration_ps
        if op.transfer_ps is not None:
            sends = op.transfer_ps >= 0
            peer_start = np.maximum(start, np.where(sends, start[:, None], 0).max(axis=0))
            ends = np.maximum(ends, np.where(sends, start[:, None] + op.transfer_ps, 0).max(axis=0))
        for name, found, lawful in (
            ("start", start, np.max(causes, axis=0) if causes else np.zeros_like(start)),
            ("end", end, ends),
            ("peer_start", timeline.peer_start_ps[index], peer_start),
        ):
            for rank in np.flatnonzero(found != lawful).tolist():
                label = f"ops[{index}] ({op.phase!r}, layer {op.layer}) on rank {rank}"
                broken.append(f"{label}: {name} is {found[rank]} ps, must be {lawful[rank]} ps")
    for name, total in work.items():
        if total.max() > timeline.makespan_ps:
            broken.append(f"makespan {timeline.makespan_ps} ps is less than the {name} work {total.max()} ps of a rank")
    return broken
