"""How balance develops over steps, and over what it holds: controllers that settle, experts that die, scopes of balance.

As in `analysis.figures`, each function returns a Matplotlib figure; ``width_in`` is 7 inches for a page's width, 3.5 for a
column's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from analysis.style import (
    COLUMN_IN,
    FLOOR,
    MARKERS,
    STYLE,
    WIDTH_IN,
    Unfit,
    by_policy,
    colours,
    filled,
    finished,
    legend_below,
    legend_shape,
    line_style,
    policy_named,
    policy_names,
    row_in,
    wrapped,
)
from sim.metrics.dynamics import settling_step
from sim.results import Result
from sim.tokens import F64

GATED = "no policy of this result has routed experts"
# Points of a curve: longer runs are drawn as means of equal blocks of steps.
POINTS = 100
STOP: Any = {"marker": "v", "markersize": 5, "linestyle": ""}
SETTLED: Any = {"marker": "o", "markersize": 6, "fillstyle": "none", "linestyle": "", "markeredgewidth": 1.3}


def settling(source: Result | Mapping[str, Result], policy: str | None = None, *, width_in: float = WIDTH_IN) -> Figure:
    """Draw MaxVio of each step's batch on a logarithmic axis, mean over MoE layers and replicas: a curve per policy of a
    result, or per result of a mapping from labels (values of a parameter, say) to results.

    policy: of each result of a mapping; by default its last one. Rings: the step from which the ten-step mean stays within
    a factor 1.25 of its final level, where the curve gets there (`sim.metrics.dynamics.settling_step`, the same rule as the
    summary's, here of the mean curve). Triangles: a bias stops being updated. Dotted: the uniform floor. Raises KeyError
    for an unknown policy and ValueError if no policy has routed experts.
    """
    curves, floors, stops = _max_vio(source, policy)
    names = list(curves)
    handles: list[Any] = [Line2D([], [], **line_style(i, len(names))) for i in range(len(names))]
    known = list(names)
    settled = {name: settling_step(curve) for name, curve in curves.items()}
    if np.isfinite(list(settled.values())).any():
        handles.append(Line2D([], [], color=FLOOR, **SETTLED))
        known.append("settled")
    if stops:
        handles.append(Line2D([], [], color=FLOOR, **STOP))
        known.append("bias stops")
    handles.append(Line2D([], [], color=FLOOR, linestyle=":"))
    known.append("uniform gate")
    wide = width_in > COLUMN_IN
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(
            figsize=(width_in, (2.9 if wide else 2.4) + legend_shape(known, width_in)[1]), layout="constrained"
        )
        for i, (name, curve) in enumerate(curves.items()):
            style = line_style(i, len(names))
            x, y = _blocks(curve)
            axis.plot(x, np.maximum(y, 1e-4), **style)
            for at, mark in ((settled[name], SETTLED), (stops.get(name, np.nan), STOP)):
                if np.isfinite(at) and 0 < at < len(curve):
                    axis.plot(at, max(float(np.interp(at, x, y)), 1e-4), color=style["color"], zorder=4, **mark)
        for floor in sorted(floors):
            axis.axhline(floor, color=FLOOR, linestyle=":", linewidth=1)
        _log(axis)
        axis.set_xlabel("step [batches]")
        axis.set_ylabel("MaxVio of a batch" + (" " if wide else "\n") + "[max/mean - 1]")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.margins(x=0.02)
        legend_below(figure, handles, known)
    return finished(figure)


def _max_vio(
    source: Result | Mapping[str, Result], policy: str | None
) -> tuple[dict[str, F64], set[float], dict[str, float]]:
    """Return the curves [steps] by label, the floors, and the step at which a bias stops, where one does."""
    if isinstance(source, Result):
        asked = [(name, source, name) for name in policy_names(source) if policy in (None, name)]
    else:
        asked = [(label, result, policy or policy_names(result)[-1]) for label, result in source.items()]
    curves: dict[str, F64] = {}
    floors: set[float] = set()
    stops: dict[str, float] = {}
    for label, result, name in asked:
        if name not in policy_names(result):
            raise KeyError(f"no policy {name!r}; there are {', '.join(policy_names(result))}")
        steps = filled(result, "steps", ("policy", "step", "max_vio", "max_vio_floor"), GATED)
        mine = steps[(steps.policy == name) & steps.max_vio.notna()]
        if len(mine):
            curves[label] = mine.groupby("step").max_vio.mean().to_numpy(float)
            floors |= set(mine.max_vio_floor.dropna().round(9))
            found = [getattr(rule, "stop_after_step", None) for rule in policy_named(result, name).balance]
            ends = [float(stop) for stop in found if stop is not None]
            if ends:
                stops[label] = max(ends)
    if not curves:
        raise Unfit(GATED if policy is None else f"{policy}: no routed experts")
    return curves, floors, stops


def _blocks(values: F64) -> tuple[F64, F64]:
    """Return x and mean of equal blocks of steps, at most `POINTS` of them."""
    edges = np.unique(np.linspace(0, len(values), min(len(values), POINTS) + 1).astype(int))
    width = np.diff(edges)
    return edges[:-1] + (width - 1) / 2, np.add.reduceat(values, edges[:-1]) / width


def _log(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axis.get_ylim()
    few = high / low < 60
    axis.yaxis.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:.2g}" if few and f"{value:e}"[0] in "25" else "")
    )


def collapse(result: Result, *, width_in: float = WIDTH_IN) -> Figure:
    """Show whether experts die: MaxVio and the load of the least-used expert over steps, mean over replicas and MoE layers
    with the range of layers shaded, and below, the share of experts that got little of the whole run.

    Dead experts have less than 1 % of the mean load over all steps, starved ones less than 10 %; intervals are 95 % over
    replicas. Raises ValueError if no policy has routed experts.
    """
    layers = filled(result, "layers", ("policy", "replica", "step", "layer", "max_vio", "least_share"), GATED)
    names = [name for name in policy_names(result) if (layers.policy == name).any()]
    wide = width_in > COLUMN_IN
    labels = [wrapped(name, 26 if wide else 16) for name in names]
    bars_in = 0.7 * row_in(labels) * len(names) + 0.6
    panels = (("max_vio", "MaxVio of a batch\n[max/mean - 1]"), ("least_share", "least-used expert\n[mean = 1]"))
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(width_in, (2.1 if wide else 3.4) + bars_in + 0.4), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(2.1 if wide else 3.4, bars_in))
        above, below = parts
        axes = above.subplots(1 if wide else 2, 2 if wide else 1, sharex=True, squeeze=False)
        for axis, (column, label) in zip(axes.flat, panels, strict=True):
            for i, name in enumerate(names):
                by_layer = (
                    layers[layers.policy == name]
                    .groupby(["step", "layer"])[column]
                    .mean()
                    .unstack("layer")
                    .astype(float)
                )
                x, mean = _blocks(by_layer.mean(axis=1).to_numpy(float))
                style = line_style(i, len(names))
                axis.plot(x, mean, **style)
                if by_layer.shape[1] > 1:
                    low, high = (_blocks(by_layer.agg(of, axis=1).to_numpy(float))[1] for of in ("min", "max"))
                    axis.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
            axis.set_ylim(bottom=0)
            axis.set_ylabel(label)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.margins(x=0.02)
        for axis in axes[-1]:
            axis.set_xlabel("step [batches]")
        _starved(below.subplots(), result, names, labels, width_in)
    return finished(figure)


def _starved(axis: Axes, result: Result, names: list[str], labels: list[str], width_in: float) -> None:
    """Draw two bars per policy, dead within starved; the stub at the left is its line above."""
    rows, inch = np.arange(len(names))[::-1], 1 / (width_in - 1.9)  # in widths of the axis, about
    dead, starved = (by_policy(result, metric).loc[names] * 100 for metric in ("starved_1pct", "starved_10pct"))
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        style = line_style(i, len(names))
        axis.barh(row, starved["mean"][name], color=style["color"], alpha=0.4, height=0.6)
        axis.barh(row, dead["mean"][name], color=style["color"], height=0.6)
        half = starved["half_width"][name]
        if np.isfinite(half):
            axis.errorbar(starved["mean"][name], row, xerr=half, fmt="none", ecolor="0.2", capsize=2, elinewidth=1)
        axis.plot([-0.3 * inch, -0.05 * inch], [row, row], transform=axis.get_yaxis_transform(), clip_on=False, **style)
    axis.set_yticks(rows, labels)
    axis.tick_params(axis="y", length=0, pad=32, labelsize=8)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlim(0, max(5.0, 1.1 * float(np.nanmax(starved["mean"] + starved["half_width"].fillna(0)))))
    axis.set_xlabel(
        wrapped("experts below 10 % of the mean load (dark: below 1 %) [%]", 64 if width_in > COLUMN_IN else 24)
    )


SCOPES = {
    "max_vio_sequence": "a sequence",
    "max_vio_micro_batch": "a micro-batch",
    "max_vio_batch": "a batch",
    "max_vio_global": "all steps",
    "topic_max_vio": "a topic",
}


def scopes(result: Result, *, width_in: float = WIDTH_IN) -> Figure:
    """Show over what each policy balances: MaxVio within a sequence, a micro-batch, a batch, over all steps, and among the
    tokens of a topic; a mark per policy with its 95 % interval, grey ticks the floor of a uniformly random gate.

    Low for a batch and high for a topic means that experts specialise though loads are even. Scopes that were not measured
    are left out. Raises ValueError if no policy has routed experts.
    """
    names = policy_names(result)
    found = {scope: by_policy(result, scope) for scope in SCOPES}
    shown = [scope for scope, data in found.items() if data["mean"].notna().any()]
    if not shown:
        raise Unfit(GATED)
    known = [*names, "uniform gate"]
    handles: list[Any] = []
    wide = width_in > COLUMN_IN
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(
            figsize=(width_in, (2.8 if wide else 2.5) + legend_shape(known, width_in)[1]), layout="constrained"
        )
        summary = result.summary()
        for i, (name, colour) in enumerate(zip(names, colours(len(names)), strict=True)):
            x = np.arange(len(shown)) + 0.6 * ((i + 0.5) / len(names) - 0.5)
            mean, half = (
                np.array([found[scope][of][name] for scope in shown], dtype=float) for of in ("mean", "half_width")
            )
            look: dict[str, Any] = {"fmt": MARKERS[i % len(MARKERS)], "color": colour, "capsize": 2, "markersize": 5}
            handles.append(axis.errorbar(x, mean, yerr=np.nan_to_num(half), elinewidth=1, **look))
        for at, scope in enumerate(shown):
            floor: pd.Series[float] = summary[summary.metric == f"{scope}_floor"]["mean"].dropna()
            for value in floor.round(9).unique():
                axis.plot([at - 0.36, at + 0.36], [value, value], color=FLOOR, linestyle=":", linewidth=1.4, zorder=1)
        for edge in np.arange(len(shown) - 1) + 0.5:
            axis.axvline(edge, color="0.9", linewidth=0.8, zorder=0)
        _log(axis)
        axis.set_xticks(range(len(shown)), [wrapped(SCOPES[scope], 14 if wide else 8) for scope in shown], fontsize=8)
        axis.set_xlim(-0.5, len(shown) - 0.5)
        axis.set_xlabel("MaxVio within [scope]")
        axis.set_ylabel("MaxVio [max/mean - 1]")
        handles.append(Line2D([], [], color=FLOOR, linestyle=":", linewidth=1.4))
        legend_below(figure, handles, known)
    return finished(figure)


FIGURES: dict[str, Callable[[Any], Figure]] = {"settling": settling, "collapse": collapse, "scopes": scopes}
