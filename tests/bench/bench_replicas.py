"""Time and quality of replica choice, Numba and NumPy, in one run: ``python tests/bench/bench_replicas.py``.

Ratios of minima are what holds between machines. Gates: with replicas, tokens get their slots at least 2 times faster
compiled, and `least_loaded` at least 5 times; what the loads of the table say of `lp`: within 5 % of the optimum. Exits
with 1 if a gate is missed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sim.placement import Observed
from sim.placement.eplb import Eplb
from sim.placement.lplb import Lplb
from sim.plugin import make, members
from sim.replicas import ReplicaChoice, assign
from sim.replicas.lp import Lp
from sim.slots import Slots
from sim.tokens import I32, I64

RULES = {kind: make(ReplicaChoice, kind) for kind in members(ReplicaChoice)} | {"lp, highs": Lp(method="highs")}


def best(job: Callable[[], object], rounds: int = 15) -> float:
    """Return the smallest seconds of ``rounds`` runs, after one to warm up."""
    job()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def both(name: str, job: Callable[[], object], gate: float = 0.0) -> bool:
    """Print the time of a job with NumPy and with Numba; return whether the ratio passes the gate."""
    took = {}
    for kernels in ("numpy", "numba"):
        os.environ["GATESIM_KERNELS"] = kernels
        took[kernels] = best(job)
    del os.environ["GATESIM_KERNELS"]
    ratio = took["numpy"] / took["numba"]
    print(f"{name}: NumPy {took['numpy'] * 1e6:.0f} us, Numba {took['numba'] * 1e6:.0f} us, {ratio:.1f}x")
    return ratio >= gate


def planned(seed: int, slots: Slots, noise: float, tokens: int) -> tuple[I32, I64]:
    """An EPLB map for log-normal loads, and a batch [P, E] whose loads differ from them by log-normal ``noise``."""
    rng = np.random.default_rng(seed)
    load = np.exp(rng.normal(0, 1, slots.n_routed_experts))
    held = Eplb(num_redundant_experts=slots.num_redundant_experts).place(slots, Observed(load[None, None]), rng)[0]
    mean = tokens * 8 * load / load.sum() * np.exp(rng.normal(0, noise, len(load)))
    return held, rng.poisson(mean, (slots.ep_size, len(load))).astype(np.int64)


def times() -> bool:
    """Print the time of `assign` for 4,096 tokens x 8 and of every rule for 64 ranks, 256 experts, 320 slots."""
    slots = Slots(256, 64, 64)
    held, demand = planned(0, slots, 0.3, 4096)
    rng = np.random.default_rng(1)
    scores = np.log(demand.sum(axis=0)) + rng.gumbel(size=(4096, 256))
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :8].astype(np.int16)
    asked = np.tile(np.bincount(ids.ravel(), minlength=256), (64, 1))
    dealt = RULES["round_robin"].quotas(asked, held, slots)[0]
    fixed = RULES["static"].quotas(asked, held, slots)[0]
    held_once = rng.permutation(256).astype(np.int32)
    both("assign, no replicas", lambda: assign(ids, asked[0, held_once], held_once))
    both("assign, one slot per source", lambda: assign(ids, fixed, held))
    passed = both("assign, shares", lambda: assign(ids, dealt, held), 2.0)
    for name, rule in RULES.items():
        passed &= both(name, partial(rule.quotas, demand, held, slots), 5.0 if name == "least_loaded" else 0.0)
    return passed


def quality() -> bool:
    """Print max over mean rank load and the share of tokens that leave their node; return whether `lp` is near enough."""
    worst = 0.0
    for ranks, extra, tokens in ((32, 32, 16384), (64, 64, 4096), (144, 32, 128)):
        slots = Slots(256, ranks, extra)
        node = np.arange(ranks) // 8
        crossing = node[:, None] != node[slots.slot_rank]
        for noise in (0.0, 0.1, 0.3, 0.5):
            found: dict[str, list[float]] = {name: [] for name in RULES}
            crossed: dict[str, list[float]] = {name: [] for name in RULES}
            for seed in range(8):
                held, demand = planned(seed, slots, noise, tokens)
                for name, rule in RULES.items():
                    quota = rule.quotas(demand, held, slots)
                    loads = quota.sum(axis=0).reshape(ranks, -1).sum(axis=1)
                    found[name].append(loads.max() / loads.mean())
                    crossed[name].append(quota[crossing].sum() / quota.sum())
            worst = max(worst, *(a / b - 1 for a, b in zip(found["lp"], found["lp, highs"], strict=True)))
            print(
                f"EP{ranks}, {extra} redundant, {tokens} tokens per rank, noise {noise}: max/mean (share leaving node)"
            )
            print("  " + ", ".join(f"{k} {np.mean(found[k]):.3f} ({np.mean(crossed[k]):.2f})" for k in RULES))
    print(f"lp above the optimum by at most {worst:.2%}")
    return worst <= 0.05


def against_eplb() -> None:
    """Print max over mean rank load of LPLB's cube beside EPLB with as many slots, on the same batches."""
    slots = Slots(256, 32, 64)
    for spread in (0.15, 0.5, 1.0):
        for noise in (0.1, 0.3):
            found: dict[str, list[float]] = {}
            for seed in range(8):
                rng = np.random.default_rng(seed)
                load = np.exp(rng.normal(0, spread, 256))
                batch = np.tile(rng.poisson(4096 * load * np.exp(rng.normal(0, noise, 256))), (32, 1)).astype(np.int64)
                for place in (Eplb(num_redundant_experts=64), Lplb(num_redundant_experts=64)):
                    held = place.place(slots, Observed(load[None, None]), rng)[0]
                    for name in ("round_robin", "lp"):
                        loads = RULES[name].quotas(batch, held, slots).sum(axis=0).reshape(32, -1).sum(axis=1)
                        found.setdefault(f"{place.kind} + {name}", []).append(loads.max() / loads.mean())
            print(f"EP32, 64 redundant, load spread {spread}, noise {noise}: max/mean")
            print("  " + ", ".join(f"{k} {np.mean(v):.3f}" for k, v in found.items()))


def main() -> int:
    """Run all three; return 1 if a gate is missed."""
    held = [times(), quality()]
    against_eplb()
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
