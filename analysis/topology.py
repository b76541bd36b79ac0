"""The cluster of a run as a drawing, with the load of its links."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.layout import Place, contracted, kind_of, places
from analysis.matrices import TRAFFIC
from analysis.style import (
    COLUMN_IN,
    STYLE,
    WIDTH_IN,
    Unfit,
    asked_policies,
    filled,
    finished,
    gradient,
    legend_below,
    legend_shape,
    policy_named,
    prefixed,
    wrapped,
)
from sim.cluster import Cluster
from sim.cluster.faults import remaining
from sim.cluster.torus import Torus
from sim.results import Result
from sim.tokens import F64

Load = Literal["bytes", "busy_s", "utilisation"]
# Devices above which nodes are drawn in their place.
MANY = 200
COLOURS = gradient()
IDLE = "0.75"
SHAPES = {"gpu": "o", "node": "s", "nic": "D", "superswitch": "h", "root": "h", "leaf": "^", "spine": "p"}
NAMES = {
    "gpu": "device",
    "node": "node",
    "nic": "NIC",
    "nvswitch": "NVLink switch",
    "switch": "switch",
    "superswitch": "switch of a supernode",
    "pcie": "PCIe switch",
    "root": "root complex",
    "leaf": "leaf switch",
    "spine": "spine switches",
}
GREYS = {"gpu": "0.15", "node": "0.15", "nic": "0.55"}
DOTTED = (0, (2, 1.2))


@dataclass(frozen=True)
class _Edge:
    """A line of the drawing: one cable, or all between two parts. load: of the busier direction, of the busiest cable;
    NaN where no route passes."""

    a: str
    b: str
    load: float
    share: float


def topology(
    result: Result,
    policies: Sequence[str] | str | None = None,
    *,
    load: Load | None = None,
    replica: int = 0,
    width_in: float = WIDTH_IN,
) -> Figure:
    """Draw devices, switches and cables of the cluster that a policy's traffic can see, coloured and thickened by the load
    of the last step in one replica; one panel per policy, by default only the first.

    load: ``utilisation``, the share of the step for which the busier direction of a cable is busy; ``busy_s``, that time;
    ``bytes``. By default utilisation where the last step was timed, else the time. Above 200 devices each node is drawn as
    one square, and a line is the busiest of its cables. Dashed: a failed cable, or one that a fault slows down. Grey: no
    route passes. Raises KeyError for an unknown policy or replica, ValueError without recorded traffic.
    """
    asked = asked_policies(result, policies)
    table = filled(result, "links", ("policy", "replica", "link", "bytes", "busy_s"), TRAFFIC)
    table = table[table.replica == replica]
    if policies is None:
        asked = [name for name in asked if (table.policy == name).any()][:1]
    if not asked or not all((table.policy == name).any() for name in asked):
        raise KeyError(f"no recorded traffic of {', '.join(asked) or 'any policy'} in replica {replica}")
    if load is None:
        load = "busy_s" if any(np.isnan(_step_s(result, name, replica)) for name in asked) else "utilisation"
    drawings = {}
    for name in asked:
        mine = table[table.policy == name]
        values = mine["bytes" if load == "bytes" else "busy_s"].to_numpy(float)
        if load == "utilisation":
            values = 100 * values / _step_s(result, name, replica)
            if not np.isfinite(values).all():
                raise Unfit("the last step was not timed: run with steps.timed: last or all, or draw load='bytes'")
        drawings[name] = _drawing(result, name, dict(zip(mine.link, values, strict=True)))
    return _draw(drawings, load, width_in)


def _step_s(result: Result, name: str, replica: int) -> float:
    steps = result.steps
    rows = steps[(steps.policy == name) & (steps.replica == replica) & (steps.step == steps.step.max())]
    return float(rows.step_time_s.iloc[0]) if len(rows) and rows.step_time_s.notna().all() else float("nan")


def _drawing(result: Result, name: str, loads: dict[str, float]) -> tuple[list[_Edge], dict[str, float], Cluster]:
    """Return the lines, the load inside every node that stands for its devices, and the cluster."""
    policy = policy_named(result, name)
    cluster = policy.cluster or result.scenario.cluster
    part = cluster.topology.part(cluster, result.scenario.parallel_of(policy).ep_size)
    cables = list(part.topology.cables(part))
    drawn_as = contracted(cables, part) if part.n_devices > MANY else {}
    edges: dict[tuple[str, str], _Edge] = {}
    inside: dict[str, float] = {}
    for cable in cables:
        a, b = drawn_as.get(cable.a, cable.a), drawn_as.get(cable.b, cable.b)
        both = [loads[key] for key in (f"{cable.a}->{cable.b}", f"{cable.b}->{cable.a}") if key in loads]
        value, share = max(both, default=float("nan")), remaining(part.faults, cable.a, cable.b)
        if a == b:
            inside[a] = float(np.fmax(inside.get(a, np.nan), value))
            continue
        before = edges.get((a, b))
        if before is not None:
            value, share = float(np.fmax(before.load, value)), min(before.share, share)
        edges[a, b] = _Edge(a, b, value, share)
    return list(edges.values()), inside, part


def _draw(drawings: dict[str, tuple[list[_Edge], dict[str, float], Cluster]], load: Load, width_in: float) -> Figure:
    loads = [load for edges, inside, _ in drawings.values() for load in (*(e.load for e in edges), *inside.values())]
    most = max((load for load in loads if load == load), default=0.0)
    scale, unit = (1.0, "%") if load == "utilisation" else prefixed(most, "B" if load == "bytes" else "s")
    label = {"utilisation": "busy, share of the step", "busy_s": "busy per step", "bytes": "sent per step"}[load]
    norm = Normalize(0, most * scale)
    spots = {
        name: places([(edge.a, edge.b) for edge in edges], cluster) for name, (edges, _, cluster) in drawings.items()
    }
    kinds = list(dict.fromkeys(kind_of(part) for at in spots.values() for part in at))
    kinds.sort(key=list(NAMES).index)
    handles: list[Any] = [
        Line2D([], [], linestyle="", marker=SHAPES.get(kind, "s"), color=GREYS.get(kind, "0.35"), markersize=5)
        for kind in kinds
    ]
    known = [NAMES[kind] for kind in kinds]
    shares = [edge.share for edges, _, _ in drawings.values() for edge in edges]
    if min(shares) < 1:
        handles.append(Line2D([], [], color="black", linestyle=DOTTED, linewidth=1.2))
        known.append("failed or slowed")
    inner_in = width_in - 1.1
    heights = [min(3.4, max(1.6, inner_in * _aspect(at))) for at in spots.values()]
    wide = width_in > COLUMN_IN
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(drawings),
            1,
            figsize=(width_in, 0.3 + sum(heights) + 0.25 * len(heights) + legend_shape(known, width_in)[1]),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
        )
        for axis, (name, (edges, inside, cluster)) in zip(axes[:, 0], drawings.items(), strict=True):
            scaled = [_Edge(edge.a, edge.b, edge.load * scale, edge.share) for edge in edges]
            _lines(axis, scaled, spots[name], norm, cluster, float(np.clip(18 * width_in / len(edges), 0.25, 1.0)))
            _parts(axis, scaled, spots[name], {part: value * scale for part, value in inside.items()}, norm, width_in)
            axis.set_title(wrapped(name, 60 if wide else 34), fontsize=8)
            axis.set_axis_off()
            axis.margins(0.03, 0.06)
        bar = figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, shrink=0.9, aspect=22)
        bar.ax.tick_params(labelsize=8)
        bar.set_label(f"{label} [{unit}]", fontsize=8)
        legend_below(figure, handles, known)
    return finished(figure)


def _aspect(at: dict[str, Place]) -> float:
    x, y = np.array(list(at.values())).T
    return float((np.ptp(y) + 1e-9) / max(np.ptp(x), 1e-9))


def _lines(
    axis: Axes, edges: list[_Edge], at: dict[str, Place], norm: Normalize, cluster: Cluster, thick: float
) -> None:
    """Draw lines from the least to the most loaded one; those around a torus as two stubs that point at each other's back,
    those within a row as arcs."""
    for edge in sorted(edges, key=lambda edge: (edge.load == edge.load, edge.load)):
        busy = edge.load == edge.load
        share = edge.load / (norm.vmax or 1.0) if busy else 0.0
        colour = COLOURS(norm(edge.load)) if busy else IDLE
        style: dict[str, Any] = {
            "colors": [colour],
            "linewidths": thick * (0.5 + 2.2 * share),
            "linestyles": [DOTTED if edge.share < 1 else "-"],
            "zorder": 1 + share,
        }
        axis.add_collection(LineCollection(_path(edge, at, cluster), **style))


def _path(edge: _Edge, at: dict[str, Place], cluster: Cluster) -> list[F64]:
    a, b = np.array(at[edge.a]), np.array(at[edge.b])
    along = b - a
    if isinstance(cluster.topology, Torus) and kind_of(edge.a) == "gpu":
        if max(abs(along)) <= 1.01:
            return [np.stack([a, b])]
        stub = 0.32 * along / np.hypot(*along)
        return [np.stack([a, a - stub]), np.stack([b, b + stub])]
    if abs(along[1]) > 1e-9 or abs(along[0]) < 1.5 or kind_of(edge.a) not in ("gpu", "node"):
        return [np.stack([a, b])]
    # Quadratic Bezier curve below the row, the deeper the longer.
    t = np.linspace(0, 1, 16)[:, None]
    middle = (a + b) / 2 - np.array([0.0, 0.5 * abs(along[0]) ** 0.8])
    return [(1 - t) ** 2 * a + 2 * t * (1 - t) * middle + t**2 * b]


def _parts(
    axis: Axes, edges: list[_Edge], at: dict[str, Place], inside: dict[str, float], norm: Normalize, width_in: float
) -> None:
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(at)
    graph.add_edges_from((edge.a, edge.b) for edge in edges)
    crowd = sum(kind_of(part) in ("gpu", "node") for part in at)
    device = float(np.clip((width_in * 40 / crowd) ** 1.1, 4, 40))
    for kind in dict.fromkeys(kind_of(part) for part in at):
        mine = [part for part in at if kind_of(part) == kind]
        colours = [
            COLOURS(norm(inside[part]))
            if inside.get(part, np.nan) == inside.get(part, np.nan)
            else GREYS.get(kind, "0.35")
            for part in mine
        ]
        drawn = nx.draw_networkx_nodes(
            graph,
            at,
            nodelist=mine,
            ax=axis,
            node_size=device if kind in ("gpu", "nic") else max(device, 30),
            node_shape=SHAPES.get(kind, "s"),
            node_color=colours,
        )
        drawn.set_zorder(4)
    axis.autoscale_view()


FIGURES: dict[str, Callable[[Any], Figure]] = {"topology": topology}
