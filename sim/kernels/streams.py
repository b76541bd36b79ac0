"""Numba version of `sim.engine.serving_program.makespan_plain`, with the same integers. Import loads Numba."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def makespan(communicates, after, duration):  # type: ignore[no-untyped-def]
    """As `makespan_plain`."""
    end = np.zeros(len(duration), dtype=np.int64)
    free_compute, free_communication, last = np.int64(0), np.int64(0), np.int64(0)
    for i in range(len(duration)):
        start = free_communication if communicates[i] else free_compute
        for j in range(after.shape[1]):
            before = after[i, j]
            if before >= 0 and end[before] > start:
                start = end[before]
        end[i] = start + duration[i]
        if communicates[i]:
            free_communication = end[i]
        else:
            free_compute = end[i]
        if end[i] > last:
            last = end[i]
    return last
