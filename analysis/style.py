"""What all figures share: sizes, colours, names of policies, units of axes, and complaints about what a table lacks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from sim.results import Result
from sim.settings import Policy

STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": False, "font.size": 9}
WIDTH_IN = 7.0
# Up to this width panels go below each other that otherwise stand side by side.
COLUMN_IN = 4.5
FLOOR = "0.45"
MARKERS = "osD^vPX<>*"
LEGEND_CHARACTERS = 40
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))


class Unfit(ValueError):
    """A result of this kind has no data for this figure."""


class NoColumn(KeyError):
    """A table of a result of this kind lacks a column that this figure needs."""


def policy_names(result: Result) -> list[str]:
    return [policy.name for policy in result.scenario.policies]


def policy_named(result: Result, name: str) -> Policy:
    return next(policy for policy in result.scenario.policies if policy.name == name)


def asked_policies(result: Result, policies: Sequence[str] | str | None) -> list[str]:
    """Return the names in ``policies``, all of the result's by default; raises KeyError for a stranger."""
    asked = [policies] if isinstance(policies, str) else list(policies or policy_names(result))
    unknown = [name for name in asked if name not in policy_names(result)]
    if unknown:
        raise KeyError(f"no policy {unknown[0]!r}; there are {', '.join(policy_names(result))}")
    return asked


def wrapped(name: str, width: int) -> str:
    """Break a name into as few lines of ``width`` as it needs, of about equal length; a word only if it is longer."""
    lines = textwrap.wrap(name, width, break_on_hyphens=False)
    for narrower in range(max(math.ceil(len(name) / len(lines)), *map(len, name.split())), width):
        balanced = textwrap.wrap(name, narrower, break_on_hyphens=False)
        if len(balanced) == len(lines):
            return "\n".join(balanced)
    return "\n".join(lines)


def row_in(labels: Sequence[str]) -> float:
    """Return the height of a row [inches] that the longest label fits."""
    return 0.16 + 0.16 * max(label.count("\n") + 1 for label in labels)


def by_policy(result: Result, metric: str) -> pd.DataFrame:
    """Return mean and half-width of ``metric`` by policy, in the scenario's order; KeyError names an unknown metric."""
    summary = result.summary()
    rows = summary[summary.metric == metric]
    if rows.empty:
        raise KeyError(f"no metric {metric!r}; there are {', '.join(sorted(set(summary.metric)))}")
    return rows.set_index("policy").loc[policy_names(result)]


def need(table: pd.DataFrame, name: str, columns: Sequence[str]) -> None:
    """Raise NoColumn, a KeyError, if ``table`` lacks one of ``columns``."""
    missing = [column for column in columns if column not in table]
    if missing:
        raise NoColumn(f"table {name!r} has no column {missing[0]!r}; it has {', '.join(table.columns) or 'none'}")


def filled(result: Result, name: str, columns: Sequence[str], hint: str) -> pd.DataFrame:
    """Return a table with at least ``columns``. Raises ValueError with ``hint`` if it is empty, KeyError as `need`."""
    table = pd.DataFrame(result.tables.get(name, {}))
    if table.empty:
        raise Unfit(f"this result has no table {name!r}: {hint}")
    need(table, name, columns)
    return table


def prefixed(most: float, unit: str) -> tuple[float, str]:
    """Return the factor and the unit in which numbers up to ``most`` read best, from pico to tera.

    >>> prefixed(0.0032, "s"), prefixed(5.1e9, "B")
    ((1000.0, 'ms'), (1e-09, 'GB'))
    """
    power = math.floor(math.log10(most) / 3) if most > 0 else 0
    power = min(max(power, -4), 4)
    return float(f"1e{-3 * power}"), "pnµm kMGT"[power + 4].strip() + unit


def colours(n: int) -> list[tuple[float, float, float]]:
    return list(sns.color_palette("colorblind", n))


def gradient() -> Colormap:
    """Return a map from pale to dark whose low end still shows on white."""
    found: Colormap = sns.color_palette("flare", as_cmap=True)
    return found


def line_style(i: int, n: int) -> dict[str, Any]:
    """Return how line ``i`` of ``n`` looks: dashes tell lines apart where colours do not."""
    return {"color": colours(n)[i], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.4}


def canvas(ax: Axes | None, height_in: float, width_in: float = WIDTH_IN) -> tuple[Figure, Axes]:
    if ax is None:
        return plt.subplots(figsize=(width_in, height_in), layout="constrained")
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("ax belongs to no figure")
    return figure, ax


def rank_ticks(axis: Axes, n: int) -> None:
    """Number ranks from 1 to ``n`` on the x axis, at five places."""
    axis.set_xticks(np.unique(np.linspace(1, n, 5).round()))


def panels(n: int, width_in: float) -> tuple[int, int]:
    """Return the rows and columns of ``n`` panels: up to four beside each other on a page's width, two on a column's."""
    rows = -(-n // (4 if width_in > COLUMN_IN else 2))
    return rows, -(-n // rows)


def legend_shape(names: Sequence[str], width_in: float) -> tuple[int, float]:
    """Return the columns in which a legend of ``names`` fits, and its height [inches]."""
    labels = [wrapped(name, LEGEND_CHARACTERS) for name in names]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = min(len(names), max(1, int(width_in / (0.45 + 0.06 * longest))))
    lines = max(label.count("\n") + 1 for label in labels)
    return columns, 0.1 + 0.17 * lines * -(-len(names) // columns)


def legend_below(
    figure: Figure, handles: Sequence[Any], names: Sequence[str], loc: Literal["lower", "upper"] = "lower"
) -> None:
    """Name ``handles`` under the panels, or above them (``loc="upper"``). Leave `legend_shape`'s height for it."""
    figure.legend(
        handles,
        [wrapped(name, LEGEND_CHARACTERS) for name in names],
        loc="outside lower center" if loc == "lower" else "outside upper center",
        ncols=legend_shape(names, figure.get_figwidth())[0],
        frameon=False,
        fontsize=8,
        columnspacing=1.2,
    )


def finished(figure: Figure, ax: Axes | None = None) -> Figure:
    """Take our figure out of pyplot's hands: a notebook shows it once, as its cell's value, and nothing piles up."""
    if ax is None:
        plt.close(figure)
    return figure
