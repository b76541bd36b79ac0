"""EPLB for all layers at once against a plain per-layer port, then every rule's time and balance, in one run.

``python tests/bench/bench_placement.py``. Ratios of minima, the two forms in turns, are what holds between machines. Gate:
58 layers of 256 experts on 320 slots at least 10 times faster than the port, hierarchical and global; the port keeps its
lists in Python and works in float64, which is its fastest form. Exits with 1 if the gate is missed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sim.placement import Observed, Placement, moved_slots
from sim.placement.annealed import Annealed
from sim.placement.eplb import Eplb, rebalance_experts
from sim.placement.greedy import Greedy
from sim.placement.incremental import Incremental
from sim.placement.linear import Linear
from sim.rng import stream
from sim.slots import Slots
from sim.tokens import F64
from tests.test_placement import peak, plain_eplb

LAYERS, EXPERTS = 58, 256
GATED = {
    "hierarchical, 8 nodes of 8": (320, 8, 8, 64),
    "hierarchical, 4 nodes of 8": (320, 8, 4, 32),
    "global, 64 GPUs": (320, 1, 8, 64),
    "global, 32 GPUs": (320, 1, 4, 32),
    "global, 160 GPUs": (320, 1, 20, 160),
    "global, 144 GPUs, 288 slots": (288, 1, 18, 144),
}


def loads() -> F64:
    """Log-normal loads (sigma 0.7), about 1,000 tokens per expert."""
    return np.round(stream(0, "bench").lognormal(0, 0.7, (LAYERS, EXPERTS)) * 1000)


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def eplb() -> bool:
    """Print the ratio at every setting; return whether all reach 10."""
    weight, held = loads(), True
    for name, sizes in GATED.items():

        def plain(sizes: tuple[int, int, int, int] = sizes) -> object:
            return plain_eplb(weight, *sizes, dtype=float)

        def ours(sizes: tuple[int, int, int, int] = sizes) -> object:
            return rebalance_experts(weight, *sizes)

        rounds = [(seconds(plain), *(seconds(ours) for _ in range(3))) for _ in range(5)]
        slow, fast = min(r[0] for r in rounds), min(min(r[1:]) for r in rounds)
        held &= slow >= 10 * fast
        print(f"{name:28} port {slow * 1e3:6.1f} ms, all layers at once {fast * 1e3:5.2f} ms, {slow / fast:5.1f}x")
    return held


def rules() -> None:
    """Print time, max/mean of rank loads and moved slots of the rules at three sizes, on the loads they were shown."""
    load = loads()
    for name, slots in {
        "EP32 + 32": Slots(EXPERTS, 32, 32, 8, 8),
        "EP64 + 64": Slots(EXPERTS, 64, 64, 8, 8),
        "EP144 + 32": Slots(EXPERTS, 144, 32, 8, 8),
    }.items():
        print(name)
        drifted = load * stream(0, "drift").lognormal(0, 0.3, load.shape)
        before = Eplb().place(slots, Observed(load[None]), stream(0))
        row("eplb before a drift (sigma 0.3)", before, drifted, slots, 0.0)
        for title, rule, seen in (
            ("incremental, 8 moves, after it", Incremental(), Observed(drifted[None], previous=before)),
            ("incremental, 32 moves, after it", Incremental(max_moves=32), Observed(drifted[None], previous=before)),
            ("eplb, after it", Eplb(), Observed(drifted[None], previous=before)),
        ):
            timed(title, rule, seen, slots)
        for rule in (Linear(), Eplb(), Eplb(policy="global"), Greedy(), Annealed()):
            timed(f"{rule.kind} {getattr(rule, 'policy', '')}", rule, Observed(load[None]), slots)


def timed(title: str, rule: Placement, seen: Observed, slots: Slots) -> None:
    start = time.perf_counter()
    placed = rule.place(slots, seen, stream(0))
    took = time.perf_counter() - start
    moved = "" if seen.previous is None else f", moves {moved_slots(seen.previous, placed, slots).mean():.0f}"
    row(title, placed, seen.load, slots, took, moved)


def row(title: str, placed: np.ndarray, load: F64, slots: Slots, took: float, more: str = "") -> None:
    print(f"  {title:32} max/mean {peak(placed, load, slots):.4f}, {took * 1e3:7.1f} ms{more}")


def main() -> int:
    """Run both; return 1 if the gate is missed."""
    held = eplb()
    rules()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
