"""A finished run of requests as a timeline keeps it."""

from __future__ import annotations

import numpy as np

from sim.engine.recording import RecordedGroup, RecordedService
from sim.engine.serving.world import Finished
from sim.tokens import I64

MOST_ITERATIONS = 200_000
"""Iterations that are kept, those that end first: more than a viewer can show, and a day has millions."""


def recorded_service(policy: str, replica: int, served: Finished) -> RecordedService:
    """Return what ``served``, a run that was told to record, did until its last kept iteration ended."""
    log, fleet = served.log, served.fleet
    assert log.extra is not None
    columns = log.columns() | {"context": np.array(log.extra.contexts, dtype=np.int64)}
    n = min(len(columns["end_ps"]), MOST_ITERATIONS)
    until_ps = int(columns["end_ps"][n - 1]) if n < len(columns["end_ps"]) else served.end_ps
    rests = log.rests()
    early = rests["start_ps"] < until_ps
    handovers: I64 = np.array(log.extra.handovers, dtype=np.int64).reshape(-1, 5)
    groups = tuple(
        RecordedGroup(size.unit.name, size.unit.role, number, size.devices, size.n_ranks * size.capacity_blocks)
        for size in fleet.sizes
        for number in range(size.unit.count)
    )
    return RecordedService(
        policy,
        replica,
        groups,
        {name: values[:n] for name, values in columns.items()},
        log.imbalances()[:n],
        {name: values[early] for name, values in rests.items()},
        handovers[handovers[:, 4] <= until_ps],
        tuple(served.rebalances),
        tuple(served.faults),
        until_ps,
        served.end_ps,
    )
