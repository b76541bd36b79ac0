"""Figures of a sweep: how a metric moves along its axes, and how two metrics trade off over its points.

As in `analysis.figures`, each function returns a Matplotlib figure; ``width_in`` is 7 inches for a page's width, 3.5 for a
column's. A sweep is a `sim.sweeping.Sweep`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from analysis.metrics import axis_label, by_group, key_name, metric_named, runs_of, value_name
from analysis.style import (
    COLUMN_IN,
    MARKERS,
    STYLE,
    WIDTH_IN,
    finished,
    legend_below,
    legend_shape,
    line_style,
    prefixed,
    wrapped,
)
from analysis.tradeoffs import pareto

# Largest over smallest value from which a numeric axis is logarithmic.
WIDE_RANGE = 10.0
# Values of an axis up to which it makes panels, and ticks at each of them.
FEW = 6
UNITS = {
    "_price_per_hour": "USD/h",
    "_bytes_per_s": "B/s",
    "_flops_per_s": "FLOP/s",
    "_per_s": "1/s",
    "_bytes": "B",
    "_s": "s",
    "_w": "W",
}
"""Units of keys by how they end."""
PREFIXED = (" [B/s]", " [FLOP/s]", " [B]", " [s]")
"""Units that axes show with a prefix where that reads better."""
HEADLINES = ("step_time_s", "output_tokens_per_s_per_gpu", "input_tokens_per_s_per_gpu", "max_vio_batch")


def axes_of(sweep: Any) -> dict[str, list[Any]]:
    """Return the values that each axis of ``sweep`` takes in its runs, if several, as `runs_of` has them: numbers in their
    order, others as the sweep names them."""
    found, runs = {}, runs_of(sweep)
    for key, named in sweep.axes.items():
        there = dict.fromkeys(runs[key].tolist())
        known = [value for value in (_cell(value, there) for value in named) if value in there]
        values = list(dict.fromkeys([*known, *there]))
        if len(values) > 1:
            found[key] = sorted(values) if _numeric(values) else values
    return found


def _cell(value: Any, there: Iterable[Any]) -> Any:
    """Return ``value`` as a column has it whose cells are ``there``: in one of text, all that is no text is JSON."""
    text = all(isinstance(cell, str) for cell in there) and not isinstance(value, str)
    return json.dumps(value) if text else value


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def small_multiples(
    sweep: Any,
    x: str | None = None,
    metric: str | None = None,
    *,
    hue: str = "policy",
    col: str | None = None,
    row: str | None = None,
    width_in: float = WIDTH_IN,
) -> Figure:
    """Draw a metric along one axis of a sweep: a line per policy (or value of ``hue``) with its 95 % interval over
    replicas, a panel per value of two further axes.

    x, metric: by default the first axis, and the first of the usual questions that has an answer. Axes that are not named
    make columns, then rows. Axes of more than six values, as in designs that are no grid, make no panels: there every
    point is a dot, wherever the other axes stand. Axes are named by their whole key or its last part. Raises KeyError for an
    unknown axis or metric, and ValueError for a sweep without axes, or with more of them than panels can show.
    """
    runs, axes = runs_of(sweep), axes_of(sweep)
    if not axes:
        raise ValueError("no axis of this sweep takes several values")
    x = _axis(axes, x) if x else next(iter(axes))
    hue = hue if hue == "policy" else _axis(axes, hue)
    col, row = (name if name in (None, "policy") else _axis(axes, name) for name in (col, row))
    if metric is None:
        known = [name for name in HEADLINES if name in runs and runs[name].notna().any()]
        if not known:
            raise ValueError(f"name a metric: this sweep has none of {', '.join(HEADLINES)}")
        metric = known[0]
    found = metric_named(sweep.metrics, metric)
    if not runs[metric].notna().any():
        raise ValueError(f"no point of this sweep has {metric}")
    values = {"policy": list(dict.fromkeys(runs.policy)), **axes}
    left = [key for key in values if key not in (x, hue, col, row) and len(values[key]) > 1]
    dots = any(len(values[key]) > FEW for key in left)
    if not dots:
        col = col or (left.pop(0) if left else None)
        row = row or (left.pop(0) if left else None)
        if left:
            raise ValueError(
                f"too many axes for one figure; keep one value of {', '.join(left)}, or name hue, col and row"
            )
    keys = [key for key in dict.fromkeys((hue, col, row, x)) if key]
    table = by_group(runs, [*keys, *(["point"] if dots else [])], [found])
    return _multiples(table, values, (x, hue, col, row), axis_label(found), metric, width_in, dots=dots)


def _axis(axes: dict[str, list[Any]], name: str) -> str:
    """Return the key of the axis ``name``."""
    keys = [key for key in axes if name in (key, key_name(key))]
    if len(keys) != 1:
        raise KeyError(f"no axis {name!r}; there are {', '.join(axes)}")
    return keys[0]


def _multiples(
    table: pd.DataFrame,
    values: dict[str, list[Any]],
    keys: tuple[str, str, str | None, str | None],
    label: str,
    metric: str,
    width_in: float,
    *,
    dots: bool,
) -> Figure:
    x, hue, col, row = keys
    name, unit = key_name(x), _unit(x) if _numeric(values[x]) else " [setting]"
    if unit in PREFIXED:  # 12.5 GB/s instead of 1.25e+10 B/s
        scale, short = prefixed(max(values[x]), unit.strip(" []"))
        name = next((name.removesuffix(end) for end in UNITS if name.endswith(end)), name)
        unit, table = f" [{short}]", table.assign(**{x: table[x] * scale})
        values = values | {x: [value * scale for value in values[x]]}
    lines = values[hue]
    names = [str(line) if hue == "policy" else f"{key_name(hue)} {value_name(line)}" for line in lines]
    across, down = (values[key] if key else [None] for key in (col, row))
    wide = width_in > COLUMN_IN
    columns = len(across) if row else min(len(across), 4 if wide else 2)
    cells = list(itertools.product(down, across))
    rows = -(-len(cells) // columns)
    room = max(10, int((width_in - 0.6) / columns / 0.062))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(width_in, 0.4 + rows * (2.3 if columns < 3 and wide else 1.7) + legend_shape(names, width_in)[1]),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, (of_row, of_col) in zip(axes.flat, cells, strict=False):
            mine = table
            for key, value in ((row, of_row), (col, of_col)):
                mine = mine if key is None else mine[mine[key] == value]
            _lines(axis, mine, values, x, hue, metric, dots=dots)
            title = [
                str(value) if key == "policy" else f"{key_name(key)} {value_name(value)}"
                for key, value in ((row, of_row), (col, of_col))
                if key
            ]
            axis.set_title("\n".join(_broken(part, room) for part in title), fontsize=7.5)
        for i, axis in enumerate(axes.flat):
            _ticks(axis, values[x], columns, width_in)
            last = i < len(cells) <= i + columns
            axis.set_visible(i < len(cells))
            axis.tick_params(labelsize=8, labelbottom=last)
            if last:
                axis.set_xlabel(_broken(name + unit, room))
        figure.supylabel(wrapped(label, 34), fontsize=9, multialignment="center")
        handles = [_handle(i, len(lines), dots=dots) for i in range(len(lines))]
        legend_below(figure, handles, names)
    return finished(figure)


def _broken(text: str, width: int) -> str:
    """Break ``text`` as `wrapped` does, and words that are longer at their underscores."""
    if max(map(len, text.split())) <= width:
        return wrapped(text, width)
    return "\n".join(line.replace("_ ", "_") for line in wrapped(text.replace("_", "_ "), width).split("\n"))


def _unit(key: str) -> str:
    """Return the unit that a key ends in, in brackets: names carry theirs where they have one, or the mapping that holds
    them does (``peak_flops_per_s.fp8``).

    >>> _unit("cluster.device.price_per_hour"), _unit("cluster.device.peak_flops_per_s.fp8"), _unit("cluster.nodes")
    (' [USD/h]', ' [FLOP/s]', ' [1]')
    """
    for name in key.split(".")[:-3:-1]:
        for end, unit in UNITS.items():
            if f"_{name}".endswith(end):
                return f" [{unit}]"
    return " [tokens]" if "tokens" in key_name(key) else " [1]"


def _handle(i: int, n: int, *, dots: bool) -> Line2D:
    style = line_style(i, n) | ({"linestyle": ""} if dots else {})
    return Line2D([], [], marker=MARKERS[i % len(MARKERS)], markersize=4, **style)


def _lines(
    axis: Axes, table: pd.DataFrame, values: dict[str, list[Any]], x: str, hue: str, metric: str, *, dots: bool
) -> None:
    """Draw a line with its interval for every value of ``hue``; side by side where ``x`` has no order."""
    lines, numeric = values[hue], _numeric(values[x])
    for i, line in enumerate(lines):
        mine = table[table[hue] == line]
        at = (
            mine[x].to_numpy(float) if numeric else np.array([values[x].index(value) for value in mine[x]], dtype=float)
        )
        order = np.argsort(at, kind="stable")
        at = at[order] + (0.0 if numeric else 0.3 * ((i + 0.5) / len(lines) - 0.5))
        mean, half = (mine[name].to_numpy(float)[order] for name in (metric, f"{metric}_half"))
        style = line_style(i, len(lines)) | ({"linestyle": ""} if dots else {})
        axis.plot(at, mean, marker=MARKERS[i % len(MARKERS)], markersize=4, zorder=3, **style)
        if numeric and not dots:
            axis.fill_between(at, mean - half, mean + half, color=style["color"], alpha=0.18, linewidth=0)
        elif np.isfinite(half).any():
            axis.errorbar(at, mean, yerr=half, fmt="none", ecolor=style["color"], capsize=2, elinewidth=1)


def _ticks(axis: Axes, values: list[Any], columns: int, width_in: float) -> None:
    """Put ticks at the values where there are few; on a logarithmic axis where they span much."""
    panel_in = (width_in - 0.7) / columns
    if not _numeric(values):
        labels = [value_name(value) for value in values]
        fits = max(map(len, labels)) * 0.07 <= panel_in / len(values)
        turned: dict[str, Any] = {} if fits else {"rotation": 90}
        axis.set_xticks(range(len(values)), [name if len(name) <= 18 else name[:17] + "…" for name in labels], **turned)
        axis.set_xlim(-0.5, len(values) - 0.5)
        return
    span = values[-1] / values[0] if values[0] > 0 else 1.0
    if span >= WIDE_RANGE:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    if len(values) <= FEW:
        room = max(2, int(panel_in / (0.1 + 0.07 * max(len(value_name(value)) for value in values))))
        shown = values[:: -(-len(values) // room)]
        axis.set_xticks(shown, [value_name(value) for value in shown])
        axis.xaxis.set_minor_locator(NullLocator())
    elif span < WIDE_RANGE:
        axis.xaxis.set_major_locator(MaxNLocator(5 if columns < 3 else 3))


FIGURES: dict[str, Callable[[Any], Figure]] = {"small_multiples": small_multiples, "pareto": pareto}
