"""Published figures against ours: every row of `sim.validation`, its error beside its bar.

As in `analysis.figures`, each function returns a Matplotlib figure; ``width_in`` is 7 inches for a page's width, 3.5 for a
column's. Rows are pairs (group, `sim.validation.Figure`), as `rows` collects them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from analysis.labels import label_points
from analysis.style import COLUMN_IN, FLOOR, STYLE, WIDTH_IN, colours, finished, legend_below, legend_shape, wrapped
from sim.validation import Figure as Row
from sim.validation import Inputs, groups

Rows = Sequence[tuple[str, Row]]
# Linear below this error [%], logarithmic above: most rows are far better than the worst.
LINEAR_PERCENT = 1.0
KINDS = {"prediction": "prediction", "calibration": "set on (calibration)", "derived": "follows from others (derived)"}
MARKS = {"prediction": "o", "calibration": "s", "derived": "^"}
BAR = "0.87"


def rows(scenarios: Path, data: Path | None = None, names: Sequence[str] | None = None) -> list[tuple[str, Row]]:
    """Recompute the rows of the validation groups ``names``, all by default. scenarios: the folder of the shipped files;
    data: recorded traces, without which some rows are left out. Raises KeyError for an unknown group."""
    known = groups()
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise KeyError(f"no group {unknown[0]!r}; there are {', '.join(known)}")
    inputs = Inputs(scenarios, data)
    return [(name, row) for name in known if names is None or name in names for row in known[name](inputs)]


def _frame(found: Rows) -> pd.DataFrame:
    """Return what the figures draw: errors and bars in % of the published value, signed."""
    table = []
    for group, row in found:
        error, bar = 100 * row.error, 100 * row.bar
        if row.published == 0:
            # Itself an error, which the bar bounds: in % already, or a fraction.
            error, bar = (row.error, row.bar) if row.unit == "%" else (error, bar)
        elif row.absolute:
            # In the row's own unit: over the published value it compares with the others.
            error, bar = error / abs(row.published), bar / abs(row.published)
        if row.relation != "equal" and row.published != 0 and row.passed:
            error = 0.0  # a bound that is kept
        table.append(
            {
                "group": group,
                "name": row.name,
                "published": row.published,
                "ours": row.ours,
                "error": error,
                "bar": bar,
                "kind": row.kind,
                "passed": row.passed,
            }
        )
    return pd.DataFrame(table)


def errors(found: Rows, *, width_in: float = WIDTH_IN) -> Figure:
    """Draw the error of every row in % of its published value on the grey span of its bar, a strip per group, rows by
    error. Full marks are predictions, hollow ones were set on (calibration) or follow from others (derived); misses are
    red crosses with their names.

    Bounds ("at most", "at least") stand at zero where they are kept; rows that are errors themselves stand there. Rows
    without an answer are counted as misses, but have no place. The scale is linear up to 1 % and logarithmic beyond.
    Raises ValueError without rows.
    """
    if not found:
        raise ValueError("no rows to draw")
    table = _frame(found)
    names = list(dict.fromkeys(table.group))
    wide = width_in > COLUMN_IN
    strips = [(name, table[table.group == name].sort_values("error", kind="stable")) for name in names]
    heights = [max(0.32, 0.021 * len(mine), 0.14 * int((~mine.passed).sum()) + 0.1) for _, mine in strips]
    limit = 1.25 * max(10.0, float(table.error.abs().max(skipna=True)))
    handles, known = _handles(table)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(strips),
            1,
            figsize=(width_in, 0.6 + sum(heights) + 0.06 * len(heights) + legend_shape(known, width_in)[1]),
            height_ratios=heights,
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        layout: Any = figure.get_layout_engine()
        layout.set(hspace=0.0, h_pad=0.015)
        for axis, (name, mine) in zip(axes[:, 0], strips, strict=True):
            _strip(axis, mine, limit)
            met = int(mine.passed.sum())
            label = f"{name.replace('_', ' ')}\n{met} of {len(mine)}"
            axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
        last = axes[-1, 0]
        last.set_xscale("symlog", linthresh=LINEAR_PERCENT, linscale=0.7)
        last.set_xlim(-limit, limit)
        decades = [10.0**power for power in range(1 + int(np.log10(limit)))]
        last.set_xticks([-tick for tick in decades[::-1]] + [0.0] + decades)
        last.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
        last.xaxis.set_minor_locator(NullLocator())
        last.tick_params(axis="x", labelbottom=True, length=3, labelsize=8 if wide else 7)
        last.set_xlabel("ours against published [%]")
        legend_below(figure, handles, known)
        for axis, (_, mine) in zip(axes[:, 0], strips, strict=True):
            _name_misses(axis, mine, 36 if wide else 22)
    return finished(figure)


def _strip(axis: Axes, mine: pd.DataFrame, limit: float) -> None:
    """Draw the rows of one group from the lowest error at the bottom to the highest."""
    y = np.arange(len(mine))
    reach = mine.bar.clip(upper=limit).to_numpy(float)
    axis.barh(y, 2 * reach, left=-reach, height=1.0, color=BAR, linewidth=0, zorder=0)
    axis.axvline(0, color=FLOOR, linewidth=0.7, zorder=1)
    blue, red = colours(4)[0], colours(4)[3]
    for kind, mark in MARKS.items():
        for passed in (True, False):
            at = ((mine.kind == kind) & (mine.passed == passed)).to_numpy()
            face = {} if kind == "prediction" else {"markerfacecolor": "white"}
            look: dict[str, Any] = {"marker": mark, "color": blue, "markersize": 3, **face}
            if not passed:
                look = {"marker": "X", "color": red, "markersize": 5}
            axis.plot(mine.error.to_numpy(float)[at], y[at], linestyle="", markeredgewidth=0.7, zorder=3, **look)
    axis.set_ylim(-0.8, len(mine) - 0.2)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.spines["bottom"].set_color("0.8")
    axis.tick_params(axis="x", length=0)


def _name_misses(axis: Axes, mine: pd.DataFrame, width: int) -> None:
    missed = np.flatnonzero(~mine.passed.to_numpy() & mine.error.notna().to_numpy())
    if len(missed):
        x, texts = (
            mine.error.to_numpy(float),
            [wrapped(name, 2 * width if width > 30 else 28) for name in mine.name.iloc[missed]],
        )
        texts = [text if len(text) <= 2 * width else text[: 2 * width - 1] + "…" for text in texts]
        label_points(axis, x[missed], missed.astype(float), texts, (x[missed], missed.astype(float)), room_pt=2)


def _handles(table: pd.DataFrame) -> tuple[list[Any], list[str]]:
    blue, red = colours(4)[0], colours(4)[3]
    handles: list[Any] = []
    known = []
    for kind, label in KINDS.items():
        if ((table.kind == kind) & table.passed).any():
            face = blue if kind == "prediction" else "white"
            handles.append(
                Line2D([], [], linestyle="", marker=MARKS[kind], color=blue, markerfacecolor=face, markersize=4)
            )
            known.append(label)
    if not table.passed.all():
        handles.append(Line2D([], [], linestyle="", marker="X", color=red, markersize=5))
        known.append("misses its bar")
    return [*handles, Patch(color=BAR)], [*known, "bar"]


def parity(found: Rows, *, width_in: float = WIDTH_IN) -> Figure:
    """Draw our figures against the published ones, both in the row's own unit, on logarithmic axes; the line is equality.

    Groups have a colour and a mark each; hollow are calibration and derived rows, crossed out what misses its bar. Rows
    that are bounds, or not positive, have no place here. Raises ValueError if none is left.
    """
    keep = [(group, row) for group, row in found if row.relation == "equal" and row.published > 0 and row.ours > 0]
    if not keep:
        raise ValueError("no row has a positive published figure")
    table = _frame(keep)
    names = list(dict.fromkeys(table.group))
    wide = width_in > COLUMN_IN
    missed = table[~table.passed]
    known = [*(name.replace("_", " ") for name in names), *(["misses its bar"] if len(missed) else [])]
    handles: list[Any] = []
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(
            figsize=(width_in, (3.6 if wide else 3.0) + legend_shape(known, width_in)[1]), layout="constrained"
        )
        for i, name in enumerate(names):
            colour, mark = colours(10)[i % 10], "osD^vP*<>p"[i % 10]
            mine = table[table.group == name]
            full = (mine.kind == "prediction").to_numpy()
            for at, face in ((full, colour), (~full, "white")):
                axis.plot(
                    mine.published[at], mine.ours[at], mark, color=colour, markerfacecolor=face, markersize=4, zorder=3
                )
            handles.append(Line2D([], [], linestyle="", marker=mark, color=colour, markersize=4))
        if len(missed):
            handles += axis.plot(
                missed.published, missed.ours, "x", color="black", markersize=7, markeredgewidth=0.8, zorder=4
            )
        ends = [0.5 * min(table.published.min(), table.ours.min()), 2 * max(table.published.max(), table.ours.max())]
        axis.plot(ends, ends, color=FLOOR, linewidth=0.8, zorder=1)
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        axis.set_xlabel("published [unit of the row]")
        axis.set_ylabel("ours [unit of the row]")
        legend_below(figure, handles, known)
    return finished(figure)


FIGURES: dict[str, Callable[[Any], Figure]] = {"validation_errors": errors, "validation_parity": parity}
