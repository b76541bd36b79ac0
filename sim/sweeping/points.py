"""From axes to checked points: every scenario of a sweep is made and checked before the first one runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sim.designs import Axis
from sim.designs.block import SweepBlock
from sim.estimate import Estimate, estimate
from sim.keys import put
from sim.loading import check
from sim.located import Mark, Problem, ScenarioError, short, validate
from sim.results import Metric, metrics_of
from sim.scenario import Scenario
from sim.store import resolved_data, run_id
from sim.sweeping.axes import Varied, from_block
from sim.workers import watched
from sim.yamlfile import Document


@dataclass(frozen=True)
class Point:
    """One point. values: by axis. run: the identity of its scenario; points of one identity share a run. data: its
    resolved scenario as JSON. skipped: why it does not run, or nothing."""

    index: int
    values: tuple[Any, ...]
    run: str = ""
    data: str = ""
    policies: tuple[str, ...] = ()
    replicas: int = 0
    expected: Estimate | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Plan:
    """A sweep before it runs: what is varied in which scenario, and all points."""

    scenario: Scenario
    axes: tuple[Axis, ...]
    block: SweepBlock
    points: tuple[Point, ...]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return metrics_of(self.scenario)

    @property
    def running(self) -> list[Point]:
        """Points that are not skipped."""
        return [point for point in self.points if not point.skipped]

    @property
    def values(self) -> dict[str, list[Any]]:
        """What each axis takes; see `column`."""
        return {axis.key: column(point.values[i] for point in self.points) for i, axis in enumerate(self.axes)}

    def named(self, point: Point) -> str:
        """``point 3 (cluster.nodes = 8)``."""
        return f"point {point.index} ({said(self.axes, point.values)})"


def said(axes: Sequence[Axis], values: Sequence[Any]) -> str:
    return ", ".join(
        f"{axis.key} = {value if isinstance(value, str | int | float) else short(value)}"
        for axis, value in zip(axes, values, strict=True)
    )


def column(values: Iterable[Any]) -> list[Any]:
    """The different ones of ``values``: numbers ascending, others as they come."""
    found = list({repr(value): value for value in values}.values())
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in found)
    return sorted(found) if numbers else found


class BadPoints(Exception):
    """Points that cannot run. ``problems`` holds one text for each problem, with the points that it concerns."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(list(problems))
        self.problems = list(problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


def plan(
    document: Document,
    varied: Sequence[Varied] = (),
    *,
    design: str | None = None,
    points: int | None = None,
    seed: int | None = None,
    skip_invalid: bool = False,
    allow_outside: bool = False,
    progress: bool = False,
) -> Plan:
    """Make all points of a document and check them.

    varied: axes that replace those of the document's ``sweep`` block; design, points, seed: likewise. progress: a bar on
    stderr. Raises ScenarioError for the document and the axes, and BadPoints for points that cannot run, unless
    ``skip_invalid``.
    """
    base = check(document, allow_outside=allow_outside)
    given = base.sweep or SweepBlock()
    changes = {"design": design, "points": points, "seed": seed}
    told: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    if "design" in told and "points" not in told and told["design"] != given.design.kind:
        told["points"] = None  # of the block's own design
    block = validate(SweepBlock, given.model_dump() | {"vary": {}} | told, {(): Mark("sweep")})
    axes = list(varied) or from_block(document, given.vary)
    if not axes:
        raise ScenarioError([Problem("sweep", "", "nothing to vary: --vary KEY=VALUES, or a sweep: block in the file")])
    try:
        chosen = block.design.choose([axis for axis, _, _ in axes], block.points, block.seed)
    except ValueError as error:
        raise ScenarioError([Problem("sweep", "", str(error))]) from None
    base = base.model_copy(update={"sweep": None})
    found: list[Point] = []
    bad: dict[Problem, dict[int, list[str]]] = {}
    for index, values in watched(enumerate(chosen), len(chosen), "checking", progress):
        point, problems = _point(document, axes, index, values, base, allow_outside)
        for problem in problems:
            said_already = problem.where.removeprefix("--vary ") == problem.path
            alike = problem._replace(got="", path="" if said_already else problem.path)
            bad.setdefault(alike, {}).setdefault(index, []).append(problem.got)
        found.append(point)
    done = Plan(base, tuple(axis for axis, _, _ in axes), block, tuple(found))
    if bad and (not skip_invalid or not done.running):
        raise BadPoints([_grouped(done, problem, at) for problem, at in bad.items()])
    return done


def _point(
    document: Document, axes: Sequence[Varied], index: int, values: tuple[Any, ...], base: Scenario, allow_outside: bool
) -> tuple[Point, list[Problem]]:
    try:
        overrides = [axis.override(value) for axis, value in zip(axes, values, strict=True)]
        scenario = check(put(document, overrides), allow_outside=allow_outside)
    except ScenarioError as error:
        problems = error.problems
    else:
        if (scenario.serving is None) == (base.serving is None):
            return Point(
                index=index,
                values=values,
                run=run_id(scenario),
                data=json.dumps(resolved_data(scenario)),
                policies=tuple(policy.name for policy in scenario.policies),
                replicas=scenario.replicas,
                expected=estimate(scenario),
            ), []
        problems = [Problem("sweep", "serving", "some points serve requests and some do not: make two sweeps")]
    return Point(index, values, skipped="; ".join(map(_reason, problems))), problems


def _reason(problem: Problem) -> str:
    """A problem as it is anywhere: without the line that it was found at."""
    in_file = re.search(r":\d+:\d+$", problem.where)
    return str(problem._replace(where="" if problem.path or in_file else problem.where)).removeprefix(": ")


def _grouped(plan: Plan, problem: Problem, at: dict[int, list[str]]) -> str:
    """A problem once: with all values that it was found for, and how many points it concerns."""
    got = list(dict.fromkeys(text for texts in at.values() for text in texts if text))
    shown = ", ".join(got[:8]) + (", ..." if len(got) > 8 else "")
    text = str(problem._replace(got=shown))
    if len(at) == len(plan.points):
        return text
    first = said(plan.axes, plan.points[min(at)].values)
    return f"{text} (in {len(at)} of {len(plan.points)} points, first {first})"
