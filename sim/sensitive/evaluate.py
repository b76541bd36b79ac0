"""A metric at many points of a space of constants: routed once, timed at each point, on one or more processes.

Gates see tokens, not costs, so points that differ in costs and rates alone share one routing (`sim.study.timed_rows`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.checks import problems
from sim.estimate import estimate
from sim.located import Problem, ScenarioError
from sim.results import Table, per_replica
from sim.scenario import Scenario
from sim.sensitive.constants import Constant, applied
from sim.study import Routed, route, separable, simulate, timed, timed_rows
from sim.tokens import F64
from sim.workers import WORTH_A_PROCESS_S, Workers, processes, watched

Point = tuple[float, ...]
_CHUNK = 8  # points of one task: few enough for a bar that moves, many enough to be worth sending the routing


@dataclass(frozen=True)
class _Task:
    """Points that share a routing. routed: of every arena; None: to be found from the first point, or not at all where
    routing and timing are not two stages."""

    scenario: Scenario
    constants: tuple[Constant, ...]
    points: tuple[Point, ...]
    metric: str
    rows_only: bool
    routed: tuple[Routed, ...] | None


def _values(scenario: Scenario, task: _Task, routed: tuple[Routed, ...] | None) -> F64:
    """The metric [policies, replicas] of ``scenario``."""
    arenas = scenario.arenas()
    if routed is None or len(routed) != len(arenas):
        return _array(per_replica(simulate(scenario, 1, estimate(scenario)).tables, scenario), task.metric, scenario)
    tables: Table = {}
    for arena, one in zip(arenas, routed, strict=True):
        if task.rows_only:
            rows = timed_rows(one, arena.scenario)
        else:
            rows = per_replica(timed(one, arena.scenario).tables, arena.scenario)
        for name, column in rows.items():
            tables.setdefault(name, []).extend(column)
    return _array(tables, task.metric, scenario)


def _array(rows: Table, metric: str, scenario: Scenario) -> F64:
    found: dict[str, list[float]] = {}
    for policy, value in zip(rows["policy"], rows[metric], strict=True):
        found.setdefault(policy, []).append(math.nan if value is None else value)
    return np.array([found[policy.name] for policy in scenario.policies], dtype=np.float64)


def _run(task: _Task) -> list[F64]:
    found, routed = [], task.routed
    for point in task.points:
        scenario = applied(task.scenario, task.constants, point)
        if task.routed is None:
            _refuse(scenario, task.constants, point)
        if routed is None and _separable(scenario):
            routed = _routed(scenario)
        found.append(_values(scenario, task, routed))
    return found


def _refuse(scenario: Scenario, constants: Sequence[Constant], point: Point) -> None:
    """Raise ScenarioError for a point that does not fit together though each of its constants does alone."""
    for path, rule in problems(scenario):
        moved = [f"{c.keys[0]}={c.at(x)[0]:.6g}" for c, x in zip(constants, point, strict=True) if x != c.stated]
        raise ScenarioError([Problem(f"with {', '.join(moved)}", ".".join(map(str, path)), rule)])


def _separable(scenario: Scenario) -> bool:
    return all(separable(arena.scenario) for arena in scenario.arenas())


def _routed(scenario: Scenario, jobs: int | None = 1, progress: bool = False) -> tuple[Routed, ...]:
    return tuple(route(arena.scenario, jobs, estimate(arena.scenario), progress) for arena in scenario.arenas())


class Evaluator:
    """``values`` of a scenario's metric at points; a context manager that holds the processes. Results do not depend on how
    many there are, nor on what was asked before.

    metric: the first of ``metrics`` that any policy has, else the last. stated: the metric [policies, replicas] as things are. asked: points evaluated. seconds: of timing one (of a whole run,
    where routing and timing are not two stages), measured: it decides on processes, and so on no result.
    """

    def __init__(self, scenario: Scenario, metrics: Sequence[str], jobs: int | None, progress: bool) -> None:
        # Both engines give the same integers; the recurrence is quicker.
        quick = {"schedule": scenario.schedule.model_copy(update={"engine": "max_plus"})}
        self.scenario, self.progress = scenario.model_copy(update=quick), progress
        small = estimate(self.scenario).seconds <= WORTH_A_PROCESS_S
        self.routed = _routed(self.scenario, 1 if small else jobs, progress) if _separable(self.scenario) else None
        self.rows_only = False
        for self.metric in metrics:
            task = _Task(self.scenario, (), ((),), self.metric, False, self.routed)
            started = time.monotonic()
            self.stated = _run(task)[0]
            if not np.isnan(self.stated).all():
                break
        if self.routed is not None:
            started = time.monotonic()
            few = _run(dataclasses.replace(task, rows_only=True))[0]
            self.rows_only = bool((few == self.stated).all())
        self.seconds = time.monotonic() - started
        self.asked = 1
        self._jobs, self._workers = jobs, Workers(1)

    def __enter__(self) -> Evaluator:
        return self

    def grow(self, points: int) -> None:
        """Take as many processes as ``points`` to come are worth, or as asked."""
        expected = dataclasses.replace(estimate(self.scenario), seconds=points * self.seconds)
        self._workers = Workers(processes(self._jobs, max(1, points // _CHUNK), expected))

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        self._workers.__exit__(kind, value, traceback)

    def values(self, constants: Sequence[Constant], points: Sequence[Point], label: str) -> F64:
        """Return the metric [n, policies, replicas] at ``points`` [n], each a value per constant; equal ones run once."""
        groups: dict[Point, list[Point]] = {}
        for point in dict.fromkeys(points):
            moved = tuple(x for c, x in zip(constants, point, strict=True) if c.reroutes and x != c.stated)
            which = tuple(
                i for i, (c, x) in enumerate(zip(constants, point, strict=True)) if c.reroutes and x != c.stated
            )
            groups.setdefault((*which, *moved), []).append(point)
        tasks = []
        for key, found in groups.items():
            size = _CHUNK if not key or self.routed is None else len(found)
            for start in range(0, len(found), size):
                part = tuple(found[start : start + size])
                tasks.append(_Task(self.scenario, tuple(constants), part, self.metric, self.rows_only, None if key else self.routed))  # fmt: skip
        done = watched(self._workers.map(_run, tasks), len(tasks), label, self.progress)
        known = {
            point: values
            for task, results in zip(tasks, done, strict=True)
            for point, values in zip(task.points, results, strict=True)
        }
        self.asked += len(known)
        shape = (0, *self.stated.shape)
        return np.stack([known[point] for point in points]) if len(points) else np.empty(shape)
