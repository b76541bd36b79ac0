"""What came out: tables, the share of samples that the winner wins, and a conclusion that claims no more than was sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sim.results import Metric, Table
from sim.scenario import Scenario
from sim.sensitive.constants import Constant
from sim.sensitive.indices import Indices
from sim.sensitive.oneway import BreakEven, Row, distance
from sim.sensitive.standings import NOBODY, Standing

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Together:
    """All constants varied at once. samples: independent draws; wins [policies]: of these; table: every point of the design
    with its winner and the gap between the stated winner and the stated runner-up. indices: None where ``without`` points
    have no gap, since one of the two has no value there."""

    constants: tuple[Constant, ...]
    indices: Indices | None
    without: int
    samples: int
    wins: tuple[int, ...]
    table: Table


@dataclass(frozen=True)
class Sensitivity:
    """The answer. policies: who competes, by name; left_out: yardsticks that do not. rows: constants with an effect at an end of
    their range, the largest one first; without_effect: the others. together: None if no samples were asked for."""

    scenario: Scenario
    metric: Metric
    policies: tuple[str, ...]
    left_out: tuple[str, ...]
    stated: Standing
    rows: tuple[Row, ...]
    without_effect: tuple[Row, ...]
    together: Together | None
    evaluations: int

    @property
    def one_at_a_time(self) -> pd.DataFrame:
        """One row per constant: who wins at either end of its range, by how much, and the break-even factors."""
        import pandas as pd

        return pd.DataFrame(self.one_at_a_time_table())

    @property
    def indices(self) -> pd.DataFrame:
        """One row per constant that was varied with the others: first-order and total Sobol index of the gap between the
        stated winner and runner-up, with 95 % half-widths; empty without samples, and where not all of them have a gap."""
        import pandas as pd

        return pd.DataFrame(self.indices_table())

    @property
    def samples(self) -> pd.DataFrame:
        """One row per point of the design: the constants' factors by label, the winner and the gap."""
        import pandas as pd

        return pd.DataFrame({} if self.together is None else self.together.table)

    def one_at_a_time_table(self) -> Table:
        out: Table = {}
        for row in (*self.rows, *self.without_effect):
            constant = row.constant
            found: dict[str, Any] = {
                "constant": constant.label, "keys": " ".join(constant.keys), "value": constant.values[0],
                "low": constant.low, "high": constant.high, "effect": row.effect,
            }  # fmt: skip
            for name, end, killed in (("low", row.low, row.killed[0]), ("high", row.high, row.killed[1])):
                found |= {
                    f"{name}_winner": self._name(end.winner), f"{name}_runner_up": self._name(end.runner_up),
                    f"{name}_kills": ", ".join(self.policies[i] for i in killed),
                    f"{name}_margin": end.margin, f"{name}_margin_half_width": end.half_width, f"{name}_ahead": end.ahead,
                }  # fmt: skip
            found["changes"] = row.changes(self.stated.winner)
            for name, one in (("below", row.below), ("above", row.above)):
                found[f"break_even_{name}"] = math.nan if one is None else one.factor
                found[f"winner_{name}"] = "" if one is None else self.policies[one.winner]
            found |= {"sought_from": row.sought[0], "sought_to": row.sought[1]}
            for column, value in found.items():
                out.setdefault(column, []).append(value)
        return out

    def _name(self, number: int) -> str:
        return "" if number == NOBODY else self.policies[number]

    def indices_table(self) -> Table:
        if self.together is None or self.together.indices is None:
            return {}
        names = [constant.label for constant in self.together.constants]
        return {"constant": names} | {name: values.tolist() for name, values in self.together.indices._asdict().items()}

    @property
    def share(self) -> float:
        """Share of the independent samples in which the stated winner wins; NaN without samples."""
        if self.together is None:
            return math.nan
        return self.together.wins[self.stated.winner] / self.together.samples

    @property
    def conclusion(self) -> str:
        """One or two sentences: how often the winner wins, and what could overturn it."""
        return " ".join(part for part in (self._often(), self._alone()) if part)

    def _often(self) -> str:
        winner, together = self.policies[self.stated.winner], self.together
        if not self.rows:
            return f"{winner} wins, and no constant that was varied has any effect on {self.metric.name}."
        if together is None:
            return ""
        wins, n = together.wins[self.stated.winner], together.samples
        if wins == n:
            return f"{winner} wins in all {n} samples of {len(together.constants)} constants varied together."
        text = f"{winner} wins in {100 * wins / n:.3g} % of {n} samples of {len(together.constants)} constants varied together"
        others = [(count, i) for i, count in enumerate(together.wins) if count and i != self.stated.winner]
        if others:
            count, other = max(others, key=lambda one: (one[0], -one[1]))
            text += f", {self.policies[other]} in {100 * count / n:.3g} %"
        if nobody := n - sum(together.wins):
            text += f"; in {100 * nobody / n:.3g} % no policy has a {self.metric.name}"
        return f"{text}."

    def _alone(self) -> str:
        winner = self.policies[self.stated.winner]
        if not self.rows:
            return ""
        overturning = [row for row in self.rows if row.changes(self.stated.winner)]
        if overturning:
            told = [f"{row.constant.label}{self._break_even(row.within)}" for row in overturning]
            return f"Alone within its range, {_either(told)} overturns {'that' if self.together else winner}."
        near = sorted(
            (row for row in (*self.rows, *self.without_effect) if row.nearest is not None),
            key=lambda row: distance(row.nearest.factor) if row.nearest else math.inf,
        )
        text = f"No constant alone overturns {'that' if self.together else winner} within its range"
        if not near:
            return f"{text}{self._sought()}."
        told = [f"{row.constant.label}{self._break_even(row.nearest)}" for row in near[:2]]
        return f"{text}; nearest: {_either(told)}."

    def _sought(self) -> str:
        """How far beyond the ranges it was looked, if anywhere."""
        rows = (*self.rows, *self.without_effect)
        beyond = [row for row in rows if row.sought != (row.constant.low, row.constant.high)]
        if not beyond:
            return ""
        most = max(max(x, 1 / x) for row in beyond for x in row.sought if x > 0)
        which = "" if len(beyond) == len(rows) else f" ({len(beyond)} of {len(rows)} constants)"
        return f", nor beyond it, where it was sought up to a factor of {most:.3g}{which}"

    def _break_even(self, one: BreakEven | None) -> str:
        return "" if one is None else f" (from x{one.factor:.3g}: {self.policies[one.winner]})"


def _either(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} or {items[-1]}"
