"""How the summary's figures are named on axes, and the points that a run or a sweep has in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sim.optimizing.front import dominated
from sim.results import Metric, Result, metrics_of
from sim.statistics import half_width
from sim.tokens import F64, Bool

AXES = {
    "max_vio_batch": ("MaxVio of a batch", "max/mean - 1"),
    "max_vio_global": ("MaxVio over all steps", "max/mean - 1"),
    "max_vio_batch_floor": ("floor of MaxVio", "max/mean - 1"),
    "max_vio_global_floor": ("floor over all steps", "max/mean - 1"),
    "max_vio_sequence": ("MaxVio of a sequence", "max/mean - 1"),
    "max_vio_sequence_floor": ("floor of a sequence", "max/mean - 1"),
    "max_vio_micro_batch": ("MaxVio of a micro-batch", "max/mean - 1"),
    "max_vio_ep_group": ("MaxVio of an EP group", "max/mean - 1"),
    "topic_max_vio": ("MaxVio within a topic", "max/mean - 1"),
    "specialisation_bits": ("topic tells of expert", "bits"),
    "ripple": ("ripple of MaxVio", "max/mean"),
    "max_vio_late": ("MaxVio, last quarter", "max/mean - 1"),
    "device_max_over_mean": ("imbalance of ranks", "max/mean"),
    "imbalance_mean": ("imbalance of ranks", "max/mean"),
    "kept_affinity": ("kept affinity", "share of top-k's"),
    "kept_against_oracle": ("kept affinity", "share of an oracle's"),
    "inter_node_bytes": ("between nodes", "GB per step"),
    "step_time_s": ("step time", "ms"),
    "step_and_moves_s": ("step time with moves", "ms"),
    "memory_bytes": ("memory of a device", "GB"),
    "nodes_per_token": ("nodes of a token", "nodes"),
    "devices_per_token": ("devices of a token", "devices"),
    "experts_per_token": ("experts of a token", "experts"),
    "least_share": ("load of the least-updated expert", "mean = 1"),
    "settling_step": ("settled", "step"),
    "usd_per_million_tokens": ("price", "USD per million tokens"),
    "usd_per_trillion": ("price", "USD per 1e12 tokens"),
    "tokens_per_s_per_gpu": ("throughput", "tokens/s/GPU"),
    "output_tokens_per_s_per_gpu": ("output", "tokens/s/GPU"),
    "input_tokens_per_s_per_gpu": ("input", "tokens/s/GPU"),
    "user_tokens_per_s": ("rate of one user", "tokens/s"),
    "goodput_per_s": ("goodput", "requests/s"),
}
"""Names on axes, with the unit after ``Metric.scale``. Others take the summary's own label, see `axis_label`."""
NULL = "null"
UNITS = ("ms", "s", "GB", "GB /step", "%", "TFLOP/s")


def axis_label(metric: Metric) -> str:
    """Return the name of an axis with its unit in brackets.

    >>> axis_label(Metric("waiting_s", "waiting ms", 4, 1e3)), axis_label(Metric("churn", "churn", 3))
    ('waiting [ms]', 'churn [1]')
    """
    if metric.name in AXES:
        name, unit = AXES[metric.name]
        return f"{name} [{unit}]"
    for unit in UNITS:
        if metric.label.endswith(f" {unit}"):
            return f"{metric.label.removesuffix(unit).strip()} [{unit.replace(' ', '')}]"
    name, slash, unit = metric.label.partition(" /")
    return f"{name} [/{unit}]" if slash else f"{name} [1]"


def metric_named(metrics: tuple[Metric, ...], name: str) -> Metric:
    """Return the metric ``name``; raises KeyError that lists the known ones for a stranger."""
    for metric in metrics:
        if metric.name == name:
            return metric
    raise KeyError(f"no metric {name!r}; there are {', '.join(metric.name for metric in metrics)}")


def metrics_in(source: Any) -> tuple[Metric, ...]:
    """Return the metrics of a result, or of a sweep, which carries its own."""
    found: tuple[Metric, ...] = metrics_of(source.scenario) if isinstance(source, Result) else source.metrics
    return found


@dataclass(frozen=True)
class Points:
    """Means and half-widths of some metrics: one row per policy of a result, or per point and policy of a sweep.

    table: ``policy`` and, for a sweep, its axes; then NAME and NAME_half for every metric asked for, in its unit on axes.
    policies: in their order. axes: those of the sweep that take several values.
    """

    table: pd.DataFrame
    policies: list[str]
    axes: list[str]


def points(source: Any, names: list[str]) -> Points:
    """Return where ``source``, a `Result` or a sweep, lies in the metrics ``names``. Raises KeyError for a stranger."""
    metrics = [metric_named(metrics_in(source), name) for name in dict.fromkeys(names)]
    if isinstance(source, Result):
        policies = [policy.name for policy in source.scenario.policies]
        summary = source.summary().set_index(["metric", "policy"])
        table = pd.DataFrame({"policy": policies})
        for metric in metrics:
            rows = summary.loc[metric.name].loc[policies]
            table[metric.name] = rows["mean"].to_numpy(float) * metric.scale
            table[f"{metric.name}_half"] = rows["half_width"].to_numpy(float) * metric.scale
        return Points(table, policies, [])
    runs = runs_of(source)
    axes = [key for key in source.axes if runs[key].nunique() > 1]
    return Points(by_group(runs, ["point", *axes, "policy"], metrics), list(source.policies), axes)


def runs_of(sweep: Any) -> pd.DataFrame:
    """Return the runs of a sweep with every value of an axis that has nulls as text, as JSON: to a data frame they are
    NaN, which equals nothing, and make floats of the integers beside them."""
    runs: pd.DataFrame = sweep.runs
    for key, values in sweep.axes.items():
        if any(value is None for value in values):
            known = {value: json.dumps(value) for value in values if isinstance(value, bool | int | float)}
            runs = runs.assign(**{key: [NULL if pd.isna(cell) else known.get(cell, str(cell)) for cell in runs[key]]})
    return runs


def by_group(runs: pd.DataFrame, keys: list[str], metrics: list[Metric]) -> pd.DataFrame:
    """Return mean and 95 % half-width over replicas of ``metrics`` in every group of ``runs``, in order of appearance."""
    rows = []
    for key, group in runs.groupby(keys, sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(keys, key if isinstance(key, tuple) else (key,), strict=True))
        for metric in metrics:
            values = group[metric.name].to_numpy(float) * metric.scale
            row[metric.name], row[f"{metric.name}_half"] = float(values.mean()), half_width(values)
        rows.append(row)
    columns = [*keys, *(f"{metric.name}{end}" for metric in metrics for end in ("", "_half"))]
    return pd.DataFrame(rows, columns=columns)


def key_name(key: str) -> str:
    """Return the last part of a scenario's path, as axes and labels name it.

    >>> key_name("policies.*.select.topk_group")
    'topk_group'
    """
    return key.rsplit(".", 1)[-1]


def value_name(value: Any) -> str:
    """Return a value of an axis as labels show it: integers whole, other numbers with six digits; a mapping, as such or as
    JSON, by its name or kind; None, and NaN, which tables make of it, as null.

    >>> value_name(1048577), value_name(0.25), value_name('{"kind": "eplb"}'), value_name(None)
    ('1048577', '0.25', 'eplb', 'null')
    """
    if value is None or value != value:
        return NULL
    if isinstance(value, str) and value.startswith("{"):
        value = json.loads(value)
    if isinstance(value, dict):
        return str(value.get("name") or value.get("kind") or value)
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)


def front(x: F64, y: F64, better: tuple[str, str]) -> Bool:
    """Return [n] whether a point is on the Pareto front of ``x`` and ``y`` [n], of each of which the ``better``
    direction is "lower" or "higher": no other one is at least as good in both and better in one. NaN never is.

    >>> front(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]), ("lower", "higher")).tolist()
    [True, True, False]
    """
    cost: F64 = np.stack([v if way == "lower" else -v for v, way in zip((x, y), better, strict=True)], axis=1)
    known: Bool = np.asarray(np.isfinite(cost).all(axis=1))
    on = known.copy()
    on[known] = ~dominated(cost[known])
    return on
