"""Would another policy win if a constant were off? A tornado of the lead at both ends of every range, and Sobol indices.

As in `analysis.figures`, the function returns a Matplotlib figure; ``width_in`` is 7 inches for a page's width, 3.5 for a
column's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.style import COLUMN_IN, FLOOR, STYLE, WIDTH_IN, colours, finished, legend_below, legend_shape, wrapped
from sim.sensitive import Sensitivity

# Constants that are drawn: those with the largest swing, and all that change the winner.
MOST = 15


def sensitivity(found: Sensitivity, *, width_in: float = WIDTH_IN) -> Figure:
    """Draw by how much the stated winner leads at the low and the high end of every constant's range, one constant at a time,
    and beside it, where samples were taken, the Sobol indices of that lead with 95 % intervals.

    Where another policy wins, the bar is red and hatched, reaches left of zero by that policy's lead, and names it. Constants without an effect
    are left out, and so are those that leave a policy without the metric, and those with the least swing beyond fifteen.
    Raises ValueError if no constant is left.
    """
    winner = found.policies[found.stated.winner]
    table = _lead(found, winner)
    if table.empty:
        raise ValueError(f"no constant that was varied has any effect on {found.metric.name}")
    indices = found.indices
    wide, both = width_in > COLUMN_IN, not indices.empty
    labels = [wrapped(name, 30 if wide and not both else 22) for name in table.constant]
    lines = max(label.count("\n") + 1 for label in labels)
    handles, known = _legend(table, both=both)
    rows_in = (0.12 + 0.13 * lines) * len(table) + 0.6
    down = both and not wide
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2 if down else 1,
            2 if both and wide else 1,
            figsize=(width_in, rows_in * (2 if down else 1) + legend_shape(known, width_in)[1]),
            squeeze=False,
            sharey=not down,
            width_ratios=(3, 2) if both and wide else None,
            layout="constrained",
        )
        _tornado(axes[0, 0], table, 100 * found.stated.ahead, winner, width_in)
        if both:
            _sobol(axes.flat[1], indices.set_index("constant").reindex(table.constant))
        for axis in axes.flat:
            axis.set_yticks(np.arange(len(table)), labels, fontsize=8)
            axis.set_ylim(len(table) - 0.4, -0.6)
            axis.tick_params(axis="y", length=0, labelleft=down or axis is axes[0, 0])
        legend_below(figure, handles, known)
    return finished(figure)


def _lead(found: Sensitivity, winner: str) -> pd.DataFrame:
    """Return the constants that are drawn, the largest swing first, with the winner's lead [%] at both ends."""
    table = found.one_at_a_time
    table = table[table.effect > 0] if len(table) else table
    if table.empty:
        return table
    for end in ("low", "high"):
        ahead = 100 * table[f"{end}_ahead"].to_numpy(float)
        lead = np.where(table[f"{end}_winner"] == winner, ahead, -ahead)
        table = table.assign(**{f"{end}_lead": lead})[np.isfinite(lead)]
    table = table.assign(swing=(table.high_lead - table.low_lead).abs())
    table = table.sort_values("swing", ascending=False, kind="stable")
    shown: pd.DataFrame = table[(np.arange(len(table)) < MOST) | table.changes.to_numpy(bool)].reset_index(drop=True)
    return shown


def _tornado(axis: Axes, table: pd.DataFrame, stated: float, winner: str, width_in: float) -> None:
    light, dark, red = colours(10)[9], colours(10)[0], colours(10)[3]
    reach = max(float(table[["low_lead", "high_lead"]].abs().to_numpy().max()), abs(stated), 1e-9)
    for row, (_, constant) in enumerate(table.iterrows()):
        for end, colour, shift in (("low", light, -0.2), ("high", dark, 0.2)):
            lead, changed = constant[f"{end}_lead"], constant[f"{end}_winner"] != winner
            look: dict[str, Any] = (
                {"color": red, "hatch": "////", "edgecolor": "white"} if changed else {"color": colour}
            )
            axis.barh(row + shift, lead - stated, left=stated, height=0.38, linewidth=0, **look)
            if changed:
                note = constant[f"{end}_winner"]
                note = note if len(note) <= 24 else note[:23] + "…"
                axis.annotate(
                    note,
                    (max(lead, stated), row + shift),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=6.5,
                    color=red,
                )
    axis.axvline(stated, color=FLOOR, linewidth=1)
    axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
    low = min(0.0, float(table[["low_lead", "high_lead"]].to_numpy().min()))
    high = max(stated, float(table[["low_lead", "high_lead"]].to_numpy().max()))
    right = 0.45 if table.changes.any() else 0.06
    axis.set_xlim(low - 0.06 * (high - low), high + right * (high - low) + 1e-9 * reach)
    axis.set_xlabel(wrapped(f"lead of {winner} [%]", 40 if width_in > COLUMN_IN else 30))


def _sobol(axis: Axes, indices: pd.DataFrame) -> None:
    rows = np.arange(len(indices))
    for name, colour, shift in (("total", "0.7", -0.2), ("first", "0.35", 0.2)):
        values = indices[name].to_numpy(float)
        error = indices[f"{name}_half_width"].to_numpy(float)
        axis.barh(rows + shift, np.nan_to_num(values), height=0.38, color=colour)
        known = np.isfinite(error) & np.isfinite(values)
        axis.errorbar(
            values[known],
            (rows + shift)[known],
            xerr=error[known],
            fmt="none",
            ecolor="0.1",
            capsize=1.5,
            elinewidth=0.8,
        )
    axis.set_xlim(min(0.0, axis.get_xlim()[0]), max(1.0, axis.get_xlim()[1]))
    axis.set_xlabel("Sobol index [share of variance]")


def _legend(table: pd.DataFrame, *, both: bool) -> tuple[list[Any], list[str]]:
    light, dark, red = colours(10)[9], colours(10)[0], colours(10)[3]
    handles: list[Any] = [Patch(color=light), Patch(color=dark), Line2D([], [], color=FLOOR)]
    known = ["at the low end", "at the high end", "as stated"]
    if table.changes.any():
        handles.append(Patch(facecolor=red, hatch="////", edgecolor="white"))
        known.append("another wins")
    if both:
        handles += [Patch(color="0.7"), Patch(color="0.35")]
        known += ["total index", "first-order index"]
    return handles, known


FIGURES: dict[str, Callable[..., Figure]] = {"sensitivity": sensitivity}
