"""Figures of where experts live and what that does: loads of ranks and links, traffic, replicas, moves.

As in `analysis.figures`, each function takes a `sim.results.Result` and returns a Matplotlib figure; ``width_in`` is 7
inches for a page's width, 3.4 for a column's.
"""

from __future__ import annotations

import math
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
from scipy.special import ndtri

from analysis.matrices import device_matrix, link_load, node_matrix
from analysis.style import (
    COLUMN_IN,
    FLOOR,
    MARKERS,
    STYLE,
    WIDTH_IN,
    Unfit,
    by_policy,
    filled,
    finished,
    legend_below,
    legend_shape,
    line_style,
    policy_named,
    policy_names,
    prefixed,
    rank_ticks,
    row_in,
    wrapped,
)
from sim.replicas.static import Static
from sim.results import Result
from sim.settings import Policy
from sim.statistics import half_width
from sim.tokens import F64

HOLLOW: Any = {"marker": "o", "fillstyle": "none", "markersize": 5}
TIMED = "run with steps.timed: last or all"


def rank_loads(result: Result, *, width_in: float = WIDTH_IN) -> Figure:
    """Draw the expert tokens of every rank over the mean, sorted, all layers of a timed step together; mean over steps and
    replicas. Hollow marks at the left: the busiest rank of a single layer, which its other ranks wait for.

    Dotted: what a uniformly random gate over as many tokens would show with equal ranks, by the normal approximation of
    order statistics. Raises ValueError if no step was timed or no policy has routed experts.
    """
    table = filled(result, "devices", ("policy", "replica", "step"), TIMED)
    if "expert_tokens" not in table or not (table.expert_tokens.fillna(0) > 0).any():
        raise Unfit("no policy of this result has routed experts whose ranks were timed")
    curves: dict[str, F64] = {}
    floors: dict[tuple[int, int, int], F64] = {}
    for name in policy_names(result):
        rows = table[(table.policy == name) & table.expert_tokens.notna()]
        steps = [tokens.to_numpy(float) for _, tokens in rows.groupby(["replica", "step"]).expert_tokens]
        if steps and steps[0].sum():
            curves[name] = np.mean([np.sort(tokens)[::-1] / tokens.mean() for tokens in steps], axis=0)
            model = result.scenario.model_of(policy_named(result, name))
            pairs = round(float(np.mean([tokens.sum() for tokens in steps])))
            key = (len(curves[name]), model.num_experts_per_tok, model.n_routed_experts)
            floors.setdefault(key, uniform_rank_loads(pairs, *key))
    names, largest = list(curves), by_policy(result, "device_max_over_mean")["mean"]
    handles = [Line2D([], [], **line_style(i, len(names))) for i in range(len(names))]
    handles.append(Line2D([], [], color=FLOOR, linestyle=":"))
    handles.append(Line2D([], [], color=FLOOR, linestyle="", **HOLLOW))
    known = [*names, "uniform gate", "busiest of one layer"]
    _, legend_in = legend_shape(known, width_in)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(
            figsize=(width_in, (2.6 if width_in > COLUMN_IN else 2.3) + legend_in), layout="constrained"
        )
        ranks = max(len(curve) for curve in curves.values())
        for i, (name, curve) in enumerate(curves.items()):
            style = line_style(i, len(names))
            axis.plot(np.arange(1, len(curve) + 1), curve, **style)
            axis.plot(1 - 0.02 * ranks, largest[name], color=style["color"], **HOLLOW)
        for floor in floors.values():
            axis.plot(np.arange(1, len(floor) + 1), floor, color=FLOOR, linestyle=":")
        axis.set_xlabel("rank [by load]")
        axis.set_ylabel("expert tokens [mean = 1]")
        rank_ticks(axis, ranks)
        axis.set_ylim(bottom=min(0.8, axis.get_ylim()[0]))
        axis.set_xlim(1 - 0.04 * ranks, ranks + 0.02 * ranks)
        legend_below(figure, handles, known)
    return finished(figure)


def uniform_rank_loads(pairs: int, ep_size: int, k: int, n_routed_experts: int) -> F64:
    """Return [P] expected loads over their mean, sorted from the largest, of ranks with equally many of E experts, if
    every token picks k different experts uniformly at random; ``pairs`` (token, expert) pairs in all.

    A token's experts on one rank are hypergeometric; many tokens make the loads normal, and Blom's formula gives the
    expected order statistics of P normal values (Statistical Estimates and Transformed Beta-Variables, 1958).

    >>> uniform_rank_loads(8 * 4096, 4, 8, 256).round(4).tolist()
    [1.0114, 1.0033, 0.9967, 0.9886]
    """
    share = 1.0 / ep_size
    of_a_token = k * share * (1 - share) * (n_routed_experts - k) / max(1, n_routed_experts - 1)
    # Loads sum to a constant; values that are independent before their mean is taken out have a larger variance.
    spread = np.sqrt(pairs / k * of_a_token * ep_size / max(1, ep_size - 1)) / (pairs * share)
    blom = (np.arange(ep_size, 0, -1) - 0.375) / (ep_size + 0.25)
    loads: F64 = 1.0 + spread * ndtri(blom)
    return loads


def redundancy(result: Result, *, width_in: float = WIDTH_IN) -> Figure:
    """Show what redundant experts buy and cost: imbalance, speed and memory against ``num_redundant_experts``, a line per
    placement and replica choice, with 95 % intervals over replicas.

    A run of steps shows step time and a device's memory, one that serves requests tokens per second and the cache that
    its fullest unit has room for. Raises ValueError if all policies have equally many redundant experts.
    """
    scenario = result.scenario
    counts = sorted({policy.placement.num_redundant_experts for policy in scenario.policies})
    if len(counts) < 2:
        raise Unfit("policies do not differ in placement.num_redundant_experts")
    panels = _served(result) if scenario.serving else _stepped(result)
    series = _series(scenario.policies)
    wide = width_in > COLUMN_IN
    _, legend_in = legend_shape(list(series), width_in)
    aside, ticks = 0.02 * counts[-1], counts[:1]
    for count in counts[1:]:
        if count - ticks[-1] >= counts[-1] / 6:
            ticks.append(count)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1 if wide else len(panels),
            len(panels) if wide else 1,
            figsize=(width_in, (2.2 if wide else 1.4 * len(panels) + 0.3) + legend_in),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        handles: list[Any] = []
        for axis, (label, data) in zip(axes.flat, panels, strict=True):
            handles = []
            for i, policies in enumerate(series.values()):
                x = np.array([policy.placement.num_redundant_experts for policy in policies])
                rows = data.loc[[policy.name for policy in policies]]
                error = rows["half_width"].to_numpy(float)
                handles.append(
                    axis.errorbar(
                        x + aside * (i - (len(series) - 1) / 2),
                        rows["mean"].to_numpy(float),
                        yerr=error if np.isfinite(error).all() else None,
                        marker=MARKERS[i % len(MARKERS)],
                        markersize=5,
                        capsize=2,
                        **line_style(i, len(series)),
                    )
                )
            axis.set_ylabel(label)
            axis.margins(y=0.12)
            axis.set_xticks(ticks)
            axis.yaxis.set_major_locator(MaxNLocator(4))
            if not data["mean"].notna().any():
                axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color=FLOOR)
        for axis in axes[-1]:
            axis.set_xlabel("redundant experts [slots]")
        legend_below(figure, handles, list(series))
    return finished(figure)


def _stepped(result: Result) -> list[tuple[str, pd.DataFrame]]:
    memory = [result.scenario.memory(policy)["total"] * 1e-9 for policy in result.scenario.policies]
    held = pd.DataFrame({"mean": memory, "half_width": np.nan}, index=policy_names(result))
    return [
        ("imbalance of ranks\n[max/mean]", by_policy(result, "device_max_over_mean")),
        ("step time [ms]", by_policy(result, "step_time_s")[["mean", "half_width"]] * 1e3),
        ("memory [GB/device]", held),
    ]


def _served(result: Result) -> list[tuple[str, pd.DataFrame]]:
    units = filled(result, "units", ("policy", "kv_cache_tokens"), "it served no requests")
    room = units.groupby("policy").kv_cache_tokens.min()
    scale, prefix = prefixed(float(room.max()), "")
    cache = pd.DataFrame({"mean": room * scale, "half_width": np.nan})
    decodes = by_policy(result, "tpot_mean_s")["mean"].notna().any()
    what = "output" if decodes else "input"
    return [
        ("imbalance of ranks\n[max/mean]", by_policy(result, "imbalance_mean")),
        (f"{what} [tokens/s/GPU]", by_policy(result, f"{what}_tokens_per_s_per_gpu")),
        (f"KV cache of a rank\n[{prefix} tokens]", cache),
    ]


def _series(policies: Sequence[Policy]) -> dict[str, list[Policy]]:
    """Return policies that differ in redundant experts alone, in their order, by what they share. One without any has no
    use for a choice of replicas: it begins every line of its placement, or stands alone."""

    def shared(policy: Policy, *, replicas: bool) -> Any:
        changes: dict[str, Any] = {
            "name": "",
            "placement": policy.placement.model_copy(update={"num_redundant_experts": 0}),
        }
        return policy.model_copy(update=changes if replicas else changes | {"replicas": Static()}).model_dump()

    lines: list[list[Policy]] = []
    for policy in (p for p in policies if p.placement.num_redundant_experts):
        line = next(
            (found for found in lines if shared(found[0], replicas=True) == shared(policy, replicas=True)), None
        )
        if line is None:
            lines.append([policy])
        else:
            line.append(policy)
    for policy in (p for p in policies if not p.placement.num_redundant_experts):
        alike = [line for line in lines if shared(line[-1], replicas=False) == shared(policy, replicas=False)]
        for line in alike:
            line.append(policy)
        if not alike:
            lines.append([policy])
    series: dict[str, list[Policy]] = {}
    for line in lines:
        line.sort(key=lambda policy: policy.placement.num_redundant_experts)
        label = f"{line[-1].placement.kind}, {line[-1].replicas.kind} replicas"
        series[line[-1].name if len(line) == 1 or label in series else label] = line
    return series


def rebalancing(result: Result, *, width_in: float = WIDTH_IN) -> Figure:
    """Show imbalance of ranks over steps with marks where experts moved, and below, what a step takes on average with its
    share of the moves; a white dash in a bar is that of its line. Means over replicas, 95 % intervals.

    Raises ValueError unless some policy moves experts and all steps are timed (``steps.timed: all``).
    """
    columns = ("policy", "replica", "step", "device_max_over_mean", "step_time_s")
    table = filled(result, "steps", columns, TIMED)
    if "step_and_moves_s" not in table:
        raise Unfit("no policy of this result moves experts (rebalance.interval_steps)")
    if table.step_time_s.isna().any():
        raise Unfit("not every step was timed: " + TIMED.replace("last or all", "all"))
    table = table.assign(
        total_s=table.step_and_moves_s.astype(float).fillna(table.step_time_s),
        moved=table.moved_bytes.astype(float).fillna(0.0) > 0,
    )
    names = policy_names(result)
    labels = [wrapped(name, 26 if width_in > COLUMN_IN else 18) for name in names]
    bars_in = row_in(labels) * len(names) + 0.1
    lines_in = 2.0 if width_in > COLUMN_IN else 1.7
    scale, unit = prefixed(float(table.total_s.max()), "s")
    with plt.rc_context(STYLE):
        figure, (over, below) = plt.subplots(
            2, 1, figsize=(width_in, lines_in + bars_in + 1.1), height_ratios=(lines_in, bars_in), layout="constrained"
        )
        for i, name in enumerate(names):
            by_step = table[table.policy == name].groupby("step")
            imbalance, moved = by_step.device_max_over_mean.mean(), by_step.moved.any()
            style = line_style(i, len(names))
            over.plot(imbalance, **style)
            over.plot(imbalance[moved], "v", color=style["color"], markersize=5, zorder=3)
        over.set_xlabel("step [batches]")
        over.set_ylabel("imbalance of ranks\n[max/mean]")
        over.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        _bars(below, table, names, scale)
        below.set_yticks(np.arange(len(names))[::-1], labels)
        below.set_xlabel(f"mean step with moves [{unit}]")
        handles = [Line2D([], [], color=FLOOR, marker="v", markersize=5, linestyle=""), Patch(color=FLOOR)]
        handles.append(Patch(facecolor="white", edgecolor=FLOOR, hatch="//////"))
        legend_below(figure, handles, ["experts moved", "step", "moves"])
    return finished(figure)


def _bars(axis: Axes, table: pd.DataFrame, names: Sequence[str], scale: float) -> None:
    """Draw a bar per policy: the step, what moves add to it, the interval and the sum."""
    rows, ends = np.arange(len(names))[::-1], []
    digits = max(0, 3 - math.floor(math.log10(table.total_s.max() * scale)))
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        mine = table[table.policy == name]
        step, total = mine.step_time_s.mean() * scale, mine.total_s.mean() * scale
        half = half_width(mine.groupby("replica").total_s.mean().to_numpy(float)) * scale
        style = line_style(i, len(names))
        axis.barh(row, step, color=style["color"], height=0.7)
        axis.barh(row, total - step, left=step, facecolor="white", edgecolor=style["color"], hatch="//////", height=0.7)
        axis.plot([0.02 * step, 0.2 * step], [row, row], **style | {"color": "white"})
        if np.isfinite(half):
            axis.errorbar(total, row, xerr=half, fmt="none", color="0.2", capsize=2.5, linewidth=1)
        ends.append(total + np.nan_to_num(half))
        axis.annotate(
            f"{total:.{digits}f}", (ends[-1], row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.set_xlim(0, 1.25 * max(ends))
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.tick_params(axis="y", length=0)


FIGURES: dict[str, Callable[[Result], Figure]] = {
    "device_matrix": device_matrix,
    "node_matrix": node_matrix,
    "link_load": link_load,
    "rank_loads": rank_loads,
    "redundancy": redundancy,
    "rebalancing": rebalancing,
}
