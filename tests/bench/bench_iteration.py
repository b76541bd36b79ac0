"""Iteration times of DeepSeek-V3's decode unit (EP144, two-batch overlap): one look-up, and one size of the grid; and of
one size under normal kernels, where copies per rank and node are counted by Numba, or source by source in NumPy.

python -m pytest tests/bench/bench_iteration.py --benchmark-enable
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.engine.iteration import Work
from sim.engine.served import Served
from sim.validation import Inputs, serving

SCENARIOS = Path(__file__).resolve().parents[2] / "scenarios"


def _served(role: str, ranks: int) -> Served:
    policy = (
        "{name: V3, select: {kind: group_limited, topk_group: 4}, placement: {kind: linear, num_redundant_experts: 32}, "
        "replicas: round_robin}"
    )
    return serving._served(serving._scenario(Inputs(SCENARIOS), ranks, policy), role)


@pytest.fixture(scope="module")
def served() -> Served:
    return _served("decode", 144)


@pytest.fixture(scope="module")
def mixed() -> Served:
    return _served("prefill", 72)


def _works(served: Served) -> list[Work]:
    rng, ranks = np.random.default_rng(0), served.n_ranks
    found = []
    for _ in range(64):
        requests, none = rng.integers(70, 100, ranks), np.zeros(ranks, dtype=np.int64)
        context = (requests * rng.uniform(3000, 6000, ranks)).astype(np.int64)
        topics = rng.multinomial(int(requests.sum()), served.scenario.traffic.topic_weights)
        found.append(Work(requests, requests, context, none, none, np.zeros(ranks), none + 9000, requests, topics))
    return found


def test_look_up(benchmark: Any, served: Served) -> None:
    works = _works(served)
    for number in range(1500):  # fill the tables, load Numba
        served.time(works[number % 64], number)
    benchmark(lambda: [served.time(work, number) for number, work in enumerate(works)])


def test_one_size(benchmark: Any, served: Served) -> None:
    routed = served.overlapping.routed
    assert routed is not None
    benchmark(routed.direct, "decode", routed.mixtures[0], 0, 48)


@pytest.mark.parametrize("kernels", ["numba", "numpy"])
def test_one_size_of_normal_kernels(
    benchmark: Any, mixed: Served, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATESIM_KERNELS", kernels)
    routed = mixed.whole.routed
    assert routed is not None
    for _ in range(5):  # load Numba
        routed.direct("prefill", routed.mixtures[0], 0, 48)
    benchmark(routed.direct, "prefill", routed.mixtures[0], 0, 48)
