"""Time of max-min fair completions of one all-to-all, exact and batched, Numba and NumPy, in one interleaved run.

``python tests/bench/bench_maxmin.py``. Ratios of minima are what holds between machines. Gates: ends batched within 5 %
at least 15 times faster than exact for 64 ranks, with makespans within 2 % of it on every skew here; one solve at least
5 times faster compiled. Then the `flow` cost model beside `port` on DeepEP's two modes. Exits with 1 if a gate is missed.
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

from sim.cluster import Cluster, build_network
from sim.cost import CommunicationCost
from sim.cost.flow import Flow
from sim.cost.maxmin import Routes, completions, rates, routes
from sim.cost.port import Port
from sim.tokens import F64
from sim.yamlfile import read

CLUSTER = Path(__file__).resolve().parents[2] / "scenarios" / "clusters" / "h800.yaml"


def all_to_all(n_ranks: int, skew: float, seed: int = 0) -> tuple[Routes, F64, F64]:
    """Every rank to every other over one port out and one in; log-normal popularity of targets and sizes."""
    rng = np.random.default_rng(seed)
    source, target = np.divmod(np.arange(n_ranks**2), n_ranks)
    away = source != target
    source, target = source[away], target[away]
    weight = np.exp(skew * rng.standard_normal(n_ranks))
    sizes = weight[target] * np.exp(0.3 * rng.standard_normal(source.size))
    return routes(np.stack([source, n_ranks + target], axis=1), 2 * n_ranks), np.ones(2 * n_ranks), sizes


def best(job: Callable[[], object], rounds: int) -> float:
    """Return the smallest seconds of ``rounds`` runs."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def solver() -> bool:
    """Print ends of one exchange at several eps; return whether both gates hold."""
    held = True
    for n_ranks in (16, 64):
        for skew in (0.0, 0.3, 1.0):
            prepared, capacity, sizes = all_to_all(n_ranks, skew)
            exact, solves = completions(prepared, capacity, sizes)
            full = best(partial(completions, prepared, capacity, sizes), 3)
            print(f"{n_ranks} ranks, {sizes.size} flows, skew {skew}: exact {full * 1e3:.2f} ms, {solves} solves")
            for eps in (0.01, 0.05):
                ends, few = completions(prepared, capacity, sizes, eps=eps)
                took = best(partial(completions, prepared, capacity, sizes, eps=eps), 9)
                span, flow = ends.max() / exact.max() - 1, np.abs(ends / exact - 1).mean()
                print(
                    f"  eps {eps:.0%}: {took * 1e3:.2f} ms, {few} solves, {full / took:.0f}x faster, "
                    f"makespan {span:+.2%}, flows {flow:.2%}"
                )
                if eps == 0.05 and n_ranks == 64:
                    held &= full / took >= 15 and abs(span) <= 0.02
    return held


def languages() -> bool:
    """Print one solve and all ends of 16 ranks, NumPy against Numba; return whether the gate holds."""
    prepared, capacity, sizes = all_to_all(16, 0.3)
    jobs = {"one solve": lambda: rates(prepared, capacity), "all ends": lambda: completions(prepared, capacity, sizes)}
    held = True
    for name, job in jobs.items():
        seconds = {}
        for kernels in ("numpy", "numba"):
            os.environ["GATESIM_KERNELS"] = kernels
            seconds[kernels] = best(job, 9)
        os.environ.pop("GATESIM_KERNELS")
        ratio = seconds["numpy"] / seconds["numba"]
        held &= ratio >= 5
        print(
            f"{name}, 240 flows: NumPy {seconds['numpy'] * 1e6:.0f} us, Numba {seconds['numba'] * 1e6:.0f} us, {ratio:.0f}x"
        )
    return held


def model() -> None:
    """Print the cost models on one exchange of 64 ranks."""
    network = build_network(Cluster.model_validate(read(CLUSTER).data), 64)
    rng = np.random.default_rng(0)
    off = ~np.eye(64, dtype=bool)
    costs: dict[str, CommunicationCost] = {"exact": Flow(eps=0), "flow": Flow(), "port": Port()}
    for skew in (0.0, 0.3, 1.0):
        weight = np.exp(skew * rng.standard_normal(64))
        ranks = rng.poisson(512 * weight / weight.mean(), (64, 64)).astype(np.float64)
        nodes = 0.6 * ranks.reshape(64, 8, 8).sum(axis=-1)
        for mode in ("normal", "low_latency"):
            times, took = {}, {}
            for name, cost in costs.items():
                tokens = {"rank_tokens": ranks, "node_tokens": nodes, "bytes_per_token": 7392.0, "mode": mode}
                call = partial(cost.pair_times_s, network, **tokens)
                times[name] = call()[0]
                took[name] = best(call, 3)
            for name in ("flow", "port"):
                span = times[name].max() / times["exact"].max() - 1
                reached = off & (times["exact"] > 0)
                pair = np.abs(times[name][reached] / times["exact"][reached] - 1).mean()
                print(
                    f"skew {skew}, {mode}: {name} {took[name] * 1e3:.2f} ms, {took['exact'] / took[name]:.1f}x faster "
                    f"than exact, makespan {span:+.2%}, pairs {pair:.1%}"
                )


def main() -> int:
    """Run all three; return 1 if a gate is missed."""
    held = [solver(), languages()]
    model()
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
