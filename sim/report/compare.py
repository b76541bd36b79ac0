"""Differences between stored runs: what their scenarios differ in, and what that did to every figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sim.results import Result, Table, metrics_of, per_replica
from sim.statistics import half_width
from sim.store import fingerprints, resolved_data
from sim.tokens import F64

if TYPE_CHECKING:
    import pandas as pd

ABSENT = "(none)"


def compare(results: Mapping[str, Result]) -> pd.DataFrame:
    """Return one row per policy of the same name, metric and run beyond the first.

    Columns: policy, metric, run, reference (mean of the first run), value, difference and its 95 % half_width, paired
    (whether replicas were compared one by one). Metrics without a value in either run are left out. Raises ValueError for
    fewer than two runs, or runs of steps beside runs that serve requests.
    """
    import pandas as pd

    return pd.DataFrame(rows(results))


def rows(results: Mapping[str, Result]) -> Table:
    """As `compare`, as plain columns."""
    names = list(results)
    _check(results)
    out: Table = {
        column: [] for column in ("policy", "metric", "run", "reference", "value", "difference", "half_width", "paired")
    }
    first = results[names[0]]
    base = _by_policy(first)
    for name in names[1:]:
        other, paired = results[name], not unpaired(first, results[name])
        theirs = _by_policy(other)
        for policy in (p.name for p in first.scenario.policies if p.name in theirs):
            for metric in metrics_of(first.scenario):
                a, b = base[policy][metric.name], theirs[policy][metric.name]
                if np.isnan(a).any() or np.isnan(b).any():
                    continue
                half = half_width(b - a) if paired else _welch(a, b)
                row = (policy, metric.name, name, a.mean(), b.mean(), b.mean() - a.mean(), half, paired)
                for column, value in zip(out.values(), row, strict=True):
                    column.append(float(value) if isinstance(value, np.floating) else value)
    return out


def _check(results: Mapping[str, Result]) -> None:
    if len(results) < 2:
        raise ValueError("a comparison needs at least two runs")
    serves = {name: result.scenario.serving is not None for name, result in results.items()}
    if len(set(serves.values())) > 1:
        odd = next(name for name in serves if serves[name] != next(iter(serves.values())))
        raise ValueError(
            f"{odd} and {next(iter(serves))}: one serves requests, the other runs steps; their figures differ in kind"
        )


def _by_policy(result: Result) -> dict[str, dict[str, F64]]:
    """Values [replicas] by policy and metric."""
    table = {name: np.array(column) for name, column in per_replica(result.tables, result.scenario).items()}
    return {
        policy.name: {
            metric.name: table[metric.name][table["policy"] == policy.name].astype(float)
            for metric in metrics_of(result.scenario)
        }
        for policy in result.scenario.policies
    }


def unpaired(one: Result, other: Result) -> str:
    """Say why replicas of two runs did not see the same tokens (requests) and cannot be paired; nothing if they did."""
    a, b = one.scenario, other.scenario
    traces = [result.traces or fingerprints(result.scenario) for result in (one, other)]
    asked = [(s.serving.requests, s.serving.duration_s) if s.serving else None for s in (a, b)]
    for what, same in (
        ("seed", a.seed == b.seed),
        ("replicas", a.replicas == b.replicas),
        ("traffic", a.traffic == b.traffic and traces[0][0] == traces[1][0]),
        ("requests", asked[0] == asked[1] and traces[0][1] == traces[1][1]),
        ("model", a.model == b.model),
        ("parallel", a.parallel == b.parallel),
    ):
        if not same:
            return what
    return ""


def _welch(a: F64, b: F64) -> float:
    """Half-width of the 95 % interval of mean(b) - mean(a) for independent samples of unlike variance (Welch 1947)."""
    from scipy.special import stdtrit

    if len(a) < 2 or len(b) < 2:
        return math.nan
    of_a, of_b = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    if of_a + of_b == 0:
        return 0.0
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    return float(stdtrit(freedom, 0.975) * math.sqrt(of_a + of_b))


def changed_keys(results: Mapping[str, Result]) -> list[tuple[str, list[str]]]:
    """Return the keys of the resolved scenarios that are not the same everywhere, with their values run by run. Policies
    are known by their names, not by their numbers."""
    flat = [_flat(resolved_data(result.scenario)) for result in results.values()]
    keys = dict.fromkeys(key for one in flat for key in one)
    found = []
    for key in keys:
        values = [one.get(key, ABSENT) for one in flat]
        if len(set(values)) > 1:
            found.append((key, values))
    return found


def _flat(data: Any, path: str = "") -> dict[str, str]:
    """Return leaves by their dotted path."""
    if isinstance(data, dict) and data:
        items = [(str(key), value) for key, value in data.items()]
    elif isinstance(data, list) and data:
        named = path in ("policies", "serving.units") and all(isinstance(one, dict) for one in data)
        items = [(str(one["name"] if named else i), one) for i, one in enumerate(data)]
    else:
        return {path: str(data)}
    return {
        key: leaf for name, value in items for key, leaf in _flat(value, f"{path}.{name}" if path else name).items()
    }
