"""The timing of a plan as a max-plus recurrence: array operations over ranks, one operation after the other.

Gives the same integers as `sim.engine.des` for every plan, about a hundred times faster, because the program order is
the same on all ranks: when an operation is reached, every time it depends on is known. It knows no queues, faults or
decisions taken at run time; for those use the event engine.
"""

from __future__ import annotations

import numpy as np

from sim.engine.plan import Plan, Timeline
from sim.tokens import I64


def simulate(plan: Plan) -> Timeline:
    """Return the times of all operations of ``plan`` on all ranks; ``n_events`` is 0."""
    shape = (len(plan.ops), plan.n_ranks)
    start, end, peer_start = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    free: dict[str, I64] = {}
    for index, op in enumerate(plan.ops):
        begin, finish = start[index], end[index]
        if op.stream in free:
            begin[:] = free[op.stream]
        for before in op.after:
            np.maximum(begin, end[before], out=begin)
        np.add(begin, op.duration_ps, out=finish)
        peer_start[index] = begin
        if op.transfer_ps is not None:
            # Times are never negative, so a product with the mask silences the pairs that exchange nothing.
            sends = op.transfer_ps >= 0
            np.maximum(finish, ((begin[:, None] + op.transfer_ps) * sends).max(axis=0), out=finish)
            np.maximum(begin, (begin[:, None] * sends).max(axis=0), out=peer_start[index])
        free[op.stream] = finish
    return Timeline(start, end, peer_start, n_events=0)
