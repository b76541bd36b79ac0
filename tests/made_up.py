"""Made-up sweeps, searches, answers and rows, for figures that need many runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

import sim
from sim.optimizing.front import Front
from sim.optimizing.goals import Goal, Limit
from sim.optimizing.search import Trial
from sim.optimizing.space import Place
from sim.results import METRICS
from sim.rng import stream
from sim.validation import Figure as Row

TINY = Path(__file__).resolve().parents[1] / "scenarios" / "tiny.yaml"
POLICIES = ("top-k", "DeepSeek-V3 (node-limited + bias)", "random")
METRIC = {metric.name: metric for metric in METRICS}


def sweep(axes: dict[str, list[Any]], points: list[tuple[Any, ...]] | None = None, replicas: int = 3) -> Any:
    """Made-up runs of a sweep over ``axes``: a grid, or ``points``."""
    if points:
        axes = {key: sorted({point[i] for point in points}) for i, key in enumerate(axes)}
    rng, rows = stream(1, "made-up sweep"), []
    for point, values in enumerate(points or itertools.product(*axes.values())):
        for (i, policy), replica in itertools.product(enumerate(POLICIES), range(replicas)):
            row = {"point": point} | dict(zip(axes, values, strict=True)) | {"policy": policy, "replica": replica}
            row |= dict.fromkeys(METRIC, float("nan"))
            row["step_time_s"] = 1e-3 * (3 + i + point % 5 + 0.1 * rng.random())
            row["kept_affinity"] = 1 - 0.05 * i - 0.01 * (point % 3) + 0.01 * rng.random()
            row["max_vio_batch"] = 1.3 * i + 0.2 * (point % 4) + 0.1 * rng.random()
            rows.append(row)
    return SimpleNamespace(axes=axes, runs=pd.DataFrame(rows), policies=list(POLICIES), metrics=METRICS)


GRID = {"gating.select.topk_group": [1, 2, 4, 8], "cluster.nodes": [4, 16]}
KINDS = {"placement.kind": ["linear", "annealed", "a kind with a long name"], "policies.*.balance.bias_update_rate": [1e-4, 1e-3, 1e-2]}  # fmt: skip
DRAWN = [(float(a), float(b)) for a, b in np.exp(stream(2, "design").uniform(0, 4, (20, 2))).round(2)]


def rows() -> list[tuple[str, Row]]:
    """Made-up rows of nine groups, as many as the real ones."""
    rng, found = stream(3, "made-up rows"), []
    for group, n in enumerate((44, 18, 95, 49, 17, 12, 9, 20, 8)):
        for i in range(n):
            kind: Any = ("prediction", "calibration", "derived")[0 if i % 4 else i // 4 % 3]
            published = float(10 ** rng.uniform(-2, 4))
            row = Row(
                f"figure {i} of a group", "made up", published, published * float(rng.normal(1, 0.04)), 0.1, kind=kind
            )
            found.append((f"group_{group}", row))
    found.append(("group_2", Row("the worst of all figures, with a long name", "made up", 10.0, 31.0, 0.1)))
    found.append(("group_2", Row("a bound that is kept", "made up", 10.0, 3.0, 0.0, relation="at_most")))
    found.append(("group_8", Row("never answered", "made up", 10.0, float("nan"), 0.1)))
    return found


def asked(*, samples: bool = True) -> Any:
    """A made-up answer: the lead of the second policy is 6 %, and one constant overturns it."""
    names = ["NIC bandwidth", "memory bandwidth", "grouped GEMM rate", "popularity of the topics", "nothing"]
    table = pd.DataFrame({"constant": names, "effect": [0.1, 0.1, 0.1, 0.1, 0.0]})
    for end, leads in (("low", [-2, 3, 5, 5.5, 6]), ("high", [14, 9, 7, 6.5, 6])):
        table[f"{end}_winner"] = [POLICIES[1] if lead > 0 else POLICIES[0] for lead in leads]
        table[f"{end}_ahead"] = np.abs(leads) / 100
    table["changes"] = table.low_winner != POLICIES[1]
    index = np.array([0.6, 0.3, 0.1, 0.02, 0.0])
    found = {"first": index, "total": index + 0.02, "first_half_width": 0.03, "total_half_width": 0.04}
    indices = pd.DataFrame({"constant": names, **found} if samples else {})
    stated = SimpleNamespace(winner=1, ahead=0.06)
    return SimpleNamespace(policies=POLICIES, stated=stated, metric=METRIC["step_time_s"], one_at_a_time=table, indices=indices)  # fmt: skip


def searched(*goals: Goal) -> Front:
    """A made-up search of 40 trials under a limit."""
    rng, limit = stream(4, "made-up search"), Limit(METRIC["kept_affinity"], True, 0.95)
    trials = []
    for i in range(40):
        nodes, copies = int(rng.integers(1, 9)), int(rng.choice([0, 8, 16]))
        trial = Trial(i, Place(values=(nodes, copies), policy=POLICIES[i % 2]))
        time, kept = 3e-3 + 2e-4 * nodes + 1e-4 * rng.random(), 1 - 0.06 / nodes - 0.01 * (i % 2)
        each = {"step_time_s": time, "kept_affinity": kept, "memory_bytes": 30e9 + 3e8 * copies}
        each["max_vio_batch"] = 12.0 / nodes
        trial.judge({name: [value, value * 1.01] for name, value in each.items()}, goals, [limit])
        trials.append(trial)
    keys = ("gating.select.topk_group", "placement.num_redundant_experts")
    return Front(sim.load(TINY), keys, goals, (limit,), tuple(trials))


TIME, KEPT, MEMORY = Goal(METRIC["step_time_s"], False), Goal(METRIC["kept_affinity"], True), Goal(METRIC["memory_bytes"], False)  # fmt: skip
VIO = Goal(METRIC["max_vio_batch"], False)
