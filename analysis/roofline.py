"""The roofline of a run's device, with what its operations reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.operations import operations
from analysis.style import (
    COLUMN_IN,
    FLOOR,
    STYLE,
    WIDTH_IN,
    Unfit,
    colours,
    finished,
    legend_below,
    legend_shape,
    policy_names,
)
from sim.hardware import BYTES_PER_ELEMENT, Device
from sim.results import Result

MARKS = {
    "attention": "X",
    "decode attention": "X",
    "prefill attention": "P",
    "projections": "s",
    "shared experts": "^",
    "dense FFN": "D",
    "output head": "v",
    "experts": "o",
}
CEILINGS: dict[str, Any] = {"bf16": "-", "fp8": (0, (5, 1.5)), "fp4": (0, (1.5, 1))}
SHARED = "0.25"


def roofline(result: Result, *, width_in: float = WIDTH_IN) -> Figure:
    """Draw FLOP/s against FLOPs per byte of memory traffic, logarithmic: the bandwidth of the device, its peak in each
    number format and the ridges where they meet, and the operations of a forward pass by the run's cost law.

    A run that serves shows the mean iteration of every unit, so that decode stands left of the ridge. Experts have the
    colour of their policy: filled, a rank of mean load, hollow, the busiest; what policies share is grey. The distance to
    the roof is what the kernel loses. Raises ValueError if nothing was counted.
    """
    device = result.scenario.cluster.device
    table = operations(result)
    if table.empty:
        raise Unfit("no unit of this result ran an iteration")
    table = table.assign(intensity=table.flops / table.bytes, rate=table.flops / table.seconds)
    names = policy_names(result)
    units = [where for where in dict.fromkeys(table["where"]) if where] or [""]
    peaks = {dtype: device.peak(dtype) for dtype in BYTES_PER_ELEMENT if getattr(device.peak_flops_per_s, dtype)}
    above, below = _operations(table), _policies(table, names) + _ceilings(device, peaks)
    wide = width_in > COLUMN_IN
    columns = len(units) if wide else 1
    rows = -(-len(units) // columns)
    legends_in = sum(legend_shape([name for _, name in entries], width_in)[1] for entries in (above, below))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(width_in, rows * (3.0 if wide else 2.3) + legends_in),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, unit in zip(axes.flat, units, strict=False):
            _points(axis, table[table["where"] == unit], names)
            if unit:
                axis.set_title(unit, fontsize=8)
        left, low = table.intensity.min() / 2.5, table.rate.min() * 1e-12 / 3
        right = max(table.intensity.max(), max(peaks.values()) / device.memory_bandwidth_bytes_per_s) * 2.5
        for axis in axes.flat[: len(units)]:
            axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, max(peaks.values()) * 1e-12 * 2))
            _roof(axis, device, peaks, left, right)
            for side, decades, most in (
                (axis.xaxis, np.log10(right / left) / (width_in / columns), 0.45),
                (axis.yaxis, np.log10(max(peaks.values()) * 2e-12 / low) / 2.5, 0.7),
            ):
                side.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < most else (1,)))
                side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
                side.set_minor_formatter(NullFormatter())
        for axis in axes[-1]:
            axis.set_xlabel("arithmetic intensity [FLOP/byte]")
        for axis in axes[:, 0]:
            axis.set_ylabel("achieved [TFLOP/s]")
        legend_below(figure, [handle for handle, _ in above], [name for _, name in above], "upper")
        legend_below(figure, [handle for handle, _ in below], [name for _, name in below])
        for axis in axes.flat[: len(units)]:
            _name_bandwidth(figure, axis, device, left)
    return finished(figure)


def _roof(axis: Axes, device: Device, peaks: dict[Any, float], left: float, right: float) -> None:
    """Draw the bandwidth up to the highest peak, and every peak from its ridge on."""
    bandwidth = device.memory_bandwidth_bytes_per_s
    ridge = max(peaks.values()) / bandwidth
    axis.plot([left, ridge], [left * bandwidth * 1e-12, ridge * bandwidth * 1e-12], color=FLOOR, linewidth=1.2)
    for dtype, peak in peaks.items():
        axis.plot([peak / bandwidth, right], [peak * 1e-12] * 2, color=FLOOR, linewidth=1.2, linestyle=CEILINGS[dtype])
        axis.plot(peak / bandwidth, peak * 1e-12, "|", color=FLOOR, markersize=8)


def _name_bandwidth(figure: Figure, axis: Axes, device: Device, left: float) -> None:
    """Write the bandwidth along its line, whose slope is known when everything else is in place."""
    figure.draw_without_rendering()
    bandwidth = device.memory_bandwidth_bytes_per_s
    at = np.array([[x, x * bandwidth * 1e-12] for x in (left * 1.25, left * 2.5)])
    start, end = axis.transData.transform(at)
    note = axis.annotate(
        f"{bandwidth * 1e-12:.3g} TB/s",
        tuple(at[0]),
        (0, 4),
        textcoords="offset points",
        rotation=float(np.degrees(np.arctan2(*(end - start)[::-1]))),
        rotation_mode="anchor",
        fontsize=7.5,
        color="0.3",
    )
    note.set_in_layout(False)


def _points(axis: Axes, table: pd.DataFrame, names: list[str]) -> None:
    for name, colour in zip(names, colours(len(names)), strict=True):
        mine = table[(table.policy == name) & (table.operation == "experts")]
        axis.plot(mine.intensity, mine.rate * 1e-12, color=colour, linewidth=0.8, zorder=3)
        for _, row in mine.iterrows():
            face = colour if row.load == "mean" else "white"
            axis.plot(row.intensity, row.rate * 1e-12, MARKS["experts"], color=colour, markerfacecolor=face, markersize=6, zorder=4)  # fmt: skip
    even = table[table.operation != "experts"].drop_duplicates(["operation", "intensity", "rate"])
    for _, row in even.iterrows():
        axis.plot(
            row.intensity, row.rate * 1e-12, MARKS[row.operation], color=SHARED, markersize=5.5, alpha=0.8, zorder=3
        )


Entry = tuple[Any, str]


def _operations(table: pd.DataFrame) -> list[Entry]:
    """Return handles and names of the operations."""
    entries: list[Entry] = []
    for name, mark in MARKS.items():
        if (table.operation == name).any():
            entries.append((Line2D([], [], linestyle="", marker=mark, color=SHARED, markersize=5.5), name))
    if (table.operation == "experts").any():
        hollow = Line2D([], [], linestyle="", marker="o", color=SHARED, markerfacecolor="white", markersize=5.5)
        entries.append((hollow, "experts, busiest rank"))
    return entries


def _policies(table: pd.DataFrame, names: list[str]) -> list[Entry]:
    with_experts = set(table.policy[table.operation == "experts"])
    return [
        (Line2D([], [], linestyle="", marker="o", color=colour), name)
        for name, colour in zip(names, colours(len(names)), strict=True)
        if name in with_experts
    ]


def _ceilings(device: Device, peaks: dict[Any, float]) -> list[Entry]:
    ridges = {dtype: peak / device.memory_bandwidth_bytes_per_s for dtype, peak in peaks.items()}
    return [
        (Line2D([], [], color=FLOOR, linewidth=1.2, linestyle=CEILINGS[dtype]), f"{dtype} peak, ridge at {ridge:,.0f}")
        for dtype, ridge in ridges.items()
    ]


FIGURES: dict[str, Callable[[Any], Figure]] = {"roofline": roofline}
