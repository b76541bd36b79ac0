"""What the notebooks say between their figures: runs of shipped scenarios, tables, and sentences made of a run's numbers.

A sentence is made by the code that has the numbers, so that it still holds when the scenario changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown

import sim
from analysis.metrics import axis_label, metric_named
from analysis.style import by_policy, policy_named, policy_names
from sim.estimate import estimate
from sim.results import Metric, Result, metrics_of, per_replica
from sim.statistics import half_width
from sim.tokens import F64

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"


def run(name: str, changes: Mapping[str, Any] | None = None) -> Result:
    """Run the shipped scenario ``name`` with ``changes``, as ``--set`` takes them, on one process."""
    result: Result = sim.run(SCENARIOS / name, overrides=changes or {})
    return result


def table(result: Result, metrics: Sequence[str], policies: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the means over replicas, a row per policy and a column per metric, in the units of the axes.

    Raises KeyError for an unknown metric or policy.
    """
    columns = {}
    for metric in (metric_named(metrics_of(result.scenario), name) for name in metrics):
        columns[axis_label(metric)] = by_policy(result, metric.name)["mean"].map(lambda x, m=metric: rounded(x, m))
    return pd.DataFrame(columns).loc[list(policies or policy_names(result))]


def rounded(value: float, metric: Metric, digits: int = 4) -> float:
    """Return ``value`` in the unit of the axes, with ``digits`` that count.

    >>> rounded(0.00123456, Metric("step_time_s", "step ms", 5, 1e3))
    1.235
    """
    return float(f"{value * metric.scale:.{digits}g}")


def value(result: Result, metric: str, policy: str) -> float:
    """Return the mean of ``metric`` over replicas in SI units. Raises KeyError for an unknown metric or policy."""
    return float(by_policy(result, metric)["mean"].loc[policy])


def said(*sentences: str) -> Markdown:
    """Show ``sentences``, made from numbers, as a paragraph."""
    return Markdown(" ".join(sentences))


def moved(result: Result, metric: str, policy: str, against: str) -> str:
    """Say how ``policy`` changes a metric ``against`` another.

    >>> # "MaxVio of a batch [max/mean - 1] from 1.03 to 0.38 (-63 %)"
    """
    found = metric_named(metrics_of(result.scenario), metric)
    old, new = value(result, metric, against), value(result, metric, policy)
    change = f" ({100 * (new / old - 1):+.2g} %)" if old else ""
    return f"{axis_label(found)} from {rounded(old, found, 3):g} to {rounded(new, found, 3):g}{change}"


def ranking(result: Result, metric: str, leave_out: Sequence[str] = ()) -> Markdown:
    """Say which policy is best in ``metric``, which ones this run cannot tell from it, and by how much others are behind.

    Policies are compared replica by replica, for all of them see the same tokens or requests: a paired difference counts
    if it is larger than its 95 % half-width. leave_out: policies that are yardsticks, not candidates. Raises ValueError
    for a metric without a better direction, or that nothing has.
    """
    found = metric_named(metrics_of(result.scenario), metric)
    if found.better == "none":
        raise ValueError(f"{metric} has no better direction")
    values = _replicas(result, metric, leave_out)
    if not values:
        raise ValueError(f"no policy of this result has {metric}")
    sign = 1.0 if found.better == "lower" else -1.0
    order = sorted(values, key=lambda name: sign * float(values[name].mean()))
    best = values[order[0]]
    tied, behind = [], []
    for name in order[1:]:
        gap = sign * (values[name] - best)
        half = half_width(gap)
        if not float(gap.mean()) > (0.0 if np.isnan(half) else half):
            tied.append(f"*{name}*")
            continue
        share, spread = 100 * gap.mean() / abs(best.mean()), 100 * half / abs(best.mean())
        behind.append(f"*{name}* {share:.2g} %" if np.isnan(half) else f"*{name}* {share:.2g} ± {spread:.1g} %")
    text = f"{axis_label(found)}: best is **{order[0]}** with {rounded(float(best.mean()), found):g}."
    if tied:
        text += f" This run cannot tell it from {', '.join(tied)}."
    if behind:
        text += f" Behind it: {', '.join(behind)}."
    if result.scenario.replicas == 1:
        text += " One replica: no intervals."
    return Markdown(text)


def _replicas(result: Result, metric: str, leave_out: Sequence[str]) -> dict[str, F64]:
    """Return the values [replica] of every policy that has them."""
    rows = pd.DataFrame(per_replica(result.tables, result.scenario))
    found = {
        name: rows.loc[rows.policy == name, metric].to_numpy(float)
        for name in policy_names(result)
        if name not in leave_out
    }
    return {name: mine for name, mine in found.items() if np.isfinite(mine).all()}


def models(result: Result) -> pd.DataFrame:
    """Return what the model of every policy is made of: parameters, those that a token uses, FLOP and memory."""
    rows = {}
    for name in policy_names(result):
        policy = policy_named(result, name)
        model = result.scenario.model_of(policy)
        rows[name] = {
            "parameters [1e9]": round(model.total_parameters * 1e-9, 1),
            "active [1e9]": round(model.active_parameters * 1e-9, 1),
            "active [%]": round(100 * model.active_parameters / model.total_parameters, 1),
            "forward [GFLOP per token]": round(model.forward_flops_per_token(4096) * 1e-9, 1),
            "memory of a device [GB]": round(result.scenario.memory(policy)["total"] * 1e-9, 1),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def questions(*names: str) -> pd.DataFrame:
    """Return what the shipped scenarios ``names`` ask, and the estimate of how long each takes as it is on one core."""
    rows = {}
    for name in names:
        scenario = sim.load(SCENARIOS / name)
        seconds = estimate(scenario).seconds
        rows[name] = {"question": scenario.description, "as it is, one core": f"about {float(f'{seconds:.1g}'):g} s"}
    with pd.option_context("display.max_colwidth", None):
        return pd.DataFrame.from_dict(rows, orient="index")
