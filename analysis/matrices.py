"""Traffic matrices as figures: bytes from device to device and node to node, and how long links are busy with them.

Each takes a `sim.results.Result` of a run with ``steps.record_traffic: true`` and returns a Matplotlib figure, as in
`analysis.figures`; ``width_in`` is 7 inches for a page's width, 3.4 for a column's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.style import (
    COLUMN_IN,
    STYLE,
    WIDTH_IN,
    Unfit,
    asked_policies,
    filled,
    finished,
    legend_below,
    legend_shape,
    line_style,
    panels,
    policy_named,
    policy_names,
    prefixed,
    rank_ticks,
    wrapped,
)
from sim.results import Result
from sim.tokens import F64

TRAFFIC = "run with steps.record_traffic: true"


def device_matrix(
    result: Result, policies: Sequence[str] | str | None = None, *, replica: int = 0, width_in: float = WIDTH_IN
) -> Figure:
    """Map the bytes from every device to every other in one replica's last step, dispatch and combine together, one panel
    per policy; lines part the nodes. What stays on a device is on the diagonal.

    Raises KeyError for an unknown policy or replica, ValueError without recorded traffic.
    """
    columns = ("source", "destination", "dispatch_bytes", "combine_bytes")
    found = _matrices(result, "pairs", columns, policies, replica)
    return _maps(result, found, "device", width_in, numbers=False)


def node_matrix(
    result: Result, policies: Sequence[str] | str | None = None, *, replica: int = 0, width_in: float = WIDTH_IN
) -> Figure:
    """As `device_matrix` between nodes, as it crosses (normal mode: one copy per token and node), with the numbers in the
    cells where they fit; the diagonal stays inside a node."""
    columns = ("source_node", "destination_node", "dispatch_bytes", "combine_bytes")
    found = _matrices(result, "node_pairs", columns, policies, replica)
    return _maps(result, found, "node", width_in, numbers=True)


def _matrices(
    result: Result, name: str, columns: Sequence[str], policies: Sequence[str] | str | None, replica: int
) -> dict[str, F64]:
    """Return [source, destination] bytes both ways by policy: a dispatch goes there, its combine comes back."""
    asked = asked_policies(result, policies)
    table = filled(result, name, ("policy", "replica", *columns), TRAFFIC)
    table = table[table.replica == replica]
    found = {}
    for policy in asked:
        rows = table[table.policy == policy]
        if len(rows):
            there, back = (
                rows.pivot(index=columns[0], columns=columns[1], values=c).to_numpy(float) for c in columns[2:]
            )
            found[policy] = there + back.T
    if not found:
        raise KeyError(f"no recorded traffic of {', '.join(asked)} in replica {replica}")
    return found


def _maps(result: Result, found: dict[str, F64], what: str, width_in: float, *, numbers: bool) -> Figure:
    """Draw a panel per policy on one scale from zero."""
    most = max(float(matrix.max()) for matrix in found.values())
    scale, unit = prefixed(most, "B")
    rows, columns = panels(len(found), width_in)
    panel_in = min(3.0, (width_in - 1.15) / columns - 0.15)
    fits = numbers and panel_in / max(len(matrix) for matrix in found.values()) >= 0.23
    titles = {name: wrapped(name, max(12, int(16 * panel_in))) for name in found}
    title_in = 0.14 * (1 + max(title.count("\n") for title in titles.values()))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(
                min(width_in, 1.5 + columns * (panel_in + 0.15)),
                max(2.1, 0.45 + rows * (panel_in + title_in + 0.15)),
            ),
            squeeze=False,
            layout="constrained",
        )
        image: Any = None
        for i, (axis, (name, matrix)) in enumerate(zip(axes.flat, found.items(), strict=False)):
            image = axis.imshow(matrix * scale, cmap="viridis", vmin=0, vmax=most * scale, interpolation="nearest")
            if fits:
                _write(axis, matrix * scale, most * scale)
            elif what == "device":
                size = _ranks_per_node(result, name)
                for edge in np.arange(size, len(matrix), size) - 0.5:
                    axis.axhline(edge, color="white", linewidth=0.7)
                    axis.axvline(edge, color="white", linewidth=0.7)
            axis.set_title(titles[name], fontsize=8)
            axis.tick_params(labelsize=8, length=2)
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
            alike = len({m.shape for m in found.values()}) == 1
            axis.tick_params(
                labelbottom=i + columns >= len(found) or not alike, labelleft=i % columns == 0 or not alike
            )
        for axis in axes.flat[len(found) :]:
            axis.set_visible(False)
        x, y = f"receiving {what} [index]", f"sending {what} [index]"
        if len(found) == 1:
            axes[0, 0].set(xlabel=x, ylabel=y)
        else:
            figure.supxlabel(x, fontsize=9)
            figure.supylabel(y, fontsize=9)
        bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 1.6 / rows + 0.3), aspect=18 * rows**0.5)
        bar.ax.tick_params(labelsize=8)
        bar.set_label(f"a step's dispatch\nand combine [{unit}]", fontsize=8)
    return finished(figure)


def _write(axis: Axes, matrix: F64, most: float) -> None:
    """Write three digits into every cell, dark on bright ones."""
    digits = 0 if most >= 100 else 1 if most >= 10 else 2
    for (row, column), value in np.ndenumerate(matrix):
        colour = "black" if value > 0.6 * most else "white"
        axis.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=6, color=colour)


def _ranks_per_node(result: Result, name: str) -> int:
    cluster = policy_named(result, name).cluster or result.scenario.cluster
    return cluster.topology.domain(cluster)


def link_load(result: Result, *, width_in: float = WIDTH_IN) -> Figure:
    """Draw how long each link is busy with a step's bytes, one panel per class of links, sorted from the busiest; mean over
    replicas of the sorted times. A flat line is a balanced class; no exchange is faster than the highest point. Classes
    without traffic are left out.

    Raises ValueError without recorded traffic, or where there is none.
    """
    table = filled(result, "links", ("policy", "replica", "link_kind", "busy_s"), TRAFFIC)
    kinds = list(dict.fromkeys(table.link_kind[table.busy_s > 0]))
    names = [name for name in policy_names(result) if (table.policy == name).any()]
    if not kinds:
        raise Unfit("no link carries anything")
    scale, unit = prefixed(float(table.busy_s.max()), "s")
    rows, columns = panels(len(kinds), width_in)
    _, legend_in = legend_shape(names, width_in)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(width_in, 0.3 + rows * (2.1 if width_in > COLUMN_IN else 1.8) + legend_in),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, kind in zip(axes.flat, kinds, strict=False):
            links = 1
            for i, name in enumerate(names):
                mine = table[(table.policy == name) & (table.link_kind == kind)]
                if len(mine):
                    by_replica = [np.sort(times.to_numpy(float))[::-1] for _, times in mine.groupby("replica").busy_s]
                    busy = np.mean(by_replica, axis=0) * scale
                    links = max(links, len(busy))
                    axis.plot(np.arange(1, len(busy) + 1), busy, **line_style(i, len(names)))
            axis.set_title(f"{kind} links", fontsize=8)
            axis.set_xlabel("link [rank by load]")
            rank_ticks(axis, links)
        for axis in axes.flat[len(kinds) :]:
            axis.set_visible(False)
        axes[0, 0].set_ylim(bottom=0)
        for axis in axes[:, 0]:
            axis.set_ylabel(f"busy per step [{unit}]")
        legend_below(figure, [Line2D([], [], **line_style(i, len(names))) for i in range(len(names))], names)
    return finished(figure)
