"""What the notebooks say between their figures: runs of shipped scenarios, tables, and sentences made of a run's numbers.

A sentence is made by the code that has the numbers, so that it still holds when the scenario changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown

import sim
from analysis.metrics import axis_label, metric_named
from analysis.style import by_policy, need, policy_named, policy_names
from sim.estimate import estimate
from sim.results import Metric, Result, Table, metrics_of, per_replica
from sim.statistics import half_width
from sim.tokens import F64
from sim.units import human

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
    """Say how ``policy`` changes a metric ``against`` another, such as "step time from 1.8 to 1.78 ms (-0.74 %)"."""
    found = metric_named(metrics_of(result.scenario), metric)
    name, unit = _name_and_unit(found)
    old, new = value(result, metric, against), value(result, metric, policy)
    share = 100 * (new / old - 1) if old else 0.0
    change = f" ({share:+.{0 if abs(share) >= 10 else 2 if abs(share) < 1 else 1}f} %)" if share and new else ""
    return f"{name} from {rounded(old, found, 3):g} to {rounded(new, found, 3):g}{unit}{change}"


def _name_and_unit(metric: Metric) -> tuple[str, str]:
    """Return how sentences call a metric, and its unit with a space before it; ratios have none."""
    name, _, unit = axis_label(metric).removesuffix("]").partition(" [")
    return name, "" if unit == "1" or unit.startswith(("max/mean", "share of", "mean =")) else f" {unit}"


def ranking(result: Result, metric: str, leave_out: Sequence[str] = (), otherwise: str | None = None) -> Markdown:
    """Say which policy is best in ``metric``, which ones this run cannot tell from it, and by how much others are behind.

    Policies are compared replica by replica, for all of them see the same tokens or requests: a paired difference counts
    if it is larger than its 95 % half-width. leave_out: policies that are yardsticks, not candidates. otherwise: what
    counts for a policy without the metric, as the step alone for one that moves no experts. Raises ValueError
    for a metric without a better direction, or that nothing has.
    """
    found = metric_named(metrics_of(result.scenario), metric)
    if found.better == "none":
        raise ValueError(f"{metric} has no better direction")
    values = _replicas(result, metric, leave_out)
    if otherwise:
        values = _replicas(result, otherwise, leave_out) | values
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
        behind.append(f"*{name}* by {share:.2g} %" + ("" if np.isnan(half) else f" ± {spread:.2g}"))
    name, unit = _name_and_unit(found)
    text = f"Best in {name}: **{order[0]}** with {rounded(float(best.mean()), found):g}{unit}."
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


def questions(*names: str) -> Markdown:
    """Show what the shipped scenarios ``names`` ask, and the estimate of how long each takes as it is on one core."""
    lines = ["| scenario | question | as it is, on one core |", "|---|---|---|"]
    for name in names:
        scenario = sim.load(SCENARIOS / name)
        seconds = float(f"{estimate(scenario).seconds:.1g}")
        lines.append(f"| `{name}` | {scenario.description} | about {human(seconds, 's')} |")
    return Markdown("\n".join(lines))


def without(result: Result, *names: str) -> Result:
    """Return ``result`` without the policies ``names``, such as a yardstick that would stretch a figure's axes."""

    def kept(table: Table) -> Table:
        if "policy" not in table:
            return table
        rows = [i for i, policy in enumerate(table["policy"]) if policy not in names]
        return {column: [values[i] for i in rows] for column, values in table.items()}

    policies = [policy for policy in result.scenario.policies if policy.name not in names]
    return replace(
        result,
        scenario=result.scenario.model_copy(update={"policies": policies}),
        tables={name: kept(table) for name, table in result.tables.items()},
        summary_rows=kept(result.summary_rows),
    )


def last_steps(result: Result, n: int) -> pd.Series[float]:
    """Return the mean MaxVio of a batch over the last ``n`` steps and all replicas, by policy."""
    steps = result.steps
    late = steps[steps.step >= steps.step.max() + 1 - n]
    means: pd.Series[float] = late.groupby("policy", sort=False).max_vio.mean()
    return means


def highest(result: Result) -> pd.Series[float]:
    """Return the highest MaxVio of a step, mean over MoE layers and replicas, by policy."""
    over_steps = result.steps.groupby(["policy", "step"], sort=False).max_vio.mean()
    most: pd.Series[float] = over_steps.groupby(level="policy", sort=False).max()
    return most


def most_max_vio(result: Result) -> float:
    """Return the MaxVio at which every token goes to the same experts: E / k - 1."""
    model = result.scenario.model
    return model.n_routed_experts / model.num_experts_per_tok - 1


def by_topic(result: Result, column: str, policies: Sequence[str] | None = None) -> pd.DataFrame:
    """Return a column of the topics table, mean over what was measured: a row per topic and a column per policy.

    Raises KeyError for an unknown column or policy.
    """
    topics = result.topics
    need(topics, "topics", ("policy", "topic", column))
    means = topics.groupby(["topic", "policy"], sort=False)[column].mean().unstack("policy")
    return means[list(policies or policy_names(result))].round(3)
