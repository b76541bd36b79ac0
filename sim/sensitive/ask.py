"""The whole question: find the constants, vary each, vary all."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sim.contest import leading_metrics, yardsticks
from sim.estimate import MAX_SECONDS, TooBig, estimate
from sim.loading import load
from sim.located import nearest
from sim.results import Metric, metrics_of
from sim.scenario import Scenario
from sim.sensitive.answer import Sensitivity, Together
from sim.sensitive.constants import SPREAD, Constant, assumptions, within_limits
from sim.sensitive.evaluate import Evaluator
from sim.sensitive.indices import design, independent, indices
from sim.sensitive.oneway import FACTOR, Ask, Row, break_evens, ends, reach
from sim.sensitive.standings import NOBODY, standing, winners
from sim.sensitive.vary import parse
from sim.tokens import F64
from sim.units import human

SAMPLES = 32


def ask(
    source: Any,
    *,
    metric: str | None = None,
    vary: Sequence[str] = (),
    overrides: Sequence[str] = (),
    samples: int = SAMPLES,
    seed: int = 0,
    jobs: int | None = 1,
    force: bool = False,
    allow_outside: bool = False,
    progress: bool = False,
) -> Sensitivity:
    """Return which constants could change what wins. source: a scenario file, plain data or a `Scenario`.

    metric: of `sim.results.metrics_of` (default: `sim.contest.leading_metrics`). vary: ``KEY=±20%``,
    ``KEY=low:high`` or ``KEY``; none: `sim.sensitive.constants.assumptions`. samples: a power of two, 0: one at a time only.
    seed: of the samples; the runs have the scenario's own. Raises ScenarioError, TooBig, or ValueError with one line.
    """
    scenario = load(source, overrides, allow_outside=allow_outside) if not isinstance(source, Scenario) else source
    expected = estimate(scenario)
    if expected.too_big and not force:
        raise TooBig(expected)
    if samples:
        design([(0.0, 1.0)], samples, seed)  # refused before anything runs
    competing, left_out = _competing(scenario)
    constants = parse(scenario, vary) if vary else assumptions(scenario, SPREAD)
    if not constants:
        raise ValueError("the scenario has no constant to vary")
    won_by = leading_metrics(scenario) if metric is None else (_named(scenario, metric),)
    with Evaluator(scenario, won_by, jobs, progress) as evaluator:
        known = {one.name: one for one in metrics_of(scenario)}
        return _answer(
            scenario,
            evaluator,
            known[evaluator.metric],
            constants,
            competing,
            left_out,
            samples,
            seed,
            force,
            screened=not vary,
        )


def _named(scenario: Scenario, asked: str) -> str:
    """The metric ``asked`` to win by. Raises ValueError if there is none such, or if neither more nor less of it is better."""
    known = {one.name: one for one in metrics_of(scenario)}
    if asked not in known:
        near = nearest(asked, known)
        raise ValueError(f"--metric {asked}: no such metric{f' (did you mean {near}?)' if near else ''}")
    if known[asked].better == "none":
        raise ValueError(f"--metric {asked}: neither more nor less of it is better")
    return asked


def _competing(scenario: Scenario) -> tuple[list[int], list[int]]:
    """Numbers of the policies that can win, and of the yardsticks among them that cannot."""
    names = [policy.name for policy in scenario.policies]
    left_out = [i for i, name in enumerate(names) if name in yardsticks(scenario)]
    if len(names) - len(left_out) < 2:
        left_out = []
    if len(names) < 2:
        raise ValueError("only one policy: nothing can win or lose")
    return [i for i in range(len(names)) if i not in left_out], left_out


def _answer(
    scenario: Scenario,
    evaluator: Evaluator,
    metric: Metric,
    constants: list[Constant],
    competing: list[int],
    left_out: list[int],
    samples: int,
    seed: int,
    force: bool,
    screened: bool,
) -> Sensitivity:
    stated, names = evaluator.stated[competing], [scenario.policies[i].name for i in competing]
    if np.isnan(stated).any():
        without = [name for name, values in zip(names, stated, strict=True) if np.isnan(values).any()]
        raise ValueError(f"--metric {metric.name}: {', '.join(without)} has none in this run")
    sign = -1.0 if metric.better == "higher" else 1.0
    _affordable(evaluator, constants, samples, force)

    def values(chosen: Sequence[Constant], points: Sequence[tuple[float, ...]], label: str) -> F64:
        return evaluator.values(chosen, points, label)[:, competing]

    if screened:
        constants = _screen(constants, values, stated)

    def asker(chosen: Sequence[Constant], label: str) -> Ask:
        def found(points: Sequence[tuple[int, float]]) -> F64:
            here = [one.stated for one in chosen]
            return values(chosen, [(*here[:i], x, *here[i + 1 :]) for i, x in points], label)

        return found

    start = standing(stated, sign)
    rows = ends(constants, asker(constants, "ends"), stated, sign)
    tried = reach(rows, lambda constant: within_limits(scenario, constant, 1 / FACTOR, FACTOR))
    rows = break_evens(rows, asker(constants, "break-even"), start.winner, sign, tried)
    moving = sorted((row for row in rows if row.effect > 0), key=lambda row: -row.effect)
    together = None
    if samples and moving:
        together = _together(moving, values, start.winner, start.runner_up, sign, samples, seed, names)
    return Sensitivity(
        scenario=scenario,
        metric=metric,
        policies=tuple(names),
        left_out=tuple(scenario.policies[i].name for i in left_out),
        stated=start,
        rows=tuple(moving),
        without_effect=tuple(row for row in rows if not row.effect > 0),
        together=together,
        evaluations=evaluator.asked,
    )


def _affordable(evaluator: Evaluator, constants: Sequence[Constant], samples: int, force: bool) -> None:
    """Start the processes that the work is worth. Raises TooBig above the limits of a run."""
    routes = sum(constant.reroutes for constant in constants)
    timings = 4 * len(constants) + samples * (len(constants) + 2)
    routings = 4 * routes + (samples * (routes + 2) if routes else 0)
    whole = estimate(evaluator.scenario)
    seconds = timings * evaluator.seconds + routings * whole.seconds
    if seconds > MAX_SECONDS and not force:
        reason = (
            f"about {timings} timings and {routings} routings, {seconds / 3600:.3g} hours on one core, exceed "
            f"{MAX_SECONDS / 3600:g}: fewer --samples, fewer constants (--vary), or fewer traffic.tokens_per_rank"
        )
        raise TooBig(dataclasses.replace(whole, seconds=seconds, reason=reason))
    if evaluator.progress:
        again = f", of them {routings} with tokens routed again" if routings else ""
        print(
            f"{evaluator.scenario.name}: {len(constants)} constants, about {timings} evaluations{again}: "
            f"{human(seconds, 's')} on one core",
            file=sys.stderr,
        )
    evaluator.grow(timings)


Values = Callable[[Sequence[Constant], Sequence[tuple[float, ...]], str], F64]


def _screen(constants: Sequence[Constant], values: Values, stated: F64) -> list[Constant]:
    """Leave out the kernels that the scenario never calls: all constants of one lowered at once change nothing."""
    kernels: dict[str, list[int]] = {}
    for i, constant in enumerate(constants):
        parts = constant.keys[0].split(".")
        if "kernels" in parts:
            kernels.setdefault(".".join(parts[:-1]), []).append(i)
    points = [
        tuple(one.low if i in which else one.stated for i, one in enumerate(constants)) for which in kernels.values()
    ]
    found = values(constants, points, "kernels")
    unused = {i for which, one in zip(kernels.values(), found, strict=True) if (one == stated).all() for i in which}
    return [constant for i, constant in enumerate(constants) if i not in unused]


def _together(
    rows: Sequence[Row],
    values: Values,
    winner: int,
    runner_up: int,
    sign: float,
    samples: int,
    seed: int,
    names: Sequence[str],
) -> Together:
    constants = tuple(row.constant for row in rows)
    bounds = [(constant.low, constant.high) for constant in constants]
    points = design(bounds, samples, seed)
    found = values(constants, [tuple(point) for point in points.tolist()], "samples")
    means = found.mean(axis=2)
    gap = sign * (means[:, runner_up] - means[:, winner])
    who = winners(found, sign)
    mine = independent(who, len(constants))
    counted = np.bincount(mine[mine != NOBODY], minlength=len(names))
    table: dict[str, list[Any]] = {
        f"{i}: {constant.label}": points[:, i].tolist() for i, constant in enumerate(constants)
    }
    won = ["" if i == NOBODY else names[i] for i in who.tolist()]
    table |= {"independent": independent_flags(len(who), len(constants)), "winner": won, "gap": gap.tolist()}
    without = int(np.isnan(gap).sum())
    explained = None if without else indices(bounds, gap, seed)
    return Together(constants, explained, without, len(mine), tuple(counted.tolist()), table)


def independent_flags(points: int, inputs: int) -> list[bool]:
    """Return [points] which ones of the design are independent draws."""
    chosen = set(independent(np.arange(points), inputs).tolist())
    return [i in chosen for i in range(points)]


def options_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `ask` as a notebook writes them: ``vary`` and ``overrides`` may be mappings."""
    found = dict(call)
    for name in ("vary", "overrides"):
        if isinstance(found.get(name), Mapping):
            found[name] = [f"{key}={value}" for key, value in found[name].items()]
    return found
