"""Figures of a run that serves requests: what users wait, how queues and caches fill, and what throughput costs them.

As in `analysis.figures`, each function takes a `sim.results.Result` and returns a Matplotlib figure; ``width_in`` is 7
inches for a page's width, 3.4 for a column's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

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
    policy_names,
    prefixed,
)
from sim.deployment import Serving
from sim.results import Result
from sim.tokens import F64

SERVED = "run a scenario with a serving block"
# Points of a curve, whatever the number of requests behind it.
POINTS = 400
# Largest over smallest time beyond which an axis is logarithmic.
DECADES = 20.0
ROWS = {
    "queue": ("queue\n[requests]", 1.0),
    "running": ("running\n[requests]", 1.0),
    "kv": ("KV cache\n[% full]", 100.0),
    "input_tokens_per_s": ("input\n[{}tokens/s]", 1.0),
    "output_tokens_per_s": ("output\n[{}tokens/s]", 1.0),
    "imbalance": ("imbalance\n[max/mean]", 1.0),
}
"""Columns of the timeline, with their labels and scales."""
SHADE = "0.9"
MOVED: Any = {"marker": "v", "markersize": 4}


def _serving(result: Result) -> Serving:
    if result.scenario.serving is None:
        raise Unfit(f"this result served no requests: {SERVED}")
    return result.scenario.serving


def latency_cdf(result: Result, *, width_in: float = WIDTH_IN) -> Figure:
    """Draw the share of requests whose time to first token, and whose time per later token, is at most so long. All
    replicas together, without requests of the warm-up and refused ones; grey lines are the SLO's.

    An axis is logarithmic where its times span more than a decade. Raises ValueError without served requests.
    """
    serving = _serving(result)
    table = filled(result, "requests", ("policy", "arrival_s", "ttft_s", "tpot_s", "refused"), SERVED)
    table = table[(table.arrival_s >= serving.warmup_s) & ~table.refused.astype(bool)]
    names = policy_names(result)
    wide = width_in > COLUMN_IN
    _, legend_in = legend_shape(names, width_in)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1 if wide else 2,
            2 if wide else 1,
            figsize=(width_in, (2.5 if wide else 4.0) + legend_in),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, (column, label, limit_s) in zip(
            axes.flat,
            [
                ("ttft_s", "time to first token", serving.slo.ttft_s),
                ("tpot_s", "time per output token", serving.slo.tpot_s),
            ],
            strict=True,
        ):
            _cdf(
                axis,
                {name: table[table.policy == name][column].dropna().to_numpy(float) for name in names},
                label,
                limit_s,
            )
        for axis in axes[:, 0]:
            axis.set_ylabel("share of requests [%]")
        legend_below(figure, [Line2D([], [], **line_style(i, len(names))) for i in range(len(names))], names)
    return finished(figure)


def _cdf(axis: Axes, times_s: dict[str, F64], label: str, limit_s: float | None) -> None:
    known = np.concatenate(list(times_s.values()))
    axis.set_ylim(0, 102)
    if not len(known):
        axis.text(0.5, 0.5, "no request has one", transform=axis.transAxes, ha="center", va="center", color=FLOOR)
        axis.set_xlabel(f"{label} [s]")
        return
    scale, unit = prefixed(float(np.quantile(known, 0.9)), "s")
    for i, times in enumerate(times_s.values()):
        if len(times):
            at = np.linspace(0, 1, min(len(times), POINTS))
            axis.plot(np.quantile(times, at) * scale, at * 100, **line_style(i, len(times_s)))
    if known.min() > 0 and known.max() > DECADES * known.min():
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
    if limit_s is not None:
        _slo(axis, limit_s * scale, f"SLO {limit_s * scale:g} {unit}")
    axis.set_xlabel(f"{label} [{unit}]")


def _slo(axis: Axes, limit: float, label: str) -> None:
    """Draw a limit, or say on which side it lies where the axis would have to grow much for it."""
    left, right = axis.get_xlim()
    end = 0.98
    if left <= limit <= right:
        axis.axvline(limit, color=FLOOR, linewidth=1, zorder=0)
        place = float(axis.transAxes.inverted().transform(axis.transData.transform((limit, 0)))[0])
        end = place - 0.01 if place > 0.6 else end
    else:
        label = f"← {label}" if limit < left else f"{label} →"
    axis.text(end, 0.03, label, transform=axis.transAxes, ha="right", fontsize=8, color=FLOOR)


def over_time(result: Result, *, width_in: float = WIDTH_IN) -> Figure:
    """Draw queue, running requests, occupied cache, token rates and imbalance of ranks over time, a column per serving
    unit; mean over replicas. Triangles: experts have moved, in some replica. Shaded: a fault.

    Rows in which no policy shows anything are left out. Raises ValueError without served requests.
    """
    serving = _serving(result)
    table = filled(result, "timeline", ("policy", "unit", "time_s", *ROWS), SERVED)
    shown = [column for column in ROWS if (table[column].fillna(0) > 0).any()]
    names, units = policy_names(result), list(dict.fromkeys(table.unit))
    clock_s, clock = (3600.0, "h") if serving.duration_s > 3 * 3600 else (1.0, "s")
    mean = table.assign(time=table.time_s / clock_s).groupby(["unit", "policy", "time"])[shown].mean()
    moves = _moves(result)
    handles: list[Any] = [Line2D([], [], **line_style(i, len(names))) for i in range(len(names))]
    known = list(names)
    if len(moves):
        handles.append(Line2D([], [], linestyle="", color=FLOOR, **MOVED))
        known.append("experts moved")
    if serving.faults:
        handles.append(Patch(color=SHADE))
        known.append("fault")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(shown),
            len(units),
            figsize=(width_in, 0.5 + 0.85 * len(shown) + legend_shape(known, width_in)[1]),
            sharex=True,
            sharey="row",
            squeeze=False,
            layout="constrained",
        )
        for row, column in zip(axes, shown, strict=True):
            label, scale = ROWS[column]
            if "{}" in label:
                scale, prefix = prefixed(float(mean[column].max()), "")
                label = label.format(f"{prefix} ".lstrip())
            for axis, unit in zip(row, units, strict=True):
                values = mean[column].loc[unit].unstack("policy") * scale
                _curves(axis, values, names)
                _faults(axis, serving, unit, clock_s)
                if column == "imbalance":
                    mine = moves[moves.unit == unit]
                    _triangles(axis, values, {n: mine[mine.policy == n].effective_s / clock_s for n in names})
                axis.yaxis.set_major_locator(MaxNLocator(3, min_n_ticks=2))
            row[0].set_ylabel(label, fontsize=8)
            row[0].set_ylim(bottom=1 if column == "imbalance" else 0)
        for axis, unit in zip(axes[0], units, strict=True):
            axis.set_title(unit, fontsize=8)
        for axis in axes[-1]:
            axis.set_xlabel(f"time [{clock}]")
            axis.xaxis.set_major_locator(MaxNLocator(5))
        figure.align_ylabels()
        legend_below(figure, handles, known)
    return finished(figure)


def _moves(result: Result) -> pd.DataFrame:
    """Return the rows of plans that moved experts before the run's end."""
    columns = ("policy", "unit", "done", "effective_s")
    table = pd.DataFrame(result.tables.get("rebalances") or {column: [] for column in columns})
    return table[table.done.astype(bool) & (table.effective_s <= _serving(result).duration_s)]


def _curves(axis: Axes, values: pd.DataFrame, names: Sequence[str]) -> None:
    """Draw a line per policy; values [time, policy]."""
    for i, name in enumerate(names):
        axis.plot(values.index, values[name], **line_style(i, len(names)) | {"linewidth": 1})


def _triangles(axis: Axes, values: pd.DataFrame, times: dict[str, pd.Series[float]]) -> None:
    """Mark ``times`` by policy on their curves."""
    for i, (name, moved) in enumerate(times.items()):
        if len(moved):
            at, mine = np.unique(moved.to_numpy(float)), values[name].dropna()
            y = np.interp(at, mine.index.to_numpy(float), mine.to_numpy(float))
            axis.plot(at, y, linestyle="", color=colours(len(times))[i], **MOVED)


def _faults(axis: Axes, serving: Serving, unit: str, clock_s: float) -> None:
    for fault in serving.faults:
        if fault.unit == unit:
            end_s = serving.duration_s if fault.until_s is None else fault.until_s
            axis.axvspan(fault.at_s / clock_s, end_s / clock_s, color=SHADE, linewidth=0, zorder=0)


def throughput_against_latency(result: Result, *, width_in: float = WIDTH_IN) -> Figure:
    """Show output tokens per second of a device against those that one user gets, a point per policy with 95 % intervals
    over replicas. Up and to the right is better.

    Raises ValueError without served requests, or if none has a second token.
    """
    _serving(result)
    user, device = by_policy(result, "user_tokens_per_s"), by_policy(result, "output_tokens_per_s_per_gpu")
    if not user["mean"].notna().any():
        raise Unfit("no request has a second token, so users see no rate")
    names = policy_names(result)
    _, legend_in = legend_shape(names, width_in)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(
            figsize=(width_in, (3.0 if width_in > COLUMN_IN else 2.4) + legend_in), layout="constrained"
        )
        handles = []
        # Smaller and smaller, so that equal points show as rings.
        sizes = np.linspace(9, 5, len(names))
        for i, (name, colour, size) in enumerate(zip(names, colours(len(names)), sizes, strict=True)):
            x, y = user.loc[name], device.loc[name]
            handles.append(
                axis.errorbar(
                    x["mean"],
                    y["mean"],
                    xerr=x["half_width"] if np.isfinite(x["half_width"]) else None,
                    yerr=y["half_width"] if np.isfinite(y["half_width"]) else None,
                    fmt=MARKERS[i % len(MARKERS)],
                    color=colour,
                    capsize=2.5,
                    elinewidth=1,
                    markersize=size,
                )
            )
        axis.margins(0.15)
        axis.set_xlabel("rate of one user [tokens/s]")
        axis.set_ylabel("output [tokens/s/GPU]")
        legend_below(figure, handles, names)
    return finished(figure)


FIGURES: dict[str, Callable[[Result], Figure]] = {
    "latency_cdf": latency_cdf,
    "over_time": over_time,
    "throughput_against_latency": throughput_against_latency,
}
