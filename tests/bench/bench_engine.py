"""Speed of the timing engines on a step like DeepSeek-V3's. ``python tests/bench/bench_engine.py``

58 layers x 2 micro-batches x 8 operations on 64 ranks, dense exchanges. Every round times all contenders in turn and
the minima are compared, because one machine's speed drifts more between runs than these ratios do.
Aims: events/s at least a third of bare SimPy timeouts with as many pending, half of those with 1000 pending; max-plus
50 times faster than SimPy. Gates, which catch a regression and sit below what was measured: 0.25, 0.33, 30. Exits with
1 if a gate is missed.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import simpy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sim import rng
from sim.engine import Op, Plan, breakdown, des, maxplus, violations

PHASES = ("attention", "gate", "dispatch", "shared_experts", "experts", "combine", "norm", "residual")


def v3_like(n_layers: int = 58, n_micro_batches: int = 2, n_ranks: int = 64) -> Plan:
    draw = rng.stream(0, "bench", "engine")
    ops: list[Op] = []
    last: dict[int, int] = {}
    for layer in range(n_layers):
        for phase in PHASES:
            exchange = phase in ("dispatch", "combine")
            for micro_batch in range(n_micro_batches):
                after = (last[micro_batch],) if micro_batch in last else ()
                ops.append(
                    Op(
                        phase,
                        layer,
                        micro_batch,
                        False,
                        "communication" if exchange else "compute",
                        after,
                        draw.integers(5 * 10**7, 2 * 10**8, n_ranks),
                        draw.integers(10**7, 10**8, (n_ranks, n_ranks)) if exchange else None,
                    )
                )
                if phase != "shared_experts":  # these run beside the exchange; the routed ones wait for it
                    last[micro_batch] = len(ops) - 1
    return Plan(n_ranks, tuple(ops))


def bare_timeouts(n_events: int, n_processes: int, delays: list[int]) -> None:
    """The least SimPy can do for ``n_events``: ``n_processes`` that only wait."""
    env = simpy.Environment()

    def wait(first: int) -> Iterator[simpy.Event]:
        for index in range(first, n_events, n_processes):
            yield env.timeout(delays[index])

    for first in range(n_processes):
        env.process(wait(first))
    env.run()


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> int:
    """Print times and ratios; return 1 if a gate is missed."""
    plan = v3_like()
    events, recurrence = des.simulate(plan), maxplus.simulate(plan)
    if not np.array_equal(events.end_ps, recurrence.end_ps) or violations(plan, events):
        raise SystemExit("the engines disagree")
    n_events = events.n_events
    delays = rng.stream(0, "bench", "delays").integers(5 * 10**7, 2 * 10**8, n_events).tolist()
    contenders: dict[str, Callable[[], object]] = {
        "bare 128": lambda: bare_timeouts(n_events, 2 * plan.n_ranks, delays),
        "bare 1000": lambda: bare_timeouts(n_events, 1000, delays),
        "des": lambda: des.simulate(plan),
        "maxplus": lambda: maxplus.simulate(plan),
        "checks": lambda: Plan(plan.n_ranks, plan.ops),
        "breakdown": lambda: breakdown(plan, events),
        "violations": lambda: violations(plan, events),
    }
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(9):
        for name, work in contenders.items():
            best[name] = min(best[name], seconds(work))
    tracemalloc.start()
    des.simulate(plan)
    peak = tracemalloc.get_traced_memory()[1]
    print(f"{Path(__file__).name}: {len(plan.ops)} operations x {plan.n_ranks} ranks = {n_events} events")
    for name, took in best.items():
        print(f"{name:>10} {took * 1e3:8.2f} ms {took / n_events * 1e9:8.0f} ns per operation and rank")
    print(f"peak memory of des: {peak / 2**20:.0f} MiB, {peak / n_events:.0f} bytes per operation and rank")
    gates = (
        ("events/s, des / bare SimPy timeouts, 128 pending", best["bare 128"] / best["des"], 1 / 3, 0.25),
        ("events/s, des / bare SimPy timeouts, 1000 pending", best["bare 1000"] / best["des"], 0.5, 0.33),
        ("time, des / maxplus", best["des"] / best["maxplus"], 50, 30),
    )
    for name, ratio, aim, gate in gates:
        verdict = "aim met" if ratio >= aim else "aim missed" if ratio >= gate else "GATE MISSED"
        print(f"{name}: {ratio:.2f} (aim {aim:.2g}, gate {gate:.2g}): {verdict}")
    return int(any(ratio < gate for _, ratio, _, gate in gates))


if __name__ == "__main__":
    sys.exit(main())
