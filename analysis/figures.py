"""One function per figure. Each takes a `sim.results.Result` and returns a Matplotlib figure, ready to save as vector.

    python -m analysis.figures SOURCE OUT [--figure NAME] [--width 3.5] [--set KEY=VALUE]

SOURCE is the folder of a stored run or of a sweep, or a scenario that is run for it. Figures are 7 inches wide, or as
narrow as a column (``width_in=3.5``), in colours that colour-blind readers can tell apart; every axis names its unit.
Intervals are the summary's: 95 % over replicas. Balance is drawn beside the floor that a uniformly random gate would show.
The command line knows the figures of all modules of this package; ``--list`` prints them.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import sim
from analysis import dynamics, placement, roofline, serving, sweeps, topology, tradeoffs
from analysis.heatmaps import load_heatmap, topic_heatmap
from analysis.style import (
    COLUMN_IN,
    FLOOR,
    MARKERS,
    STYLE,
    WIDTH_IN,
    Unfit,
    by_policy,
    canvas,
    colours,
    finished,
    legend_below,
    legend_shape,
    need,
    policy_names,
    row_in,
    wrapped,
)
from sim import store
from sim.console import guarded
from sim.estimate import TooBig
from sim.results import Result
from sim.statistics import half_width

PARTS = {
    "attention_s": "attention",
    "experts_s": "experts",
    "other_compute_s": "other compute",
    "exposed_communication_s": "exposed communication",
    "waiting_s": "waiting",
}
PIPELINE_PARTS = {
    "forward_s": "forward",
    "overlapped_s": "forward and backward",
    "backward_s": "backward",
    "weight_gradients_s": "weight gradients",
    "bubble_s": "bubble",
    "optimizer_s": "optimizer",
}
# Up to this many steps, intervals are bars beside each other; above, bands.
FEW_STEPS = 12


def tradeoff(result: Result, *, width_in: float = WIDTH_IN) -> Figure:
    """Show kept affinity, imbalance, inter-node traffic and step time side by side, one row of dots per policy.

    Grey ticks beside MaxVio are the floor of a uniformly random gate at the same batch size. A policy without a metric
    (no experts, no timed step) has no dot there.
    """
    panels = [
        ("kept_affinity", "kept affinity\n[share of top-k's]", 1.0, "better →"),
        ("max_vio_batch", "MaxVio of a batch\n[max/mean - 1]", 1.0, "← better"),
        ("inter_node_bytes", "between nodes\n[GB per step]", 1e-9, "← better"),
        ("step_time_s", "step time\n[ms]", 1e3, "← better"),
    ]
    names = policy_names(result)
    wide = width_in > COLUMN_IN
    labels = [wrapped(name, 24 if wide else 17) for name in names]
    rows = np.arange(len(names))[::-1]
    down = 1 if wide else 2
    row_of_names_in = row_in(labels) * (1.0 if wide else 0.85)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            down,
            len(panels) // down,
            figsize=(width_in, (1.05 + row_of_names_in * len(names)) * down),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, (metric, label, scale, better) in zip(axes.flat, panels, strict=True):
            data = by_policy(result, metric)
            mean, half = data["mean"].to_numpy(float) * scale, data["half_width"].to_numpy(float) * scale
            for row, x, error, colour in zip(rows, mean, half, colours(len(names)), strict=True):
                if np.isfinite(x):
                    axis.errorbar(
                        x,
                        row,
                        xerr=error if np.isfinite(error) else None,
                        fmt="o",
                        color=colour,
                        capsize=2.5,
                        markersize=6,
                        zorder=3,
                    )
            if metric == "max_vio_batch":
                floor = by_policy(result, "max_vio_batch_floor")["mean"].to_numpy(float)
                axis.plot(floor, rows, "|", color=FLOOR, markersize=13, markeredgewidth=1.5, zorder=2)
                label += "\n(grey tick: floor)"
            if not np.isfinite(mean).any():
                axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color=FLOOR)
                axis.set_xticks([])
            axis.set_title(better, fontsize=7, color=FLOOR, pad=3)
            axis.set_xlabel(label)
            axis.set_ylim(-0.6, len(names) - 0.4)
            axis.margins(x=0.15)
            axis.grid(axis="y", color="0.92")
            axis.tick_params(axis="y", length=0)
            axis.tick_params(axis="x", labelsize=8)
            if np.isfinite(mean).any():
                axis.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        for axis in axes[:, 0]:
            axis.set_yticks(rows, labels, fontsize=9 if wide else 8)
    return finished(figure)


def max_vio_over_steps(result: Result, ax: Axes | None = None, *, width_in: float = WIDTH_IN) -> Figure:
    """Draw MaxVio of each step's batch, mean over MoE layers and replicas, with the uniform floor of each gate.

    Raises KeyError if the steps lack a column, and ValueError if no policy has routed experts.
    """
    steps = result.steps
    need(steps, "steps", ("policy", "step", "max_vio", "max_vio_floor"))
    known = steps[steps.max_vio.notna()]
    names = [name for name in policy_names(result) if (known.policy == name).any()]
    if not names:
        raise Unfit("no policy of this result has routed experts")
    index = np.sort(known.step.unique())
    few = len(index) <= FEW_STEPS
    labels = [wrapped(name, 24) for name in names]
    beside = ax is not None or width_in > COLUMN_IN
    legend_in = 0.5 + 0.06 * len(labels) + 0.135 * sum(label.count("\n") + 1 for label in labels)
    height_in = max(2.8, legend_in) if beside else 2.2 + legend_shape([*names, "uniform floor"], width_in)[1]
    with plt.rc_context(STYLE):
        figure, axis = canvas(ax, height_in, width_in)
        for i, (name, colour) in enumerate(zip(names, colours(len(names)), strict=True)):
            by_step = known[known.policy == name].groupby("step").max_vio
            mean = by_step.mean()
            half = by_step.apply(lambda values: half_width(values.to_numpy(float))).to_numpy(float)
            x = mean.index.to_numpy(float) + (0.3 * ((i + 0.5) / len(names) - 0.5) if few else 0.0)
            axis.plot(
                x,
                mean,
                color=colour,
                marker=MARKERS[i % len(MARKERS)],
                markersize=5,
                markevery=max(1, len(mean) // 10),
                linewidth=1.4,
                label=labels[i],
                zorder=3,
            )
            if np.isfinite(half).all() and few:
                axis.errorbar(x, mean, yerr=half, fmt="none", color=colour, capsize=2, linewidth=1)
            elif np.isfinite(half).all():
                axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
        for i, floor in enumerate(known.max_vio_floor.dropna().round(9).unique()):
            axis.axhline(floor, color=FLOOR, linestyle=":", label=None if i else "uniform floor")
        axis.set_ylim(bottom=0)
        axis.set_xlim(index[0] - 0.5, index[-1] + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axis.set_xlabel("step [batches]")
        axis.set_ylabel("MaxVio of a batch" + (" " if beside else "\n") + "[max/mean - 1]")
        if beside:
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
        else:
            handles, named = axis.get_legend_handles_labels()
            legend_below(figure, handles, [label.replace("\n", " ") for label in named])
    return finished(figure, ax)


def step_breakdown(result: Result, ax: Axes | None = None, *, width_in: float = WIDTH_IN) -> Figure:
    """Stack where a step's time goes per policy, mean over devices (in a pipeline, over its ranks); the figure at the end
    is the whole step.

    Raises KeyError if the steps lack a column, and ValueError if no step was timed.
    """
    steps = result.steps
    pipelined = result.scenario.pipelined
    parts, scale, unit = (PIPELINE_PARTS, 1.0, "s") if pipelined else (PARTS, 1e3, "ms")
    need(steps, "steps", ("policy", "step_time_s", *parts))
    timed = steps[steps.step_time_s.notna()]
    if timed.empty:
        raise Unfit("no step of this result was timed (steps.timed: none)")
    names = policy_names(result)
    wide = ax is not None or width_in > COLUMN_IN
    labels = [wrapped(name, 30 if wide else 17) for name in names]
    mean = timed.groupby("policy")[list(parts)].mean().reindex(names).astype(float) * scale
    half = by_policy(result, "step_time_s")["half_width"].to_numpy(float) * scale
    rows = np.arange(len(names))[::-1]
    with plt.rc_context(STYLE):
        figure, axis = canvas(ax, (1.0 if wide else 1.35) + row_in(labels) * len(names), width_in)
        left = np.zeros(len(names))
        for (part, label), colour in zip(parts.items(), colours(len(parts)), strict=True):
            width = mean[part].to_numpy()
            axis.barh(rows, width, left=left, label=label, color=colour, height=0.7, edgecolor="white", linewidth=0.4)
            left = left + width
        digits = max(0, 3 - math.floor(math.log10(np.nanmax(left) or 1.0)))
        for row, total, error in zip(rows, left, half, strict=True):
            end = total
            if np.isfinite(error):
                axis.errorbar(total, row, xerr=error, fmt="none", color="0.2", capsize=2.5, linewidth=1)
                end = total + error
            if np.isfinite(total):
                text = f"{total:.{digits}f}"
                axis.annotate(text, (end, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_yticks(rows, labels, fontsize=9 if wide else 8)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel(f"step time [{unit}]")
        axis.set_xlim(0, (1.15 if wide else 1.3) * float(np.nanmax(left + np.nan_to_num(half))))
        if ax is None:
            columns = len(parts) if wide else 2
            figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=8, columnspacing=1.0)
        else:
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8, columnspacing=1.0)
    return finished(figure, ax)


FIGURES: dict[str, Callable[..., Figure]] = {
    "tradeoff": tradeoff,
    "load_heatmap": load_heatmap,
    "topic_heatmap": topic_heatmap,
    "max_vio_over_steps": max_vio_over_steps,
    "step_breakdown": step_breakdown,
}
ALL: dict[str, Callable[..., Figure]] = (
    FIGURES
    | tradeoffs.FIGURES
    | dynamics.FIGURES
    | placement.FIGURES
    | topology.FIGURES
    | roofline.FIGURES
    | serving.FIGURES
)
"""Every figure of a run: also those of the modules beside this one, which need runs of their kind."""
SWEEPS: dict[str, Callable[..., Figure]] = sweeps.FIGURES
"""Figures of a sweep's folder."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m analysis.figures", description=main.__doc__)
    p.add_argument("source", nargs="?", metavar="SOURCE", help="results/<scenario>/<run>, the folder of a sweep, or a scenario YAML")  # fmt: skip
    p.add_argument("out", nargs="?", metavar="OUT", help="file to write: .png, .pdf or .svg")
    p.add_argument("--figure", metavar="NAME", help="default: latency_cdf of a run that serves, small_multiples of a sweep, else tradeoff; 'list' prints all")  # fmt: skip
    p.add_argument("--list", action="store_true", help="print the names of the figures and stop")
    p.add_argument("--width", type=float, default=WIDTH_IN, metavar="INCHES", help="7 for a page (default), 3.5 for a column")  # fmt: skip
    p.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change one value of the scenario (repeatable)")  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Draw one figure of a stored run or sweep, or of a scenario that is run for it, and save it."""
    p = parser()
    args = p.parse_args(argv)
    if args.list or args.figure == "list":
        print("\n".join(_listed()))
        return 0
    if args.source is None or args.out is None:
        p.error("the following arguments are required: SOURCE, OUT (or --list)")
    if args.figure is not None and args.figure not in ALL | SWEEPS:
        near = difflib.get_close_matches(args.figure, ALL | SWEEPS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        p.error(f"--figure: no figure {args.figure!r}{hint}; --list prints them")
    if not 3 <= args.width <= 20:
        p.error(f"--width must lie between 3 and 20 inches [got {args.width:g}]")
    if args.overrides and Path(args.source).is_dir():
        p.error("--set changes a scenario that is yet to run, not a stored run")
    return guarded(p.prog, lambda: _draw(args), "interrupted", (OSError, ValueError, sim.ScenarioError, TooBig))


def _listed() -> list[str]:
    """Return a line per figure: its name and the first sentence of what it shows."""
    names = [("of a run:", ALL), ("of a sweep:", SWEEPS)]
    width = max(map(len, ALL | SWEEPS))
    lines = []
    for title, figures in names:
        lines.append(title)
        for name, draw in figures.items():
            first = " ".join((draw.__doc__ or "").split("\n\n")[0].split())
            sentence = re.split(r"[.;:] |\.$", first.replace("`", ""))[0]
            lines.append(f"  {name:{width}}  {textwrap.shorten(sentence, 110, placeholder=' …')}")
    return lines


def _draw(args: argparse.Namespace) -> int:
    folder = Path(args.source)
    if folder.is_dir() and (folder / "sweep.json").exists():
        from sim import sweeping

        source: Any = sweeping.read(folder)
        known, usual, kind = SWEEPS, "small_multiples", "sweep"
    else:
        source = store.read(folder) if folder.is_dir() else sim.run(args.source, overrides=args.overrides, jobs=None)
        known, kind = ALL, "run"
        usual = "latency_cdf" if source.scenario.serving else "tradeoff"
    name = args.figure or usual
    if name not in known:
        raise ValueError(f"{args.source}: {name} is no figure of a {kind}; --list prints them")
    try:
        figure = known[name](source, width_in=args.width)
    except KeyError as error:
        raise ValueError(f"{args.source}: this {kind} has no {name}: {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(f"{args.source}: {error}") from None
    figure.savefig(args.out, dpi=200)
    return 0


if __name__ == "__main__":
    sys.exit(main())
