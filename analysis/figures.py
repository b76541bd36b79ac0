"""One function per figure. Each takes a `sim.results.Result` and returns a Matplotlib figure, ready to save as vector.

    python -m analysis.figures scenarios/tiny.yaml tradeoff.png

Colours are seaborn's colour-blind palette; every axis names its unit; balance is drawn beside the floor that a uniformly
random gate shows.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from sim.results import Result

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": False, "font.size": 9}
PARTS = {
    "attention_s": "attention",
    "experts_s": "experts",
    "other_compute_s": "other compute",
    "exposed_communication_s": "exposed communication",
    "waiting_s": "waiting",
}


def _policies(result: Result) -> list[str]:
    return [policy.name for policy in result.scenario.policies]


def _wrapped(names: Sequence[str], width: int = 22) -> list[str]:
    return [textwrap.fill(name, width) for name in names]


def _metric(result: Result, metric: str) -> pd.DataFrame:
    """Return mean and half-width of ``metric`` by policy, in the scenario's order; KeyError names an unknown metric."""
    summary = result.summary()
    rows = summary[summary.metric == metric]
    if rows.empty:
        raise KeyError(f"no metric {metric!r}; there are {', '.join(sorted(set(summary.metric)))}")
    return rows.set_index("policy").loc[_policies(result)]


def _colours(n: int) -> list[tuple[float, float, float]]:
    return list(sns.color_palette("colorblind", n))


def _finished(figure: Figure) -> Figure:
    """Take the figure out of pyplot's hands: a notebook shows it once, as the value of its cell, and nothing piles up."""
    plt.close(figure)
    return figure


def tradeoff(result: Result) -> Figure:
    """Show kept affinity, imbalance, inter-node traffic and step time side by side, one row of dots per policy."""
    panels = [
        ("kept_affinity", "kept affinity\n(share of top-k's)", 1.0),
        ("max_vio_batch", "MaxVio of a batch\n(max/mean - 1)", 1.0),
        ("inter_node_bytes", "between nodes\n[GB per step]", 1e-9),
        ("step_time_s", "step time\n[ms]", 1e3),
    ]
    names = _policies(result)
    colours = _colours(len(names))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(7.2, 0.9 + 0.36 * len(names)), sharey=True, layout="constrained"
        )
        rows = np.arange(len(names))[::-1]
        for axis, (metric, label, scale) in zip(axes, panels, strict=True):
            data = _metric(result, metric)
            for row, mean, half, colour in zip(rows, data["mean"], data["half_width"], colours, strict=True):
                if np.isfinite(mean):
                    error = None if np.isnan(half) else half * scale
                    axis.errorbar(mean * scale, row, xerr=error, fmt="o", color=colour, capsize=2.5, markersize=6)
            if metric == "max_vio_batch":
                floor = _metric(result, "max_vio_batch_floor")["mean"].iloc[0]
                axis.axvline(floor, color="0.5", linestyle=":", linewidth=1)
                axis.annotate("floor", (floor, rows[0] + 0.35), color="0.4", fontsize=7, ha="left", va="bottom")
            axis.set_xlabel(label)
            axis.margins(x=0.15, y=0.12)
            axis.grid(axis="y", color="0.92")
            axis.locator_params(axis="x", nbins=4)
        axes[0].set_yticks(rows, _wrapped(names, 30))
        axes[0].tick_params(axis="y", length=0)
    return _finished(figure)


def load_heatmap(result: Result, policies: Sequence[str] | None = None) -> Figure:
    """Map load / mean of every expert (sorted within its layer) and MoE layer, one panel per policy, first replica.

    Shades are logarithmic, from a fifth of the mean to five times it. Raises KeyError for an unknown policy.
    """
    names = list(policies or _policies(result))
    unknown = [name for name in names if name not in _policies(result)]
    if unknown:
        raise KeyError(f"no policy {unknown[0]!r}; there are {', '.join(_policies(result))}")
    experts = result.experts
    experts = experts[experts.replica == 0] if len(experts) else experts
    names = [name for name in names if len(experts) and (experts.policy == name).any()]
    if not names:
        raise ValueError("no policy of this result has routed experts")
    columns = min(3, len(names))
    n_rows = -(-len(names) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            n_rows, columns, figsize=(7.2, 0.5 + 1.9 * n_rows), sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        image = None
        for axis, name in zip(axes.flat, names, strict=False):
            table = experts[experts.policy == name].pivot(index="layer", columns="expert", values="tokens")
            loads = np.sort(table.to_numpy(dtype=float), axis=1)[:, ::-1]
            relative = np.log10(np.maximum(loads / loads.mean(axis=1, keepdims=True), 1e-3))
            extent = (0.5, loads.shape[1] + 0.5, table.index[-1] + 0.5, table.index[0] - 0.5)
            image = axis.imshow(relative, aspect="auto", cmap="cividis", vmin=-0.7, vmax=0.7, extent=extent, interpolation="nearest")
            axis.set_title(textwrap.fill(name, 30), fontsize=8)
        for axis in list(axes.flat)[len(names) :]:
            axis.set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel("expert (by load)")
        for axis in axes[:, 0]:
            axis.set_ylabel("layer")
        bar = figure.colorbar(image, ax=axes, ticks=[-0.699, -0.349, 0, 0.349, 0.699], shrink=0.9)
        bar.ax.set_yticklabels(["≤ 0.2", "0.45", "1", "2.2", "≥ 5"])
        bar.set_label("load / mean load")
    return _finished(figure)


def max_vio_over_steps(result: Result) -> Figure:
    """Draw MaxVio of each step's batch (mean over MoE layers; band: 95 % over replicas) with the uniform floor."""
    steps = result.steps
    if "max_vio" not in steps or steps.max_vio.isna().all():
        raise ValueError("no policy of this result has routed experts")
    names = [name for name in _policies(result) if steps[steps.policy == name].max_vio.notna().any()]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 3.0), layout="constrained")
        several = result.scenario.replicas > 1
        sns.lineplot(
            steps, x="step", y="max_vio", hue="policy", style="policy", hue_order=names, style_order=names,
            palette=_colours(len(names)), errorbar=("ci", 95) if several else None, seed=0, ax=axis,
            markers=result.scenario.steps.count < 30,
        )  # fmt: skip
        axis.axhline(steps.max_vio_floor.dropna().iloc[0], color="0.5", linestyle=":", label="uniform floor")
        axis.set_yscale("log")
        axis.set_xlabel("step [batches]")
        axis.set_ylabel("MaxVio (max/mean - 1)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return _finished(figure)


def step_breakdown(result: Result) -> Figure:
    """Stack where a step's time goes per policy, mean over devices. Raises ValueError if no step was timed."""
    steps = result.steps
    timed = steps[steps.step_time_s.notna()]
    if timed.empty:
        raise ValueError("no step of this result was timed (steps.timed: none)")
    names = _policies(result)
    mean = timed.groupby("policy")[list(PARTS)].mean().loc[names] * 1e3
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 1.1 + 0.36 * len(names)), layout="constrained")
        left = np.zeros(len(names))
        rows = np.arange(len(names))[::-1]
        for (part, label), colour in zip(PARTS.items(), _colours(len(PARTS)), strict=True):
            axis.barh(rows, mean[part], left=left, label=label, color=colour, height=0.7, edgecolor="white", linewidth=0.4)
            left += mean[part].to_numpy()
        for row, total in zip(rows, left, strict=True):
            axis.annotate(f"{total:.4g}", (total, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_yticks(rows, _wrapped(names, 36))
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("step time [ms]")
        axis.margins(x=0.08)
        figure.legend(loc="outside upper center", ncols=len(PARTS), frameon=False, fontsize=8, columnspacing=1.0)
    return _finished(figure)


FIGURES = {
    "tradeoff": tradeoff,
    "load_heatmap": load_heatmap,
    "max_vio_over_steps": max_vio_over_steps,
    "step_breakdown": step_breakdown,
}


def main(arguments: Sequence[str]) -> int:
    """``python -m analysis.figures SCENARIO OUT [FIGURE] [KEY=VALUE ...]``: run a scenario and save one figure."""
    import sim

    if len(arguments) < 2:
        print(main.__doc__, file=sys.stderr)
        return 2
    scenario, out, *rest = arguments
    name = rest[0] if rest and "=" not in rest[0] else "tradeoff"
    if name not in FIGURES:
        print(f"no figure {name!r}; there are {', '.join(FIGURES)}", file=sys.stderr)
        return 2
    result = sim.run(scenario, overrides=[text for text in rest if "=" in text])
    FIGURES[name](result).savefig(out, dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
