"""Time of generating logits, against drawing as many normals in the same run. ``python tests/bench/bench_affinity.py``

Ratios of minima are what holds between machines. Gates: compiled / normals <= 0.15, NumPy / normals <= 0.6 (DeepSeek-V3
sizes: E=256, latent_rank 10, 4096 tokens). Exits with 1 if a gate is missed.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sim.traffic import TrafficShape
from sim.traffic.affinity import Affinity, AffinityBatch, AffinitySource

TOKENS, EXPERTS, LAYERS, ROUNDS = 4096, 256, 58, 11


def main() -> int:
    """Print microseconds per token and ratios; return 1 if a gate is missed."""
    config = Affinity(tokens_per_rank=TOKENS)
    source = config.start(TrafficShape(LAYERS, EXPERTS, 8, 64), 0, 0)
    if not isinstance(source, AffinitySource):
        raise TypeError("the affinity traffic starts an AffinitySource")
    rng = np.random.Generator(np.random.Philox(1))
    jobs: dict[str, Callable[[], object]] = {
        "standard_normal float32": lambda: rng.standard_normal((TOKENS, EXPERTS), dtype=np.float32)
    }
    compiled = [False, True] if importlib.util.find_spec("numba") else [False]
    for flag in compiled:
        batch = AffinityBatch(source, "train", 0, 64, TOKENS, flag)
        name = "numba" if flag else "numpy"
        jobs[f"tokens of one layer, {name}"] = lambda batch=batch: batch.tokens(20, 0)
        jobs[f"latents of one step, {name}"] = lambda batch=batch: batch._draw_rank(0)
    best = dict.fromkeys(jobs, float("inf"))
    for round_ in range(ROUNDS + 1):  # interleaved; round 0 warms up
        for name, job in jobs.items():
            start = time.process_time()
            job()
            if round_:
                best[name] = min(best[name], time.process_time() - start)
    normals = best["standard_normal float32"]
    for name, seconds in best.items():
        print(f"{name:32s} {seconds / TOKENS * 1e6:7.3f} us/token  {seconds / normals:6.3f} of the normals")
    gates = {"tokens of one layer, numba": 0.15, "tokens of one layer, numpy": 0.6}
    missed = [name for name, gate in gates.items() if name in best and best[name] / normals > gate]
    for name in missed:
        print(f"gate missed: {name} <= {gates[name]}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
