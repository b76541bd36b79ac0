"""The end of a sweep in the terminal: what was varied, what it did to the leading figure, who won."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from sim.aligned import grid
from sim.contest import yardsticks
from sim.report.grids import LEADING, Value, against_first, number
from sim.results import Metric
from sim.sweeping import Sweep

ROWS, POLICIES = 40, 6
_BESIDE = ("max_vio_batch", "imbalance_mean", "kept_affinity", "goodput_share", "output_tokens_per_s_per_gpu")


class Row(NamedTuple):
    """One policy at one point. head: the axes' values."""

    point: int
    head: list[Any]
    policy: str
    values: dict[str, Value]


def table(sweep: Sweep, rows: int = ROWS) -> str:
    """Return the table as text: a line for every policy of every point, or, where that is more than
    ``rows``, for every point; of more points than that, the best."""
    if not sweep.table.num_rows:
        return "no point has run"
    leading = _leading(sweep)
    beside = [metric for metric in sweep.metrics if metric.name in _BESIDE]
    found = _rows(sweep, [leading, *(metric for metric in beside if metric.name != leading.name)])
    notes: list[str] = []
    if len(found) > rows:
        text, notes = _side_by_side(sweep, found, leading, beside, rows)
    else:
        text = _all(sweep, found, leading, [metric.name for metric in beside])
    if averaged := _averaged(sweep):
        notes.append(averaged)
    if len(found) <= rows and len(sweep.policies) > 1:
        notes.append("Against first: paired differences to the point's first policy.")
    notes += [f"{key} changes no figure." for key in _idle(sweep)]
    if sweep.skipped:
        notes.append(f"Skipped points (see skipped.csv): {len(sweep.skipped)}.")
    return "\n".join([*text, "", " ".join(notes)]).rstrip()


def _averaged(sweep: Sweep) -> str:
    """What figures with ± are means over; of one replica there is none."""
    replicas: dict[int, int] = {}
    rows = sweep.table.select(["point", "replica"]).to_pydict()
    for point, replica in zip(rows["point"], rows["replica"], strict=True):
        replicas[point] = max(replicas.get(point, 0), replica + 1)
    least, most = min(replicas.values()), max(replicas.values())
    if most == 1:
        return ""
    if least == most:
        return f"Means, ± 95 % over {most} replicas."
    alone = "; points of one replica have no ±" if least == 1 else ""
    return f"Means, ± 95 % over the point's replicas ({least} to {most}{alone})."


def _all(sweep: Sweep, shown: list[Row], leading: Metric, beside: list[str]) -> list[str]:
    """A line for each policy of each point."""
    metrics = {metric.name: metric for metric in sweep.metrics}
    said = [name for name in beside if any(not math.isnan(row.values[name].mean) for row in shown)]
    columns = [leading, *(metrics[name] for name in said if name != leading.name)]
    several = len(sweep.policies) > 1
    head = [*short_keys(list(sweep.axes)), *(["policy"] if several else []), *(metric.label for metric in columns)]
    head += [f"{_name(leading)} against first"] if several else []
    lines, first = [], dict[int, str]()
    for row in shown:
        cells = [plain(value) for value in row.head] + ([row.policy] if several else [])
        cells += [_cell(row.values[metric.name], metric) for metric in columns]
        is_first = first.setdefault(row.point, row.policy) == row.policy
        lines.append(cells + ([against_first(row.values[leading.name], is_first)] if several else []))
    return grid(head, lines, left=(0, len(sweep.axes)))


def _side_by_side(
    sweep: Sweep, found: list[Row], leading: Metric, beside: Sequence[Metric], rows: int
) -> tuple[list[str], list[str]]:
    """A line for each point: its policies' leading figure, the best one marked; and notes. Of many points the best."""
    points: dict[int, dict[str, Row]] = {}
    for row in found:
        points.setdefault(row.point, {})[row.policy] = row
    blind = yardsticks(sweep.scenario) if len(sweep.policies) > 1 else frozenset()
    best = {
        point: min(
            [row for name, row in of.items() if name not in blind] or of.values(), key=lambda row: _rank(row, leading)
        )
        for point, of in points.items()
    }
    said = [
        metric
        for metric in beside
        if metric.name != leading.name and any(not math.isnan(row.values[metric.name].mean) for row in best.values())
    ]
    order = list(points)
    notes = [f"{leading.label} of every policy"]
    if len(points) > rows:
        order = sorted(order, key=lambda point: _rank(best[point], leading))[:rows]
        notes = [f"The {rows} points of {len(points)} with the best {leading.label}"]
    notes = [
        notes[0] + ", * the best of its point, with what it keeps; other figures and all rows are in the data set."
    ]
    policies = sweep.policies
    if len(policies) > POLICIES:
        wins = {name: sum(row.policy == name for row in best.values()) for name in policies}
        kept = sorted(policies[1:], key=lambda name: -wins[name])[: POLICIES - 1]
        policies = [name for name in policies if name == policies[0] or name in kept]
        notes.append(
            f"{len(policies)} of {len(sweep.policies)} policies: the first, and those that are best most often."
        )
    lines = []
    for point in order:
        cells = [plain(value) for value in best[point].head]
        for name in policies:
            if name not in points[point]:
                cells.append("")
                continue
            row = points[point][name]
            cells.append(_cell(row.values[leading.name], leading) + (" *" if row is best[point] else "  "))
        lines.append([*cells, *(_cell(best[point].values[metric.name], metric) for metric in said)])
    head = [*short_keys(list(sweep.axes)), *policies, *(f"{metric.label} of *" for metric in said)]
    return grid(head, lines), notes


def _idle(sweep: Sweep) -> list[str]:
    """Axes whose values make no difference wherever the others stay."""
    import pandas as pd

    runs = sweep.runs
    names = ["policy", "replica", *(metric.name for metric in sweep.metrics)]
    figures = (
        pd.util.hash_pandas_object(runs[names], index=False).groupby(runs["point"]).agg(lambda rows: hash(tuple(rows)))
    )
    at = runs.drop_duplicates("point").set_index("point")
    found = []
    for key in sweep.axes:
        others = [at[name] for name in sweep.axes if name != key] or [pd.Series(0, index=at.index)]
        groups = figures.groupby(others, dropna=False)
        compared = groups.size() > 1
        if compared.any() and (groups.nunique()[compared] == 1).all():
            found.append(key)
    return found


def _leading(sweep: Sweep) -> Metric:
    """The figure that matters first, of those that the sweep has."""
    import pyarrow.compute as pc

    metrics = {metric.name: metric for metric in sweep.metrics}
    for name in (*LEADING, "max_vio_batch"):
        if name in metrics and not pc.all(pc.is_nan(sweep.table.column(name))).as_py():
            return metrics[name]
    return sweep.metrics[0]


def _rows(sweep: Sweep, metrics: list[Metric]) -> list[Row]:
    data = sweep.summary_rows([metric.name for metric in metrics])
    found: dict[tuple[int, str], Row] = {}
    for i, (point, policy) in enumerate(zip(data["point"], data["policy"], strict=True)):
        row = found.setdefault((point, policy), Row(point, [data[key][i] for key in sweep.axes], policy, {}))
        row.values[data["metric"][i]] = Value(
            data["mean"][i], data["half_width"][i], data["difference"][i], data["difference_half_width"][i]
        )
    return list(found.values())


def _rank(row: Row, leading: Metric) -> float:
    mean = row.values[leading.name].mean
    return math.inf if math.isnan(mean) else -mean if leading.better == "higher" else mean


def _name(metric: Metric) -> str:
    return LEADING.get(metric.name, metric.label)


def short_keys(keys: list[str]) -> list[str]:
    """The last words of each key that tell it from the others."""
    found = []
    for key in keys:
        words = key.split(".")
        ends = (".".join(words[-n:]) for n in range(1, len(words) + 1))
        found.append(next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1))
    return found


def plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return value if len(value) <= 30 else value[:27] + "..."
    if isinstance(value, int | float) and not isinstance(value, bool):
        short = f"{value:.6g}"
        whole = float(value).is_integer() and abs(value) < 1e15
        return f"{value:.0f}" if whole and (abs(value) < 1e7 or float(short) != value) else short
    return json.dumps(value)


def _cell(value: Value, metric: Metric) -> str:
    text = number(value.mean, metric)
    if not math.isnan(value.half) and value.half > 1e-6 * abs(value.mean):
        text += f" ±{value.half * metric.scale:.2g}"
    return text
