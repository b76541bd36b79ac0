"""The end of an optimisation in the terminal: the front, the best place on it, and what could not be had."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from sim.aligned import grid
from sim.optimizing import Front, Goal
from sim.optimizing.search import Trial
from sim.report.grids import number, two_digits
from sim.report.sweeps import plain, short_keys
from sim.results import Metric
from sim.sweeping.points import column

ROWS = 30
ANY = "any"
"""Where an axis makes no difference to the policy."""
HOW = "(95 %, paired by replica)"
UNTOLD = "One replica cannot tell neighbours from chance: --replicas 5 would."
_REASONS = 8


def table(front: Front, rows: int = ROWS) -> str:
    """Return what was found as text: at most ``rows`` of the front, by the first goal."""
    ran = sum(trial.rows is not None for trial in front.tried)
    lines = [f"{ran} runs, {len(front.feasible)} of them feasible: {_aims(front)}"]
    if found := _together(front):
        lines += [
            "",
            *grid(
                _head(front), [_row(front, found, i) for i in range(min(rows, len(found)))], (0, 1 + len(front.axes))
            ),
        ]
        if len(found) > rows:
            lines.append(f"and {len(found) - rows} more: see pareto.csv")
        lines += ["", *(_several(front, found) if len(front.goals) > 1 else _single(front))]
    else:
        lines += ["", "No trial is feasible."]
    for name, policies in front.dropped.items():
        lines += ["", f"{name} is no goal, for {', '.join(policies)} ha{'s' if len(policies) == 1 else 've'} none."]
    if front.reasons:
        shown = list(front.reasons.items())
        lines += ["", f"{sum(front.reasons.values())} of {len(front.tried)} trials are infeasible:"]
        lines += [f"  {count} x {reason}" for reason, count in shown[:_REASONS]]
        rest = sum(count for _, count in shown[_REASONS:])
        lines += [f"  {rest} for other reasons: see trials.csv"] if rest else []
    return "\n".join(lines)


def _together(front: Front) -> list[list[Trial]]:
    """The front; trials whose figures are the same to the last digit in one row."""
    found: dict[tuple[float, ...], list[Trial]] = {}
    for trial in front.best_of_all:
        found.setdefault(tuple(trial.means.values()), []).append(trial)
    return list(found.values())


def _aims(front: Front) -> str:
    text = ", ".join(map(str, front.goals))
    return f"{text}; subject to {', '.join(map(str, front.limits))}" if front.limits else text


def _head(front: Front) -> list[str]:
    arrows = {goal.metric.name: "(most)" if goal.maximize else "(least)" for goal in front.goals}
    labels = [f"{metric.label} {arrows.get(metric.name, '')}".strip() for metric in front.metrics]
    return ["trial", *short_keys(list(front.axes)), "policy", *labels, *(["next row"] if len(front.goals) > 1 else [])]


def _row(front: Front, found: list[list[Trial]], i: int) -> list[str]:
    trials = found[i]
    more = f" (+{len(trials) - 1})" if len(trials) > 1 else ""
    cells = [f"{trials[0].index}{more}"]
    for axis, key in enumerate(front.axes):
        felt = [trial.place.values[axis] for trial in trials if key not in front.idle.get(trial.index, ())]
        cells.append(_each([*([] if len(felt) == len(trials) else [ANY]), *map(plain, column(felt))]))
    cells += [_each([trial.place.policy for trial in trials])]
    cells += [_cell(front, trials[0], metric) for metric in front.metrics]
    if len(front.goals) > 1:
        last = i + 1 == len(found)
        cells.append("" if last else _against(front.apart(trials[0], found[i + 1][0])))
    return cells


def _each(texts: Sequence[str]) -> str:
    """The different ones, of many the first and the last: ``1.05 .. 1.23``."""
    found = list(dict.fromkeys(texts))
    return ", ".join(found) if len(found) < 4 else f"{found[0]} .. {found[-1]}"


def _cell(front: Front, trial: Trial, metric: Metric) -> str:
    mean, half = trial.means[metric.name], front.half_width(trial, metric.name)
    text = number(mean, metric)
    if not math.isnan(half) and half > 1e-6 * abs(mean):
        text += f" ±{two_digits(half * metric.scale)}"
    return text


def _against(apart: list[Goal] | None) -> str:
    if apart is None:
        return "?"
    return "differs" if apart else "alike"


def _several(front: Front, found: list[list[Trial]]) -> list[str]:
    best = front.best
    assert best is not None
    n = len(found)
    lines = [_alone(front, found[0]) if n == 1 else f"{n} rows that no other run beats in every goal."]
    lines[0] += f" Nearest to the best of all goals at once: {_named(front, best)}."
    pairs = [front.apart(a[0], b[0]) for a, b in pairwise(found)]
    if None in pairs:
        lines.append(UNTOLD)
    elif alike := sum(not pair for pair in pairs):
        lines.append(
            f"{alike} of {len(pairs)} rows are alike: no goal tells them from the next by more than chance {HOW}."
        )
    return lines


def _alone(front: Front, best: list[Trial]) -> str:
    """What is true of the only row of a front."""
    mine = {trial.index for trial in best}
    others = [trial for trial in front.feasible if trial.index not in mine]
    if not others:
        return "One run, and no other is feasible." if len(best) == 1 else "All feasible runs have the same figures."
    goals = [(goal.metric.name, goal.sign) for goal in front.goals]
    if all(sign * best[0].means[name] < sign * other.means[name] for other in others for name, sign in goals):
        return f"{'One run beats' if len(best) == 1 else f'{len(best)} runs of the same figures beat'} all others in every goal."
    return "No other run is better in any goal."


def _single(front: Front) -> list[str]:
    best = front.best
    assert best is not None
    lines = [f"Best: {_named(front, best)}."]
    apart = [(trial, front.apart(best, trial)) for trial in front.feasible if trial is not best]
    if any(goals is None for _, goals in apart):
        lines.append(UNTOLD)
    elif alike := [str(trial.index) for trial, goals in apart if not goals]:
        named = ", ".join(alike[:10]) + (", ..." if len(alike) > 10 else "")
        lines.append(
            f"{len(alike)} of {len(apart)} other feasible runs do not differ from it by more than chance {HOW}: {named}."
        )
    elif apart:
        lines.append(f"Every other feasible run differs from it by more than chance {HOW}.")
    return lines


def _named(front: Front, trial: Trial) -> str:
    values = zip(front.axes, trial.place.values, strict=True)
    said = [f"{key} = {plain(value)}" for key, value in values if key not in front.idle.get(trial.index, ())]
    return f"trial {trial.index} ({', '.join([*said, trial.place.policy])})"
