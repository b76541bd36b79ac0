"""What a choice buys and what it costs: points with intervals and their Pareto front, and how unevenly experts are loaded.

As in `analysis.figures`, each function returns a Matplotlib figure; ``width_in`` is 7 inches for a page's width, 3.5 for a
column's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.special import betaincinv, ndtri
from scipy.stats import binom

from analysis.labels import label_points
from analysis.metrics import Points, axis_label, front, key_name, metric_named, metrics_in, points, value_name
from analysis.style import (
    COLUMN_IN,
    FLOOR,
    MARKERS,
    STYLE,
    WIDTH_IN,
    Unfit,
    colours,
    filled,
    finished,
    legend_below,
    legend_shape,
    line_style,
    policy_named,
    policy_names,
    rank_ticks,
    wrapped,
)
from sim.results import Metric, Result
from sim.tokens import F64, Bool

# Points of a sweep's front that are named.
NAMED = 10
Line = tuple[float, float, float, float]
# Area of the largest mark and of one without a size [points squared].
LARGEST, PLAIN = 160.0, 36.0


def pareto(
    source: Any,
    x: str = "step_time_s",
    y: str = "kept_affinity",
    size: str | None = None,
    *,
    width_in: float = WIDTH_IN,
) -> Figure:
    """Scatter two metrics of the policies of a `Result`, or of the points and policies of a sweep, with 95 % intervals.

    The step line is the Pareto front: nothing measured lies on its better side. Points on it are named, in a sweep by the
    values of its axes where there is room. size: a third metric, as the area of the marks. A metric without a better
    direction has no front. Raises KeyError for an unknown metric and ValueError if nothing has both.
    """
    names = [x, y, *([size] if size else [])]
    metrics = {name: metric_named(metrics_in(source), name) for name in names}
    found = points(source, names)
    known = found.table[np.isfinite(found.table[[x, y]].to_numpy(float)).all(axis=1)]
    if known.empty:
        raise Unfit(f"nothing in this source has both {x} and {y}")
    found = Points(known.reset_index(drop=True), found.policies, found.axes)
    if found.axes:
        return _pareto(found, metrics, x, y, size, width_in, found.policies)[0]
    best = _front(found, metrics, x, y)
    aside = [name for name, on in zip(found.table.policy, best, strict=True) if not on]
    while True:
        figure, left_out = _pareto(found, metrics, x, y, size, width_in, aside)
        if not left_out:
            return figure
        aside = [name for name in found.policies if name in (*aside, *left_out)]


def _front(found: Points, metrics: dict[str, Metric], x: str, y: str) -> Bool:
    ways = metrics[x].better, metrics[y].better
    if "none" in ways:
        return np.zeros(len(found.table), dtype=bool)
    return front(found.table[x].to_numpy(float), found.table[y].to_numpy(float), ways)


def _pareto(
    found: Points, metrics: dict[str, Metric], x: str, y: str, size: str | None, width_in: float, legend: list[str]
) -> tuple[Figure, list[str]]:
    """Draw the points, with the policies of ``legend`` named below and other points of the front beside them; return the
    figure and the policies for whose names there was no room."""
    table, best = found.table, _front(found, metrics, x, y)
    area = _areas(table[size].to_numpy(float)) if size else np.full(len(table), PLAIN)
    handles, known = _legend(found, legend, None if size is None else (metrics[size], table[size].to_numpy(float)))
    legend_in = legend_shape(known, width_in)[1] if known else 0.0
    wide = width_in > COLUMN_IN
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(width_in, (3.2 if wide else 2.7) + legend_in), layout="constrained")
        for i, policy in enumerate(found.policies):
            rows = table.policy == policy
            colour, marker = _mark(found, i)
            for name in (x, y):
                half = table.loc[rows, f"{name}_half"].to_numpy(float)
                if np.isfinite(half).any():
                    way: dict[str, Any] = {"xerr" if name == x else "yerr": half}
                    axis.errorbar(
                        table.loc[rows, x],
                        table.loc[rows, y],
                        fmt="none",
                        ecolor=colour,
                        elinewidth=1,
                        capsize=2,
                        **way,
                    )
            axis.scatter(
                table.loc[rows, x],
                table.loc[rows, y],
                s=area[rows.to_numpy()],
                marker=marker,
                color=[colour],
                alpha=0.7 if size else 1.0,
                edgecolors="white",
                linewidths=0.5,
                zorder=3,
            )
        axis.margins(0.14)
        hints = {"lower": ("← better", "↓ better"), "higher": ("better →", "better ↑"), "none": ("", "")}
        axis.set_xlabel(with_hint(metrics[x], hints[metrics[x].better][0], 70 if wide else 36))
        axis.set_ylabel(with_hint(metrics[y], hints[metrics[y].better][1], 30 if wide else 24, upright=True))
        lines = _bars(table, x, y)
        if best.any():
            at = table.loc[best, x].to_numpy(float), table.loc[best, y].to_numpy(float)
            lines += step_line(axis, *at, metrics[x].better, metrics[y].better)
        if known:
            legend_below(figure, handles, known)
        named = _some(best, table[x].to_numpy(float)) if found.axes else best & ~table.policy.isin(legend).to_numpy()
        places = table.loc[named, x].to_numpy(float), table.loc[named, y].to_numpy(float)
        texts = [wrapped(_text(found, row), 20 if wide else 15) for row in np.flatnonzero(named)]
        all_points = table[x].to_numpy(float), table[y].to_numpy(float)
        room = float(np.sqrt(area.max()) / 2 + 1)
        left_out = set(label_points(axis, *places, texts, all_points, room_pt=room, lines=lines))
    missed = [table.policy[row] for row, text in zip(np.flatnonzero(named), texts, strict=True) if text in left_out]
    return finished(figure), [] if found.axes else missed


def with_hint(metric: Metric, hint: str, room: int, *, upright: bool = False) -> str:
    """Return the label of an axis and which way is better, on one line of ``room`` characters if that is enough; along an
    ``upright`` axis the hint has its own."""
    label = axis_label(metric)
    line = f"{label}   {hint}".rstrip()
    return line if len(line) <= room and not upright else f"{wrapped(label, room)}\n{hint}".rstrip()


def _mark(found: Points, i: int) -> tuple[Any, str]:
    return colours(len(found.policies))[i], MARKERS[i % len(MARKERS)]


def _areas(values: F64) -> F64:
    most = np.nanmax(values) if np.isfinite(values).any() else 1.0
    areas: F64 = np.nan_to_num(values / (most or 1.0)) * LARGEST + 4.0
    return areas


def _legend(found: Points, legend: list[str], size: tuple[Metric, F64] | None) -> tuple[list[Any], list[str]]:
    """Return handles and names of the policies in ``legend``, and the largest mark with the value it stands for."""
    handles, known = [], []
    for i, policy in enumerate(found.policies):
        if policy in legend:
            colour, marker = _mark(found, i)
            handles.append(Line2D([], [], linestyle="", marker=marker, color=colour, markersize=6))
            known.append(policy)
    if found.axes:
        handles.append(Line2D([], [], linestyle=""))
        known.append("labels: " + ", ".join(map(key_name, found.axes)))
    if size is not None and np.isfinite(size[1]).any():
        handles.append(Line2D([], [], linestyle="", marker="o", color=FLOOR, markersize=float(np.sqrt(LARGEST))))
        name, _, unit = axis_label(size[0]).removesuffix("]").partition(" [")
        known.append(f"area: {name}, here {np.nanmax(size[1]):.3g} {unit}")
    return handles, known


def _text(found: Points, row: Any) -> str:
    if not found.axes:
        return str(found.table.policy[row])
    return ", ".join(value_name(found.table[key][row]) for key in found.axes)


def _some(best: Bool, x: F64) -> Bool:
    """Return at most `NAMED` of the points that are ``best``, evenly along ``x``, its ends among them."""
    order = np.flatnonzero(best)[np.argsort(x[best], kind="stable")]
    named = np.zeros(len(x), dtype=bool)
    named[order[np.unique(np.linspace(0, len(order) - 1, min(NAMED, len(order))).round().astype(int))]] = True
    return named


def _bars(table: pd.DataFrame, x: str, y: str) -> list[Line]:
    """Return the intervals as lines, which names keep off."""
    lines = []
    for at_x, half_x, at_y, half_y in table[[x, f"{x}_half", y, f"{y}_half"]].fillna(0.0).to_numpy(float).tolist():
        lines += [(at_x - half_x, at_y, at_x + half_x, at_y), (at_x, at_y - half_y, at_x, at_y + half_y)]
    return lines


def step_line(axis: Axes, x: F64, y: F64, better_x: str, better_y: str) -> list[Line]:
    """Join the front by steps, from its best end in x to its worst, and on to the edges of ``axis``; return its pieces."""
    order = np.argsort(x if better_x == "lower" else -x, kind="stable")
    x, y = x[order], y[order]
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    corners = [(x[0], top if better_y == "lower" else bottom), (x[0], y[0])]
    for i in range(1, len(x)):
        corners += [(x[i], y[i - 1]), (x[i], y[i])]
    corners.append((right if better_x == "lower" else left, y[-1]))
    axis.plot(*zip(*corners, strict=True), color=FLOOR, linewidth=1, linestyle="--", zorder=1)
    axis.set(xlim=(left, right), ylim=(bottom, top))
    return [(*a, *b) for a, b in itertools.pairwise(corners)]


def sorted_loads(result: Result, layer: int | None = None, *, width_in: float = WIDTH_IN) -> Figure:
    """Draw the load of experts over the mean of their layer, sorted, all steps together: a curve per policy, mean over
    replicas and over MoE layers (or of one ``layer``).

    Grey: where 95 % of the layers of a uniformly random gate have their expert of that rank, at the same number of tokens
    (`uniform_order_statistics`). Raises KeyError for an unknown layer, ValueError if no policy has routed experts.
    """
    table = filled(
        result, "experts", ("policy", "replica", "layer", "expert", "tokens"), "no policy has routed experts"
    )
    layers = sorted(int(number) for number in table.layer.unique())
    if layer is not None and layer not in layers:
        raise KeyError(f"no layer {layer}; there are layers {layers}")
    if layer is not None:
        table = table[table.layer == layer]
    curves: dict[str, F64] = {}
    floors: dict[tuple[int, int, int], F64] = {}
    for name in [name for name in policy_names(result) if (table.policy == name).any()]:
        loads = [
            tokens.to_numpy(float) for _, tokens in table[table.policy == name].groupby(["replica", "layer"]).tokens
        ]
        curves[name] = np.mean([np.sort(load)[::-1] / max(load.mean(), 1e-12) for load in loads], axis=0)
        k = result.scenario.model_of(policy_named(result, name)).num_experts_per_tok
        key = (round(float(np.mean([load.sum() for load in loads]))) // k, len(curves[name]), k)
        floors.setdefault(key, uniform_order_statistics(*key, np.array([0.025, 0.975])))
    names = list(curves)
    handles: list[Any] = [Line2D([], [], **line_style(i, len(names))) for i in range(len(names))]
    known = [*names, "uniform gate, 95 %"]
    handles.append(Patch(color="0.8"))
    wide = width_in > COLUMN_IN
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(
            figsize=(width_in, (2.8 if wide else 2.4) + legend_shape(known, width_in)[1]), layout="constrained"
        )
        for low, high in floors.values():
            axis.fill_between(np.arange(1, len(low) + 1), low, high, color="0.8", linewidth=0, zorder=0)
        for i, curve in enumerate(curves.values()):
            axis.plot(np.arange(1, len(curve) + 1), curve, **line_style(i, len(names)))
        rank_ticks(axis, max(map(len, curves.values())))
        axis.set_ylim(bottom=0)
        axis.margins(x=0.02)
        where = "mean over MoE layers" if layer is None else f"layer {layer}"
        axis.set_xlabel(f"expert [rank by load], {where}")
        axis.set_ylabel("load [mean of layer = 1]")
        legend_below(figure, handles, known)
    return finished(figure)


def uniform_order_statistics(n_tokens: int, n_experts: int, k: int, quantiles: F64) -> F64:
    """Return [q, E] ``quantiles`` [q] of the loads over their mean, sorted from the largest, of E experts of which every
    token picks k different ones uniformly at random.

    The r-th smallest of E independent Binomial(T, k/E) loads is at most x with probability I_F(x)(r, E - r + 1), I the
    regularised incomplete beta function (order statistics of any sample, e.g. David and Nagaraja 2003, section 2.1). Loads
    of one batch sum to T k, hence depend weakly on each other; as in `sim.metrics.balance.uniform_max_vio`.

    >>> uniform_order_statistics(4096, 256, 8, np.array([0.5]))[0, [0, 127, 255]].round(2).tolist()
    [1.25, 1.0, 0.77]
    """
    if n_tokens == 0 or k >= n_experts:
        return np.ones((len(quantiles), n_experts))
    rank = np.arange(n_experts, 0, -1)
    at = betaincinv(rank, n_experts - rank + 1, np.asarray(quantiles)[:, None])
    p = k / n_experts
    if n_tokens * p > 1e4:  # where whole numbers no longer show, and their quantiles take long
        loads = n_tokens * p + np.sqrt(n_tokens * p * (1 - p)) * ndtri(at)
    else:
        loads = binom.ppf(at, n_tokens, p)
    return np.asarray(loads / (n_tokens * p), dtype=np.float64)


FIGURES: dict[str, Callable[[Any], Figure]] = {"pareto": pareto, "sorted_loads": sorted_loads}
