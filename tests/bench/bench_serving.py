"""Speed of the serving loop. ``python tests/bench/bench_serving.py [folder of data sets]``

First an hour of requests at the rate of Azure's conversations of 2023 (5.5 a second, gaps of cv 1.09, lengths by its
quantiles) on one group of 72 ranks, by a clock that answers at once: what an iteration costs besides timing it. Then as
many iterations with ten times as many running requests, and twice the hour. Every round takes all contenders in turn and
the minima are compared. Aims: an iteration costs at most 80 bare SimPy timeouts; ten times the requests at most double
its cost; twice the hour costs at most 2.3 times as much. Exits with 1 if a gate (a half more) is missed.

Then the same hour with the real clock: DeepSeek-V3 on a mixed unit of 72 H800, everything from drawing the requests to
the tables, and, given the data sets, the half hours of ``request_traces``. Aim: 60 seconds for the hour.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import simpy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sim.engine.iteration import Timed, Work
from sim.loading import load
from sim.requests import Requests
from sim.rng import stream
from sim.serve import serve_one
from tests.serving_model import Clock, Fake, requests_of, sizes_of, unit, world

ROOT = Path(__file__).resolve().parents[2]
STEP_PS = 30 * 10**9


class Instant(Clock):
    """Every iteration takes 30 ms."""

    def time(self, work: Work, number: int) -> Timed:
        return Timed(STEP_PS, 1.0, STEP_PS, 0, 0, 0)


class Policy(Fake):
    def times(self, *_: object) -> Clock:
        return Instant()


AZURE = {
    "kind": "gamma",
    "rate_per_s": 5.5,
    "cv": 1.09,
    "input_tokens": {"kind": "quantiles", "points": [[0.1, 207], [0.5, 1020], [0.9, 2734], [0.99, 4142]]},
    "output_tokens": {"kind": "quantiles", "points": [[0.1, 54], [0.5, 129], [0.9, 424], [0.99, 601]]},
}
"""Patel et al., Splitwise, ISCA 2024."""


def whole(requests: dict[str, object], duration_s: float) -> tuple[float, float, int, int]:
    """Seconds of processor and of wall time of a run with the real clock; its iterations and requests."""
    policy = {
        "name": "EPLB + 32",
        "select": "group_limited",
        "placement": {"kind": "eplb", "num_redundant_experts": 32},
        "replicas": "round_robin",
    }
    changes = {
        "cluster.nodes": 9,
        "policies": [policy],
        "serving.requests": requests,
        "serving.duration_s": duration_s,
        "serving.units": [{"name": "all", "parallel": {"ep_size": 72}}],
    }
    sets = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    scenario = load(ROOT / "scenarios/v3_decode.yaml", sets, allow_outside=True)
    begin, wall = time.process_time(), time.perf_counter()
    tables, _ = serve_one(scenario, scenario.policies[0], 0)
    took = time.process_time() - begin, time.perf_counter() - wall
    return *took, int(tables["service"]["iterations"][0]), len(tables["requests"]["request"])


def conversations(rate_per_s: float, duration_s: float, inputs: int = 1150, outputs: int = 211) -> Requests:
    draw = stream(0, "bench", "serving")
    n = int(rate_per_s * duration_s)
    arrival = np.sort((draw.random(n) * duration_s * 1e12).astype(np.int64)).tolist()
    lengths = [(1 + draw.exponential(mean - 1, n)).astype(np.int64).tolist() for mean in (inputs, outputs)]
    return requests_of(arrival, *lengths)


def cost(requests: Requests, duration_s: float) -> tuple[float, int]:
    """Seconds of processor time, and iterations."""
    run = world(requests, (sizes_of(unit(ranks=72), 100_000),), Policy(), duration_s=duration_s)
    begin = time.process_time()
    found = run.run()
    return time.process_time() - begin, len(found.log.imbalances())


def timeouts(n: int) -> float:
    """Seconds of ``n`` bare SimPy timeouts."""
    env = simpy.Environment()

    def wait() -> simpy.events.ProcessGenerator:
        for _ in range(n):
            yield env.timeout(STEP_PS)

    env.process(wait())
    begin = time.process_time()
    env.run()
    return time.process_time() - begin


def main() -> int:
    """Print times and ratios; return 1 if a gate is missed."""
    hour, two, crowd = conversations(5.5, 3600), conversations(5.5, 7200), conversations(55.0, 360, outputs=2110)
    best: dict[str, float] = {}
    seconds = 0.0
    for _ in range(3):
        for name, requests, duration_s in (("hour", hour, 3600.0), ("two hours", two, 7200.0), ("crowd", crowd, 360.0)):
            took, iterations = cost(requests, duration_s)
            each = took / iterations
            if name == "hour":
                seconds = min(seconds or took, took)
            if each < best.get(name, np.inf):
                best[name] = each
                print(
                    f"{name:>10}: {iterations} iterations, {len(requests)} requests, {took:.2f} s, {1e6 * each:.0f} us each"
                )
            if name == "two hours":
                best["twice"] = min(best.get("twice", np.inf), took)
        best["timeout"] = min(best.get("timeout", np.inf), timeouts(100_000) / 100_000)
    gates = (
        ("an iteration in bare SimPy timeouts", best["hour"] / best["timeout"], 80.0),
        ("an iteration with ten times the requests running", best["crowd"] / best["hour"], 2.0),
        ("twice the hour", best["twice"] / seconds, 2.3),
    )
    missed = False
    for name, ratio, aim in gates:
        verdict = "aim met" if ratio <= aim else "aim missed" if ratio <= 1.5 * aim else "GATE MISSED"
        missed |= ratio > 1.5 * aim
        print(f"{name}: {ratio:.2f} (aim {aim:g}): {verdict}")
    runs: dict[str, tuple[dict[str, object], float]] = {"hour": (AZURE, 3600.0)}
    for name in ("conv", "code") if len(sys.argv) > 1 else ():
        path = Path(sys.argv[1]) / f"request_traces/azure2023_{name}_first30min.csv.gz"
        runs[name] = {"kind": "azure", "path": str(path)}, 1800.0
    for name, (asked, duration_s) in runs.items():
        took, wall_s, iterations, n = whole(asked, duration_s)
        print(
            f"{name}, real clock: {n} requests, {iterations} iterations, {wall_s:.1f} s, {took:.1f} s of processor, "
            f"{1e6 * took / iterations:.0f} us each"
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
