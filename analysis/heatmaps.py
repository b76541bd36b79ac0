"""Loads of experts as heat maps: by layer, and within each topic.

As in `analysis.figures`, each function returns a Matplotlib figure; ``width_in`` is 7 inches for a page's width, 3.5 for a
column's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.style import COLUMN_IN, STYLE, WIDTH_IN, Unfit, asked_policies, finished, need, wrapped
from sim.results import Result


def load_heatmap(
    result: Result,
    policies: Sequence[str] | str | None = None,
    *,
    by_load: bool = True,
    replica: int = 0,
    width_in: float = WIDTH_IN,
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
        raise Unfit("no policy of this result has routed experts")
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
        raise Unfit(f"{', '.join(asked)}: no routed experts")
    x = "expert [rank by load]" if by_load else "expert [index]"
    return _heatmaps(relative, x, "layer [index]", "load [mean of layer = 1]", width_in)


def topic_heatmap(
    result: Result,
    policies: Sequence[str] | str | None = None,
    *,
    layer: int | None = None,
    replica: int = 0,
    width_in: float = WIDTH_IN,
) -> Figure:
    """Map the relative load of every expert within each topic, one panel per policy (as DeepSeek-V3 report, Figure 9).

    layer: a MoE layer of the model; by default the middle one. Experts are ordered by the topic that likes them most, the
    same way in every panel, so that specialisation shows as blocks. Needs a run with ``steps.record_topic_experts: true``
    and several topics; raises KeyError for an unknown policy, layer or replica, and ValueError without such loads.
    """
    asked = asked_policies(result, policies)
    topics = result.topics
    if topics.empty or "expert_tokens" not in topics:
        raise Unfit("no expert loads by topic: run several topics with steps.record_topic_experts: true")
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
    return _heatmaps(relative, x, "", "load [mean of topic = 1]", width_in)


def _heatmaps(relative: dict[str, pd.DataFrame], x: str, y: str, label: str, width_in: float) -> Figure:
    """Draw one panel per policy of load / mean; rows are layers (numbers) or topics (names). Shades are logarithmic and
    symmetric about the mean; the rarest 1 % may lie beyond the scale's ends."""
    everything = np.concatenate([share.to_numpy().ravel() for share in relative.values()])
    distance = np.abs(np.log(np.maximum(everything, 1e-3)))
    limit = float(np.clip(np.exp(np.nanpercentile(distance, 99)), 1.25, 10))
    wide = width_in > COLUMN_IN
    named = any(not pd.api.types.is_numeric_dtype(share.index) for share in relative.values())
    columns = min(3 if wide else 1 if named else 2, len(relative))
    n_rows = -(-len(relative) // columns)
    panel_in = 1.75 if wide else 1.5
    alike = len({share.shape for share in relative.values()}) == 1
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            n_rows,
            columns,
            figsize=(width_in, 0.6 + panel_in * n_rows),
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
            axis.set_title(wrapped(name, 26 if wide or columns == 1 else 19), fontsize=8 if wide else 7)
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
        figure.supxlabel(x if wide else wrapped(x, 42), fontsize=9)
        figure.supylabel(y, fontsize=9)
        ticks = [1 / limit, limit**-0.5, 1.0, limit**0.5, limit]
        bar = figure.colorbar(image, ax=axes, ticks=np.log(ticks), extend="both", shrink=0.9)
        bar.ax.set_yticklabels([f"{tick:.2g}" for tick in ticks])
        bar.set_label(label, fontsize=8)
    return finished(figure)
