"""One constant at a time: who wins at either end of its range, and how far it would have to be off for another to win."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sim.sensitive.constants import Constant
from sim.sensitive.standings import NOBODY, Standing, standing
from sim.tokens import F64

FACTOR = 4.0
"""How far off a constant is taken to be at most."""
_EXACT = 1.002  # ratio of the bracket at which the search for a break-even factor ends
_LEAST = 1e-3  # factor below which none is told from an end at 0

Ask = Callable[[Sequence[tuple[int, float]]], F64]
"""Values [n, policies, replicas] with one constant, by number, at a factor and all others as stated."""


@dataclass(frozen=True)
class BreakEven:
    """The factor nearest to 1 in one direction at which another policy begins to win, and which."""

    factor: float
    winner: int


@dataclass(frozen=True)
class Row:
    """low, high: the standing at the ends of the range. effect: the largest relative change of any policy's metric there,
    infinite where one has none any more. below, above: where the winner changes; None: not where it was looked, which is at
    the ends of the range and at ``sought`` (least and largest factor). killed: policies by number that have no metric any
    more, at the low and at the high end."""

    constant: Constant
    low: Standing
    high: Standing
    effect: float
    below: BreakEven | None
    above: BreakEven | None
    sought: tuple[float, float]
    killed: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def changes(self, winner: int) -> bool:
        """Whether either end of the range has another winner."""
        return any(end.winner not in (winner, NOBODY) for end in (self.low, self.high))

    @property
    def within(self) -> BreakEven | None:
        """`nearest` of those inside the range."""
        c = self.constant
        return _nearer([one for one in (self.below, self.above) if one is not None and c.low <= one.factor <= c.high])

    @property
    def nearest(self) -> BreakEven | None:
        """The nearer one of ``below`` and ``above``."""
        return _nearer([one for one in (self.below, self.above) if one is not None])


def distance(factor: float) -> float:
    """Return how far off ``factor`` is, as a logarithm; infinite for 0 and below."""
    return abs(math.log(factor)) if factor > 0 else math.inf


def _nearer(found: Sequence[BreakEven]) -> BreakEven | None:
    return min(found, key=lambda one: distance(one.factor)) if found else None


def ends(constants: Sequence[Constant], ask: Ask, stated: F64, sign: float) -> list[Row]:
    """Return the rows of all constants, without break-even factors."""
    points = [(i, x) for i, constant in enumerate(constants) for x in (constant.low, constant.high)]
    values = ask(points)
    rows = []
    for i, constant in enumerate(constants):
        low, high = values[2 * i], values[2 * i + 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.abs(values[2 * i : 2 * i + 2] / stated - 1.0)
        change = np.where(np.isnan(values[2 * i : 2 * i + 2]), np.inf, np.nan_to_num(change, nan=0.0, posinf=np.inf))
        lost, there = [tuple(np.flatnonzero(np.isnan(end).any(axis=1)).tolist()) for end in (low, high)], (constant.low, constant.high)  # fmt: skip
        rows.append(
            Row(
                constant,
                standing(low, sign),
                standing(high, sign),
                float(change.max()),
                None,
                None,
                there,
                (lost[0], lost[1]),
            )
        )
    return rows


def reach(rows: Sequence[Row], clipped: Callable[[Constant], tuple[float, float]]) -> list[tuple[float, ...]]:
    """Return the factors of each row that are tried besides the ends of its range: those of ``clipped``, which cuts a quarter
    and four times to what the scenario allows; none of counts that change the routing, of which no more than the range is
    known to run."""
    return [
        ()
        if row.constant.absolute or (row.constant.whole and row.constant.reroutes)
        else tuple(x for x in clipped(row.constant) if not row.constant.low <= x <= row.constant.high)
        for row in rows
    ]


def break_evens(
    rows: Sequence[Row], ask: Ask, winner: int, sign: float, tried: Sequence[tuple[float, ...]]
) -> list[Row]:
    """Return the rows with the factors at which ``winner`` stops winning, by bisection of all brackets at once."""
    places = [(i, x) for i, factors in enumerate(tried) for x in factors]
    ahead = dict(zip(places, _winners(ask(places), sign, winner), strict=True)) if places else {}
    brackets: dict[tuple[int, bool], tuple[float, float, int]] = {}
    for i, row in enumerate(rows):
        if row.constant.absolute:
            continue
        known = {x: end.winner for x, end in ((row.constant.low, row.low), (row.constant.high, row.high))}
        known = {x: winner if who == NOBODY else who for x, who in known.items()}
        known |= {x: ahead[i, x] for x in tried[i]}
        for up in (False, True):
            inside = 1.0
            for x in sorted((x for x in known if (x > 1) == up and x != 1), key=lambda x: abs(x - 1)):
                if known[x] != winner:
                    brackets[i, up] = (inside, x, known[x])
                    break
                inside = x
    while todo := [key for key, one in brackets.items() if not _narrow(rows[key[0]].constant, *one[:2])]:
        # A bracket that ends at 0 (or below) has no ratio: it is halved until another wins before its end.
        middles = [math.sqrt(a * b) if b > 0 else a / 2 for a, b, _ in (brackets[key] for key in todo)]
        found = _winners(ask([(i, x) for (i, _), x in zip(todo, middles, strict=True)]), sign, winner)
        for key, x, who in zip(todo, middles, found, strict=True):
            inside, out, other = brackets[key]
            brackets[key] = (x, out, other) if who == winner else (inside, x, who)
    done = []
    for i, row in enumerate(rows):
        below, above = (
            BreakEven(_reached(row.constant, brackets[i, up][1]), brackets[i, up][2]) if (i, up) in brackets else None
            for up in (False, True)
        )
        looked = (min((row.constant.low, *tried[i])), max((row.constant.high, *tried[i])))
        done.append(replace(row, below=below, above=above, sought=looked))
    return done


def _narrow(constant: Constant, inside: float, out: float) -> bool:
    """Whether a bracket needs no further halving; that of a whole number ends at the next one."""
    if constant.whole and all(abs(a - b) <= 1 for a, b in zip(constant.at(inside), constant.at(out), strict=True)):
        return True
    return inside <= _LEAST if out <= 0 else max(inside / out, out / inside) <= _EXACT


def _reached(constant: Constant, factor: float) -> float:
    """``factor``, or the one nearer to 1 that gives the same whole number."""
    if not constant.whole or not constant.values[0]:
        return factor
    return min((factor, constant.at(factor)[0] / constant.values[0]), key=lambda x: abs(x - 1))


def _winners(values: F64, sign: float, otherwise: int) -> list[int]:
    """The winner of each; ``otherwise`` where nobody wins."""
    found = [standing(one, sign).winner for one in values]
    return [otherwise if who == NOBODY else who for who in found]
