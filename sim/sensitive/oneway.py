"""One constant at a time: who wins at either end of its range, and how far it would have to be off for another to win."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sim.sensitive.constants import Constant
from sim.sensitive.standings import Standing, standing
from sim.tokens import F64

FACTOR = 4.0
"""How far off a constant is taken to be at most."""
_EXACT = 1.002  # ratio of the bracket at which the search for a break-even factor ends

Ask = Callable[[Sequence[tuple[int, float]]], F64]
"""Values [n, policies, replicas] with one constant, by number, at a factor and all others as stated."""


@dataclass(frozen=True)
class BreakEven:
    """The factor nearest to 1 in one direction at which another policy begins to win, and which."""

    factor: float
    winner: int


@dataclass(frozen=True)
class Row:
    """low, high: the standing at the ends of the range. effect: the largest relative change of any policy's metric there.
    below, above: where the winner changes; None: not where it was looked, which is at the ends of the range and at ``sought``
    (least and largest factor)."""

    constant: Constant
    low: Standing
    high: Standing
    effect: float
    below: BreakEven | None
    above: BreakEven | None
    sought: tuple[float, float]

    def changes(self, winner: int) -> bool:
        """Whether either end of the range has another winner."""
        return self.low.winner != winner or self.high.winner != winner

    @property
    def nearest(self) -> BreakEven | None:
        """The nearer one of ``below`` and ``above``."""
        found = [one for one in (self.below, self.above) if one is not None]
        return min(found, key=lambda one: abs(math.log(one.factor))) if found else None


def ends(constants: Sequence[Constant], ask: Ask, stated: F64, sign: float) -> list[Row]:
    """Return the rows of all constants, without break-even factors."""
    points = [(i, x) for i, constant in enumerate(constants) for x in (constant.low, constant.high)]
    values = ask(points)
    rows = []
    for i, constant in enumerate(constants):
        low, high = values[2 * i], values[2 * i + 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.abs(values[2 * i : 2 * i + 2] / stated - 1.0)
        effect = float(np.nan_to_num(change, nan=0.0).max())
        rows.append(
            Row(constant, standing(low, sign), standing(high, sign), effect, None, None, (constant.low, constant.high))
        )
    return rows


def reach(rows: Sequence[Row], clipped: Callable[[Constant], tuple[float, float]]) -> list[tuple[float, ...]]:
    """Return the factors of each row that are tried besides the ends of its range: those of ``clipped``, which cuts a quarter
    and four times to what the scenario allows."""
    return [
        ()
        if row.constant.absolute
        else tuple(x for x in clipped(row.constant) if not row.constant.low <= x <= row.constant.high)
        for row in rows
    ]


def break_evens(
    rows: Sequence[Row], ask: Ask, winner: int, sign: float, tried: Sequence[tuple[float, ...]]
) -> list[Row]:
    """Return the rows with the factors at which ``winner`` stops winning, by bisection of all brackets at once."""
    places = [(i, x) for i, factors in enumerate(tried) for x in factors]
    ahead = dict(zip(places, _winners(ask(places), sign), strict=True)) if places else {}
    brackets: dict[tuple[int, bool], tuple[float, float, int]] = {}
    for i, row in enumerate(rows):
        if row.constant.absolute:
            continue
        known = {row.constant.low: row.low.winner, row.constant.high: row.high.winner}
        known |= {x: ahead[i, x] for x in tried[i]}
        for up in (False, True):
            inside = 1.0
            for x in sorted((x for x in known if (x > 1) == up and x != 1), key=lambda x: abs(math.log(x))):
                if known[x] != winner:
                    brackets[i, up] = (inside, x, known[x])
                    break
                inside = x
    while todo := [key for key, (inside, out, _) in brackets.items() if max(inside / out, out / inside) > _EXACT]:
        middles = [math.sqrt(brackets[key][0] * brackets[key][1]) for key in todo]
        found = _winners(ask([(i, x) for (i, _), x in zip(todo, middles, strict=True)]), sign)
        for key, x, who in zip(todo, middles, found, strict=True):
            inside, out, other = brackets[key]
            brackets[key] = (x, out, other) if who == winner else (inside, x, who)
    done = []
    for i, row in enumerate(rows):
        below, above = (
            BreakEven(brackets[i, up][1], brackets[i, up][2]) if (i, up) in brackets else None for up in (False, True)
        )
        looked = (min((row.constant.low, *tried[i])), max((row.constant.high, *tried[i])))
        done.append(Row(row.constant, row.low, row.high, row.effect, below, above, looked))
    return done


def _winners(values: F64, sign: float) -> list[int]:
    return [standing(one, sign).winner for one in values]
