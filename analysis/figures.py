"""One function per figure. Each takes a `sim.results.Result` and returns a Matplotlib figure, ready to save as vector.

    python -m analysis.figures RUN_FOLDER_OR_SCENARIO OUT [--figure NAME] [--set KEY=VALUE]

Figures are 7 inches wide, in colours that colour-blind readers can tell apart; every axis names its unit. Intervals are
the summary's: 95 % over replicas. Balance is drawn beside the floor that a uniformly random gate would show. The command
line also knows the figures of `analysis.placement` and `analysis.serving`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import sim
from analysis import placement, serving
from analysis.style import (
    FLOOR,
    MARKERS,
    STYLE,
    WIDTH_IN,
    asked_policies,
    by_policy,
    canvas,
    colours,
    finished,
    need,
    policy_names,
    row_in,
    wrapped,
)
from sim import store
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


def tradeoff(result: Result) -> Figure:
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
    labels = [wrapped(name, 24) for name in names]
    rows = np.arange(len(names))[::-1]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            len(panels),
            figsize=(WIDTH_IN, 1.05 + row_in(labels) * len(names)),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, (metric, label, scale, better) in zip(axes[0], panels, strict=True):
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
        axes[0, 0].set_yticks(rows, labels)
    return finished(figure)


def load_heatmap(
    result: Result, policies: Sequence[str] | str | None = None, *, by_load: bool = True, replica: int = 0
) -> Figure:
    """Map load / mean of every expert and MoE layer in one replica, one panel per policy, over all its steps.

    by_load: sort the experts of every layer by load, else keep their index. Shades are logarithmic and symmetric about
    the mean; the rarest 1 % may lie beyond the scale's ends. Raises KeyError for an unknown policy or replica, and
    ValueError if no policy has routed experts.
    """
    asked = asked_policies(result, policies)
    if not 0 <= replica < result.scenario.replicas:
        raise KeyError(f"no replica {replica}; there are {result.scenario.replicas}")
    experts = result.experts
    if experts.empty:
        raise ValueError("no policy of this result has routed experts")
    need(experts, "experts", ("policy", "replica", "layer", "expert", "tokens"))
    relative: dict[str, pd.DataFrame] = {}
    for name in asked:
        rows = experts[(experts.policy == name) & (experts.replica == replica)]
        if len(rows):
            loads = rows.pivot(index="layer", columns="expert", values="tokens").astype(float)
            share = loads.div(loads.mean(axis=1), axis=0)
            if by_load:
                share.loc[:, :] = np.sort(share.to_numpy(), axis=1)[:, ::-1]
            relative[name] = share
    if not relative:
        raise ValueError(f"{', '.join(asked)}: no routed experts")
    x = "expert [rank by load]" if by_load else "expert [index]"
    return _heatmaps(relative, x, "layer [index]", "load [mean of layer = 1]")


def topic_heatmap(
    result: Result, policies: Sequence[str] | str | None = None, *, layer: int | None = None, replica: int = 0
) -> Figure:
    """Map the relative load of every expert within each topic, one panel per policy (as DeepSeek-V3 report, Figure 9).

    layer: a MoE layer of the model; by default the middle one. Experts are ordered by the topic that likes them most, the
    same way in every panel, so that specialisation shows as blocks. Needs a run with ``steps.record_topic_experts: true``
    and several topics; raises KeyError for an unknown policy, layer or replica, and ValueError without such loads.
    """
    asked = asked_policies(result, policies)
    topics = result.topics
    if topics.empty or "expert_tokens" not in topics:
        raise ValueError("no expert loads by topic: run several topics with steps.record_topic_experts: true")
    layers = sorted(int(number) for number in topics.layer.unique())
    chosen = layers[len(layers) // 2] if layer is None else layer
    topics = topics[(topics.layer == chosen) & (topics.replica == replica) & topics.policy.isin(asked)]
    if topics.empty:
        raise KeyError(f"no layer {chosen} of replica {replica}; there are layers {layers}")
    relative: dict[str, pd.DataFrame] = {}
    for name in asked:
        rows = topics[topics.policy == name]
        if len(rows):
            loads = (
                pd.DataFrame(np.stack(rows.expert_tokens.to_list()), index=rows.topic)
                .groupby(level=0, sort=False)
                .sum()
            )
            relative[name] = loads.div(loads.mean(axis=1), axis=0)
    first = next(iter(relative.values())).to_numpy()
    order = np.lexsort((-first.max(axis=0), first.argmax(axis=0)))
    relative = {
        name: share.iloc[:, order] if share.shape[1] == len(order) else share for name, share in relative.items()
    }
    x = f"expert of layer {chosen} [by the topic that likes it most]"
    return _heatmaps(relative, x, "", "load [mean of topic = 1]")


def _heatmaps(relative: dict[str, pd.DataFrame], x: str, y: str, label: str) -> Figure:
    """Draw one panel per policy of load / mean; rows are layers (numbers) or topics (names). Shades are logarithmic and
    symmetric about the mean; the rarest 1 % may lie beyond the scale's ends."""
    everything = np.concatenate([share.to_numpy().ravel() for share in relative.values()])
    distance = np.abs(np.log(np.maximum(everything, 1e-3)))
    limit = float(np.clip(np.exp(np.nanpercentile(distance, 99)), 1.25, 10))
    columns = min(3, len(relative))
    n_rows = -(-len(relative) // columns)
    alike = len({share.shape for share in relative.values()}) == 1
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            n_rows,
            columns,
            figsize=(WIDTH_IN, 0.6 + 1.75 * n_rows),
            sharex=alike,
            sharey=alike,
            squeeze=False,
            layout="constrained",
        )
        image: Any = None
        for axis, (name, share) in zip(axes.flat, relative.items(), strict=False):
            named = not pd.api.types.is_numeric_dtype(share.index)
            at = np.arange(len(share)) if named else share.index.to_numpy()
            image = axis.imshow(
                np.log(np.maximum(share.to_numpy(), 1e-3)),
                aspect="auto",
                cmap="viridis",
                vmin=-math.log(limit),
                vmax=math.log(limit),
                extent=(-0.5, share.shape[1] - 0.5, at[-1] + 0.5, at[0] - 0.5),
                interpolation="nearest",
            )
            axis.set_title(wrapped(name, 26), fontsize=8)
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            if named:
                axis.set_yticks(at, [str(name) for name in share.index], fontsize=7)
            else:
                axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        for i, axis in enumerate(axes.flat):
            if i >= len(relative):
                axis.set_visible(False)
            elif i + columns >= len(relative):  # nothing below it
                axis.tick_params(labelbottom=True)
        figure.supxlabel(x, fontsize=9)
        figure.supylabel(y, fontsize=9)
        ticks = [1 / limit, limit**-0.5, 1.0, limit**0.5, limit]
        bar = figure.colorbar(image, ax=axes, ticks=np.log(ticks), extend="both", shrink=0.9)
        bar.ax.set_yticklabels([f"{tick:.2g}" for tick in ticks])
        bar.set_label(label, fontsize=8)
    return finished(figure)


def max_vio_over_steps(result: Result, ax: Axes | None = None) -> Figure:
    """Draw MaxVio of each step's batch, mean over MoE layers and replicas, with the uniform floor of each gate.

    Raises KeyError if the steps lack a column, and ValueError if no policy has routed experts.
    """
    steps = result.steps
    need(steps, "steps", ("policy", "step", "max_vio", "max_vio_floor"))
    known = steps[steps.max_vio.notna()]
    names = [name for name in policy_names(result) if (known.policy == name).any()]
    if not names:
        raise ValueError("no policy of this result has routed experts")
    index = np.sort(known.step.unique())
    few = len(index) <= FEW_STEPS
    labels = [wrapped(name, 24) for name in names]
    legend_in = 0.5 + 0.06 * len(labels) + 0.135 * sum(label.count("\n") + 1 for label in labels)
    with plt.rc_context(STYLE):
        figure, axis = canvas(ax, max(2.8, legend_in))
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
        axis.set_ylabel("MaxVio of a batch [max/mean - 1]")
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return finished(figure, ax)


def step_breakdown(result: Result, ax: Axes | None = None) -> Figure:
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
        raise ValueError("no step of this result was timed (steps.timed: none)")
    names = policy_names(result)
    labels = [wrapped(name, 30) for name in names]
    mean = timed.groupby("policy")[list(parts)].mean().reindex(names).astype(float) * scale
    half = by_policy(result, "step_time_s")["half_width"].to_numpy(float) * scale
    rows = np.arange(len(names))[::-1]
    with plt.rc_context(STYLE):
        figure, axis = canvas(ax, 1.0 + row_in(labels) * len(names))
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
        axis.set_yticks(rows, labels)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel(f"step time [{unit}]")
        axis.set_xlim(0, 1.15 * float(np.nanmax(left + np.nan_to_num(half))))
        if ax is None:
            figure.legend(loc="outside upper center", ncols=len(parts), frameon=False, fontsize=8, columnspacing=1.0)
        else:
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8, columnspacing=1.0)
    return finished(figure, ax)


FIGURES: dict[str, Callable[[Result], Figure]] = {
    "tradeoff": tradeoff,
    "load_heatmap": load_heatmap,
    "topic_heatmap": topic_heatmap,
    "max_vio_over_steps": max_vio_over_steps,
    "step_breakdown": step_breakdown,
}
ALL = FIGURES | placement.FIGURES | serving.FIGURES
"""Also those of `analysis.placement` and `analysis.serving`, which need runs of their kind."""


def main(argv: Sequence[str] | None = None) -> int:
    """Draw one figure of a stored run, or of a scenario that is run for it, and save it."""
    parser = argparse.ArgumentParser(prog="python -m analysis.figures", description=main.__doc__)
    parser.add_argument("source", metavar="RUN_FOLDER_OR_SCENARIO", help="results/<scenario>/<run> or a scenario YAML")
    parser.add_argument("out", metavar="OUT", help="file to write: .png, .pdf or .svg")
    parser.add_argument("--figure", choices=ALL, default="tradeoff", help="default: %(default)s")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change one value of the scenario (repeatable)")  # fmt: skip
    args = parser.parse_args(argv)
    stored = Path(args.source).is_dir()
    if stored and args.overrides:
        parser.error("--set changes a scenario that is yet to run, not a stored run")
    try:
        result = store.read(args.source) if stored else sim.run(args.source, overrides=args.overrides, jobs=None)
        ALL[args.figure](result).savefig(args.out, dpi=200)
    except (OSError, ValueError, sim.ScenarioError, TooBig) as error:
        print(f"{args.source}: {error}", file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"{args.source}: this run has no {args.figure}: {error.args[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
