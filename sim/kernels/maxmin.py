"""Numba version of `sim.cost.maxmin`'s two loops, with the bits of the NumPy one. Import loads Numba."""

from __future__ import annotations

import numpy as np
from numba import njit

TIED = 1 - 1e-9  # rates this near are equal but for rounding


@njit(cache=True, nogil=True)
def fill(links, start, members, residual, crossing, pending, rates):  # type: ignore[no-untyped-def]
    """As `sim.cost.maxmin.fill_plain`."""
    n_links, width = len(residual), links.shape[1]
    taken = np.zeros(n_links, dtype=np.int64)
    share = np.empty(n_links, dtype=np.float64)
    for link in range(n_links):
        share[link] = residual[link] / crossing[link] if crossing[link] > 0 else np.inf
    while True:
        best, tight = np.inf, -1
        for link in range(n_links):
            if share[link] < best:
                best, tight = share[link], link
        if tight < 0:
            break
        for i in range(start[tight], start[tight + 1]):
            flow = members[i]
            if pending[flow]:
                pending[flow] = False
                rates[flow] = best
                for h in range(width):
                    if links[flow, h] >= 0:
                        taken[links[flow, h]] += 1
        for link in range(n_links):
            if taken[link] > 0:
                residual[link] -= best * taken[link]
                crossing[link] -= taken[link]
                taken[link] = 0
                share[link] = residual[link] / crossing[link] if crossing[link] > 0 else np.inf
    for flow in range(len(rates)):
        if pending[flow]:
            pending[flow] = False
            rates[flow] = np.inf


@njit(cache=True, nogil=True)
def drain(links, start, members, capacity, left, begin, order, slack, last_slack, finish):  # type: ignore[no-untyped-def]
    """As `sim.cost.maxmin.drain_plain`."""
    n_flows, width = links.shape
    n_links = len(capacity)
    pending = np.zeros(n_flows, dtype=np.bool_)
    rates = np.zeros(n_flows, dtype=np.float64)
    since = np.zeros(n_flows, dtype=np.float64)
    residual = np.empty(n_links, dtype=np.float64)
    crossing = np.empty(n_links, dtype=np.int64)
    kept = np.empty(n_links, dtype=np.float64)
    alive = np.empty(n_flows, dtype=np.int64)  # the running flows, ascending: the first n_running
    now, arrived, n_running, solves = 0.0, 0, 0, 0
    floor = 0.0
    while True:
        if n_running == 0:
            if arrived == n_flows:
                break
            now = begin[order[arrived]]
            floor = 0.0
        before = n_running
        while arrived < n_flows and begin[order[arrived]] <= now:
            flow = order[arrived]
            since[flow] = now
            rates[flow] = np.inf
            alive[n_running] = flow
            n_running += 1
            arrived += 1
            floor = 0.0
        if n_running > before:
            alive[:n_running].sort()
        for link in range(n_links):
            kept[link] = 0.0
            crossing[link] = 0
        latest = -np.inf
        for i in range(n_running):
            flow = alive[i]
            latest = max(latest, begin[flow])
            if rates[flow] >= floor:
                pending[flow] = True
                if since[flow] < now:
                    left[flow] -= rates[flow] * (now - since[flow])
                    since[flow] = now
                for h in range(width):
                    if links[flow, h] >= 0:
                        crossing[links[flow, h]] += 1
            else:
                for h in range(width):
                    if links[flow, h] >= 0:
                        kept[links[flow, h]] += rates[flow]
        for link in range(n_links):
            residual[link] = capacity[link] - kept[link]
        first = np.inf
        fill(links, start, members, residual, crossing, pending, rates)
        solves += 1
        for i in range(n_running):
            flow = alive[i]
            if since[flow] == now:
                finish[flow] = now + left[flow] / rates[flow]
            first = min(first, finish[flow])
        coming = begin[order[arrived]] if arrived < n_flows else np.inf
        if coming < first:
            now, floor = coming, 0.0
            continue
        limit = min(first + slack * (first - latest), coming)
        ending = 0
        for i in range(n_running):
            if finish[alive[i]] <= limit:
                ending += 1
        if ending == n_running:
            limit = min(first + last_slack * (first - latest), coming)
        last, floor, stay = first, np.inf, 0
        for i in range(n_running):
            flow = alive[i]
            if finish[flow] <= limit:
                floor = min(floor, rates[flow])
                last = max(last, finish[flow])
            else:
                alive[stay] = flow
                stay += 1
        n_running = stay
        now, floor = first + (last - first) / 2, floor * TIED
    return solves
