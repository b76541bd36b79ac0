"""What an optimiser found: all trials, and those that no other beats in every goal.

As in `analysis.figures`, the function returns a Matplotlib figure; ``width_in`` is 7 inches for a page's width, 3.5 for a
column's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.labels import label_points
from analysis.metrics import key_name, value_name
from analysis.style import COLUMN_IN, FLOOR, MARKERS, STYLE, WIDTH_IN, colours, finished, legend_below, legend_shape
from analysis.tradeoffs import step_line, with_hint
from sim.optimizing.front import Front
from sim.optimizing.goals import Goal
from sim.optimizing.search import Trial

# Trials of a front that are named, and goals that are drawn against the first.
NAMED, MOST_GOALS = 8, 4


def search(found: Front, *, width_in: float = WIDTH_IN) -> Figure:
    """Draw every trial by the first goal and each other one, a panel per pair: large on the front, small and pale if feasible,
    crosses if not. Points on the front have 95 % intervals over replicas and the values of the axes beside them.

    With two goals the step line is the front; with more, a point on it may be beaten in one panel for the sake of another.
    Dotted: limits. The star is the compromise (`Front.best`). One goal is drawn over the number of the trial. Raises
    ValueError if no trial ran.
    """
    table = found.trials
    first, others = found.goals[0], list(found.goals[1:MOST_GOALS])
    if table.empty or not np.isfinite(table[first.metric.name].to_numpy(float)).any():
        raise ValueError("no trial of this search has run")
    best = {trial.index for trial in found.best_of_all}
    table = table.assign(front=table.trial.isin(best))
    policies = list(dict.fromkeys(table.policy))
    handles, known = _legend(found, table, policies)
    wide = width_in > COLUMN_IN
    pairs: list[Goal | None] = [*others] or [None]
    columns = min(len(pairs), 2 if wide else 1)
    rows = -(-len(pairs) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(width_in, rows * (3.0 if columns == 1 and wide else 2.5) + legend_shape(known, width_in)[1]),
            squeeze=False,
            layout="constrained",
        )
        for axis, other in zip(axes.flat, pairs, strict=False):
            _panel(axis, found, table, policies, (None, first) if other is None else (first, other))
        for axis in axes.flat[len(pairs) :]:
            axis.set_visible(False)
        legend_below(figure, handles, known)
        for axis, other in zip(axes.flat, pairs, strict=False):
            _names(axis, found, table, (None, first) if other is None else (first, other))
    return finished(figure)


def _values(table: pd.DataFrame, goal: Goal | None, *, half: bool = False) -> Any:
    if goal is None:
        return table.trial.to_numpy(float) * (0.0 if half else 1.0)
    name = goal.metric.name + ("_half_width" if half else "")
    return table[name].to_numpy(float) * goal.metric.scale


def _panel(axis: Axes, found: Front, table: pd.DataFrame, policies: list[str], goals: tuple[Goal | None, Goal]) -> None:
    for i, policy in enumerate(policies):
        colour, mark = colours(len(policies))[i], MARKERS[i % len(MARKERS)]
        mine = table[table.policy == policy]
        feasible, front = mine.feasible.to_numpy(bool), mine.front.to_numpy(bool)
        looks: tuple[tuple[Any, dict[str, Any]], ...] = (
            (~feasible, {"marker": "x", "color": "0.7", "markersize": 4}),
            (feasible & ~front, {"marker": mark, "color": colour, "markersize": 3.5, "alpha": 0.45}),
            (
                front,
                {
                    "marker": mark,
                    "color": colour,
                    "markersize": 6.5,
                    "zorder": 4,
                    "markeredgecolor": "black",
                    "markeredgewidth": 0.6,
                },
            ),
        )
        for at, look in looks:
            x, y = (_values(mine[at], goal) for goal in goals)
            axis.plot(x, y, linestyle="", **look)
        best = mine[front]
        errors = [np.nan_to_num(_values(best, goal, half=True)) for goal in goals]
        x, y = (_values(best, goal) for goal in goals)
        axis.errorbar(x, y, xerr=errors[0], yerr=errors[1], fmt="none", ecolor=colour, elinewidth=0.9)
    chosen = found.best
    if chosen is not None and len(found.goals) > 1:
        star = table[table.trial == chosen.index]
        axis.plot(*(_values(star, goal) for goal in goals), "*", color="black", markersize=5, zorder=6)
    axis.margins(0.12)
    if len(found.goals) == 2 and table.front.any():
        ways = ["higher" if goal is not None and goal.maximize else "lower" for goal in goals]
        at = _values(table[table.front], goals[0]), _values(table[table.front], goals[1])
        step_line(axis, *at, ways[0], ways[1])
    arrows = (("← better", "better →"), ("↓ better", "better ↑"))
    x, y = goals
    axis.set_xlabel("trial [number]" if x is None else with_hint(x.metric, arrows[0][x.maximize], 36))
    axis.set_ylabel(with_hint(y.metric, arrows[1][y.maximize], 24, upright=True))
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    for limit in found.limits:
        bound = limit.bound * limit.metric.scale
        if goals[0] is not None and limit.metric == goals[0].metric and left <= bound <= right:
            axis.axvline(bound, color=FLOOR, linestyle=":", linewidth=1)
        if limit.metric == goals[1].metric and bottom <= bound <= top:
            axis.axhline(bound, color=FLOOR, linestyle=":", linewidth=1)


def _names(axis: Axes, found: Front, table: pd.DataFrame, goals: tuple[Goal | None, Goal]) -> None:
    """Write the values of the axes beside some of the front's points, those at one place together."""
    best = table[table.front].sort_values(found.goals[0].metric.name, kind="stable")
    if best.empty or not found.axes:
        return
    trials = {trial.index: trial for trial in found.best_of_all}
    figures = [goal.metric.name for goal in found.goals]
    places = [list(group.trial) for _, group in best.groupby(figures, sort=False)]
    shown = np.unique(np.linspace(0, len(places) - 1, min(NAMED, len(places))).round().astype(int))
    texts = [_values_of(found, [trials[index] for index in places[i]]) for i in shown]
    some = best.set_index("trial", drop=False).loc[[places[i][0] for i in shown]]
    x, y = (_values(some, goal) for goal in goals)
    at_x, at_y = (_values(best, goal) for goal in goals)
    half_x, half_y = (np.nan_to_num(_values(best, goal, half=True)) for goal in goals)
    level = zip(at_x - half_x, at_y, at_x + half_x, at_y, strict=True)
    upright = zip(at_x, at_y - half_y, at_x, at_y + half_y, strict=True)
    pale_x, pale_y = (_values(table[~table.front], goal) for goal in goals)
    pale = [at for at in zip(pale_x, pale_y, pale_x, pale_y, strict=True) if np.isfinite(at).all()]
    label_points(axis, x, y, texts, (at_x, at_y), lines=[*level, *upright, *pale])


def _values_of(found: Front, trials: list[Trial]) -> str:
    """Return the values of every axis in ``trials``: "any" where it makes no difference to them."""
    said = []
    for i, key in enumerate(found.axes):
        felt = [value_name(t.place.values[i]) for t in trials if key not in found.idle.get(t.index, ())]
        names = list(dict.fromkeys([*([] if len(felt) == len(trials) else ["any"]), *felt]))
        said.append("/".join(names) if len(names) < 4 else f"{names[0]}…{names[-1]}")
    return ", ".join(said)


def _legend(found: Front, table: pd.DataFrame, policies: list[str]) -> tuple[list[Any], list[str]]:
    handles: list[Any] = [
        Line2D([], [], linestyle="", marker=MARKERS[i % len(MARKERS)], color=colours(len(policies))[i], markersize=6)
        for i in range(len(policies))
    ]
    known = list(policies)
    if not table.feasible.all():
        handles.append(Line2D([], [], linestyle="", marker="x", color="0.7"))
        known.append("not feasible")
    if found.best is not None and len(found.goals) > 1:
        handles.append(Line2D([], [], linestyle="", marker="*", color="black"))
        known.append("compromise")
    if found.axes:
        handles.append(Line2D([], [], linestyle=""))
        known.append("labels: " + ", ".join(map(key_name, found.axes)))
    return handles, known


FIGURES: dict[str, Callable[..., Figure]] = {"search": search}
