"""The timing of a plan as a max-plus recurrence: array operations over ranks, one operation after the other.

Gives the same integers as `sim.engine.des` for every plan, some forty times faster, because the program order is
the same on all ranks: when an operation is reached, every time it depends on is known. It knows no queues, faults or
decisions taken at run time; for those use the event engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sim.engine.plan import NEVER_PS, Op, Plan, Timeline
from sim.tokens import I64


def simulate(plan: Plan) -> Timeline:
    """Return the times of all operations of ``plan`` on all ranks; ``n_events`` is 0."""
    start, end, peer_start = _recurrence(plan.ops, (plan.n_ranks,))
    peer = start.copy()
    for index, row in peer_start.items():
        peer[index] = row
    return Timeline(start, end, peer, n_events=0)


def makespans(ops: Sequence[Op], n_ranks: int, n_plans: int) -> I64:
    """Return the makespans [n] of ``n`` plans of the same operations, whose arrays have a leading axis of that length."""
    _, end, _ = _recurrence(ops, (n_plans, n_ranks))
    longest: I64 = end.max(axis=(0, -1), initial=0)
    return longest


def _recurrence(ops: Sequence[Op], shape: tuple[int, ...]) -> tuple[I64, I64, dict[int, I64]]:
    start, end = np.zeros((len(ops), *shape), dtype=np.int64), np.zeros((len(ops), *shape), dtype=np.int64)
    peer_start: dict[int, I64] = {}
    free: dict[str, I64] = {}
    latest = np.maximum.reduce  # less overhead per call than ndarray.max, which shows at P = 64
    arrival = np.empty((*shape, shape[-1]), dtype=np.int64)
    for index, op in enumerate(ops):
        begin, finish = start[index], end[index]
        if op.stream in free:
            begin[:] = free[op.stream]
        for before in op.after:
            np.maximum(begin, end[before], out=begin)
        np.add(begin, op.duration_ps, out=finish)
        if op.transfer_ps is not None:
            if op.transfer_ps.min() >= 0:  # every pair exchanges data: no mask needed
                peer_start[index] = np.broadcast_to(latest(begin, axis=-1)[..., None], shape)
                np.add(begin[..., :, None], op.transfer_ps, out=arrival)
            else:
                sent = np.where(op.transfer_ps >= 0, begin[..., :, None], NEVER_PS)
                peer_start[index] = np.maximum(begin, latest(sent, axis=-2))
                np.add(sent, op.transfer_ps, out=arrival)
            np.maximum(finish, latest(arrival, axis=-2), out=finish)
        free[op.stream] = finish
    return start, end, peer_start
