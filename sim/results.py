"""What a run returns: tidy tables, and their summary with intervals and paired differences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sim.metrics.balance import least_share, max_vio, uniform_max_vio
from sim.scenario import Scenario

if TYPE_CHECKING:
    import pandas as pd

Table = dict[str, list[Any]]


@dataclass(frozen=True)
class Metric:
    """A figure of the summary: its name, how people read it, and whether less of it is better."""

    name: str
    label: str
    digits: int
    scale: float = 1.0


METRICS = (
    Metric("max_vio_batch", "MaxVio batch", 3),
    Metric("max_vio_batch_floor", "(floor)", 3),
    Metric("max_vio_global", "MaxVio global", 3),
    Metric("max_vio_global_floor", "(floor)", 3),
    Metric("device_max_over_mean", "device max/mean", 3),
    Metric("nodes_per_token", "nodes /token", 3),
    Metric("devices_per_token", "devices /token", 3),
    Metric("inter_node_bytes", "inter-node GB", 4, 1e-9),
    Metric("kept_affinity", "kept affinity", 4),
    Metric("least_share", "least-updated expert", 3),
    Metric("step_time_s", "step ms", 5, 1e3),
    Metric("attention_s", "attention ms", 4, 1e3),
    Metric("experts_s", "experts ms", 4, 1e3),
    Metric("other_compute_s", "other compute ms", 4, 1e3),
    Metric("exposed_communication_s", "exposed comm ms", 4, 1e3),
    Metric("waiting_s", "waiting ms", 4, 1e3),
    Metric("tokens_per_s_per_gpu", "tokens /s/GPU", 5),
)


@dataclass(frozen=True)
class Result:
    """A finished run. ``tables`` and ``summary_rows`` are plain columns; the properties give pandas frames.

    n_events: events that the discrete-event engine processed.
    """

    scenario: Scenario
    tables: dict[str, Table]
    summary_rows: Table
    n_events: int

    def _frame(self, table: Table) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(table)

    @property
    def steps(self) -> pd.DataFrame:
        """One row per policy, replica and step; means over MoE layers, and the time of timed steps."""
        return self._frame(self.tables["steps"])

    @property
    def layers(self) -> pd.DataFrame:
        """One row per policy, replica, step and MoE layer."""
        return self._frame(self.tables["layers"])

    @property
    def devices(self) -> pd.DataFrame:
        """One row per policy, replica, timed step and device: tokens received, and where the time went."""
        return self._frame(self.tables["devices"])

    @property
    def experts(self) -> pd.DataFrame:
        """One row per policy, replica, MoE layer and expert: tokens over all steps."""
        return self._frame(self.tables["experts"])

    def summary(self) -> pd.DataFrame:
        """One row per policy and metric: mean over replicas, 95 % half-width, paired difference against the first
        policy with its half-width (NaN with one replica)."""
        return self._frame(self.summary_rows)


def _columns(table: Table, policy: str, replica: int, names: tuple[str, ...]) -> list[Any]:
    rows = [
        i
        for i, (p, r) in enumerate(zip(table.get("policy", []), table.get("replica", []), strict=True))
        if p == policy and r == replica
    ]
    return [
        np.array([np.nan if table[name][i] is None else table[name][i] for i in rows], dtype=np.float64)
        if name in table
        else np.full(len(rows), np.nan)
        for name in names
    ]


def _nanmean(values: Any) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _of_replica(tables: dict[str, Table], scenario: Scenario, index: int, replica: int) -> dict[str, float]:
    """Return every metric of one policy in one replica: means over steps; global loads summed over steps."""
    policy = scenario.policies[index]
    names = tuple(m.name for m in METRICS if not m.name.startswith(("max_vio", "least")))
    row = dict(zip(names, (_nanmean(c) for c in _columns(tables["steps"], policy.name, replica, names)), strict=True))
    batch, floor = _columns(tables["steps"], policy.name, replica, ("max_vio", "max_vio_floor"))
    row |= {"max_vio_batch": _nanmean(batch), "max_vio_batch_floor": _nanmean(floor)}
    (tokens,) = _columns(tables["experts"], policy.name, replica, ("tokens",))
    model = scenario.model_of(policy)
    row |= dict.fromkeys(("max_vio_global", "max_vio_global_floor", "least_share"), math.nan)
    if len(tokens):
        loads = tokens.reshape(-1, model.n_routed_experts)
        n_tokens = scenario.parallel.ep_size * scenario.tokens_per_rank * scenario.steps.count
        k = round(float(loads[0].sum()) / n_tokens)
        row["max_vio_global"] = float(max_vio(loads).mean())
        row["max_vio_global_floor"] = uniform_max_vio(n_tokens, model.n_routed_experts, k)
        row["least_share"] = float(least_share(loads).mean())
    return row


def half_width(values: Any) -> float:
    """Return the half-width of the 95 % t-interval of the mean of ``values`` [n]; NaN for fewer than two."""
    n = len(values)
    if n < 2 or np.isnan(values).any():
        return math.nan
    if np.ptp(values) == 0:
        return 0.0
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.975) * values.std(ddof=1) / math.sqrt(n))


def summarise(tables: dict[str, Table], scenario: Scenario) -> Table:
    """Return the summary columns: policy, metric, mean, half_width, difference, difference_half_width, replicas."""
    runs = [
        [_of_replica(tables, scenario, index, replica) for replica in range(scenario.replicas)]
        for index in range(len(scenario.policies))
    ]
    out: Table = {
        name: []
        for name in ("policy", "metric", "mean", "half_width", "difference", "difference_half_width", "replicas")
    }
    for index, policy in enumerate(scenario.policies):
        for metric in METRICS:
            mine = np.array([row[metric.name] for row in runs[index]])
            first = np.array([row[metric.name] for row in runs[0]])
            row = (
                policy.name,
                metric.name,
                float(mine.mean()),
                half_width(mine),
                float((mine - first).mean()),
                half_width(mine - first),
                scenario.replicas,
            )
            for column, value in zip(out.values(), row, strict=True):
                column.append(value)
    return out
