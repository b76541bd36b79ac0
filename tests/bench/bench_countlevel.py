"""Time of a step's loads and exchange, drawn at count level against routed token by token, in one interleaved run.

``python tests/bench/bench_countlevel.py [--quick]``. DeepSeek-V3's gate (256 experts, 8 of them, 4 of 8 nodes) on 64
ranks, one MoE layer, T tokens per step, compiled kernels. A step is everything that `sim.rollout` does for it: at token
level generating affinities, gate, counting, checks; at count level draws, counting, checks. Gate: at T >= 64k a drawn step
is at least 50 times faster, pilot aside. Then with the pilot, over N steps; and whole runs of ``scenarios/v3.yaml``, whose
timing of the exchange costs the same either way. Ratios of minima are what holds between machines. Exits with 1 if the
gate is missed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["GATESIM_KERNELS"] = "numba"  # the faster way to route: the fair opponent

import sim
from sim import rollout
from sim.loading import load
from sim.rollout import Task
from sim.scenario import Scenario

GATE = 50.0
RANKS, PILOT, DRAWS, ROUNDS = 64, 64, 500, 3
TOKENS = (2**16, 2**18, 2**20)
V3 = str(Path(__file__).resolve().parents[2] / "scenarios" / "v3.yaml")
ONE_LAYER = ["model.num_hidden_layers=4", "parallel.pp_size=4", "steps.warmup.steps=0", "steps.timed=all"]
LIMITED = 'policies=[{"name": "limited", "select": {"kind": "group_limited", "topk_group": 4}}]'
WHOLE = ["model.num_hidden_layers=5", "parallel.pp_size=5", "steps.timed=last"]
STILL = (
    'policies=[{"name": "topk"}, {"name": "limited", "select": {"kind": "group_limited", "topk_group": 4}}, '
    '{"name": "random", "select": "random"}]'
)


def scenario(tokens: int, steps: int, resolution: str, pilot: int = PILOT) -> Scenario:
    """One layer of V3 under its node-limited gate, sequences of a quarter of a rank's tokens."""
    per_rank = tokens // RANKS
    sizes = [f"traffic.tokens_per_rank={per_rank}", f"traffic.sequence_length={per_rank // 4}"]
    kind = [f"steps.count={steps}", f"steps.resolution={resolution}", f"steps.pilot_ranks={pilot}"]
    return load(V3, [*ONE_LAYER, LIMITED, *sizes, *kind])


def seconds(job: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    job()
    return time.process_time() - start


def roll(given: Scenario) -> float:
    return seconds(lambda: rollout.run(Task(given, (0,), 0, range(1))))


def main() -> int:
    """Print ratios; return 1 if the gate is missed."""
    quick = "--quick" in sys.argv[1:]
    missed = []
    roll(scenario(2**12, 1, "token"))  # compile
    for tokens in TOKENS[:1] if quick else TOKENS:
        jobs = {
            (resolution, steps): scenario(tokens, steps, resolution)
            for resolution, counts in (("token", (1, 3)), ("count", (1, 1 + DRAWS)))
            for steps in counts
        } | {("twice the pilot", 1): scenario(tokens, 1, "count", 2 * PILOT)}
        best = dict.fromkeys(jobs, float("inf"))
        for _ in range(1 if quick else ROUNDS):
            for key, given in jobs.items():
                best[key] = min(best[key], roll(given))
        routed = (best["token", 3] - best["token", 1]) / 2
        drawn = (best["count", 1 + DRAWS] - best["count", 1]) / DRAWS
        pilot = best["twice the pilot", 1] - best["count", 1]
        start = best["count", 1] - drawn - pilot
        print(
            f"T = {tokens:8d}: a step routed {routed * 1e3:8.1f} ms, drawn {drawn * 1e3:6.2f} ms: {routed / drawn:6.0f} x; "
            f"pilot of {PILOT} ranks {pilot * 1e3:.0f} ms, start {start * 1e3:.0f} ms"
        )
        for batches in (1, 16, 256):  # what a pilot of so many batches leaves: `sim.countlevel`
            once = start + pilot * batches * RANKS / PILOT
            ratios = [f"{n} steps {n * routed / (once + n * drawn):.1f} x" for n in (100, 1000, 10_000)]
            worth = once / (routed / GATE - drawn) if routed > GATE * drawn else float("inf")
            print(f"    with a pilot of {batches:3d} batches: {', '.join(ratios)}; {GATE:.0f} x from {worth:.0f} steps")
        if routed < GATE * drawn:
            missed.append(f"T = {tokens}: a drawn step is {routed / drawn:.0f} times faster, wanted {GATE:.0f}")
    for steps, name, policies in (
        (4, "all six, two of them learning", []),
        (4, "gates that stand still", [STILL]),
        (32, "gates that stand still", [STILL]),
    )[: 2 if quick else 3]:
        both = {}
        for resolution, pilot_ranks in (("token", 64), ("count", 64), ("count", 8)):
            overrides = [*WHOLE, *policies, f"steps.count={steps}", f"steps.resolution={resolution}"]
            overrides += [f"steps.pilot_ranks={pilot_ranks}"]
            both[resolution, pilot_ranks] = seconds(lambda overrides=overrides: sim.run(V3, overrides=overrides))
        token = both.pop(("token", 64))
        shown = ", ".join(f"pilot of {p}: {s:.1f} s = {token / s:.1f} x" for (_, p), s in both.items())
        print(f"sim.run, v3.yaml, 2 MoE layers, {steps} steps, {name}: token {token:.1f} s, {shown}")
    for text in missed:
        print(f"gate missed: {text}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
