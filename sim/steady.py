"""What one replica's own time says of a metric: its mean in steady state, with an interval or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sim.located import nearest
from sim.scenario import Scenario
from sim.statistics import NotEnough
from sim.statistics import steady as steady_mean
from sim.tokens import F64
from sim.units import human

Table = dict[str, list[Any]]

# Metrics whose samples are rows of the requests table, or of the timeline (hundredths of the duration; one unit's, since
# units are added up or averaged by rules of their own).
_OF_REQUESTS = {f"{name}_mean_s": f"{name}_s" for name in ("ttft", "tpot", "e2e", "queued")}
_OF_TIMELINE = {"queue_mean": "queue", "running_mean": "running", "utilisation": "utilisation", "kv_mean": "kv"}
_OF_STEPS = {"max_vio_batch": "max_vio"}


class _Series(NamedTuple):
    """values [n] in the order of time. unit: what a sample is. seconds: of a sample, where known."""

    values: F64
    unit: str
    seconds: float = math.nan


def steady(tables: dict[str, Table], scenario: Scenario, metric: str, policy: str | None = None) -> Table:
    """Return columns policy, metric, mean, half_width, samples, unit, warm_up, autocorrelation_times, refusal.

    Of the first replica: samples are its steps, or requests in the order of arrival (means of TTFT, TPOT, end to end and
    queueing time) and hundredths of the duration (occupancy) where it serves; requests that arrived before
    ``serving.warmup_s`` count as warm-up. The mean is over what is left after the warm-up, so it may differ from the
    summary's. Without an interval (NaN) ``refusal`` says what is missing, else it is empty. Raises ValueError for a policy or
    metric that there is not.
    """
    names = [one.name for one in scenario.policies]
    if policy is not None and policy not in names:
        raise ValueError(f"no policy {policy!r}{_hint(policy, names)}")
    known = known_metrics(tables, scenario)
    if metric not in known:
        raise ValueError(f"no series of {metric!r} in time{_hint(metric, known)}; there are: {', '.join(known)}")
    out: Table = {}
    for name in names if policy is None else [policy]:
        series = _series(tables, scenario, metric, name)
        row: dict[str, Any] = {"policy": name, "metric": metric}
        try:
            found = steady_mean(series.values, series.unit)
            row |= _row(found.mean, found.half_width, found.samples, series.unit, found.warm_up, found.times, "")
        except NotEnough as error:
            why, n = str(error), len(series.values)
            if error.needed and not math.isnan(series.seconds):
                why += f", {human(error.needed * series.seconds, 's')}"
            row |= _row(float(series.values.mean()) if n else math.nan, math.nan, n, series.unit, 0, error.times, why)
        for column, value in row.items():
            out.setdefault(column, []).append(value)
    return out


def known_metrics(tables: dict[str, Table], scenario: Scenario) -> list[str]:
    """Return the metrics that have a series in time."""
    if scenario.serving is not None:
        one_unit = len(scenario.serving.units) == 1
        return [*_OF_REQUESTS, *(_OF_TIMELINE if one_unit else ())]
    table = tables.get("steps", {})
    plain = [name for name in table if name not in ("policy", "replica", "step")]
    return [*(key for key, column in _OF_STEPS.items() if column in table), *plain]


def _series(tables: dict[str, Table], scenario: Scenario, metric: str, policy: str) -> _Series:
    if scenario.serving is None:
        rows, column = list(_first_replica(tables["steps"], policy)), _OF_STEPS.get(metric, metric)
        values = _floats(tables["steps"], column, rows)
        step_s = _floats(tables["steps"], "step_time_s", rows)
        return _Series(values, "timed steps" if column.endswith("_s") else "steps", float(step_s.mean()) if len(step_s) else math.nan)  # fmt: skip
    begin_s, until_s = scenario.serving.warmup_s, scenario.serving.duration_s
    if metric in _OF_REQUESTS:
        table = tables["requests"]
        rows = [i for i in _first_replica(table, policy) if table["arrival_s"][i] >= begin_s]
        values = _floats(table, _OF_REQUESTS[metric], rows)
        arrival = [table["arrival_s"][i] for i in rows]
        span = arrival[-1] - arrival[0] if len(rows) > 1 else math.nan
        return _Series(values, "requests", span / max(1, len(values)))
    table = tables["timeline"]
    rows = [i for i in _first_replica(table, policy) if begin_s <= table["time_s"][i] < until_s]
    values = _floats(table, _OF_TIMELINE[metric], rows)
    return _Series(values, "hundredths of the duration", until_s / 100)


def _first_replica(table: Table, policy: str) -> Iterator[int]:
    for i, key in enumerate(zip(table.get("policy", []), table.get("replica", []), strict=True)):
        if key == (policy, 0):
            yield i


def _floats(table: Table, column: str, rows: list[int]) -> F64:
    """The known values of ``column`` in ``rows``."""
    values = np.array([math.nan if (v := table[column][i]) is None else v for i in rows], dtype=np.float64)
    return values[~np.isnan(values)]


def _row(mean: float, half: float, n: int, unit: str, cut: int, times: float, why: str) -> dict[str, Any]:
    return {
        "mean": mean, "half_width": half, "samples": n, "unit": unit, "warm_up": cut, "autocorrelation_times": times,
        "refusal": why,
    }  # fmt: skip


def _hint(name: str, known: list[str]) -> str:
    near = nearest(name, known)
    return f" (did you mean {near}?)" if near else ""
