"""Where is looked: axes of a scenario and, as one more axis, its policies; from a place there to a checked scenario."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sim.designs import MAX_POINTS, Axis
from sim.estimate import estimate
from sim.keys import put
from sim.loading import check
from sim.located import Problem, ScenarioError, nearest
from sim.scenario import Scenario
from sim.store import resolved_data, run_id
from sim.sweeping.axes import Varied
from sim.sweeping.traces import TraceChanged, traces
from sim.yamlfile import Document

POLICY = "policy"


@dataclass(frozen=True)
class Place:
    """A value for every axis, and a policy."""

    values: tuple[Any, ...]
    policy: str

    @property
    def key(self) -> str:
        """What tells it from other places: values may be lists and mappings, and 1 is not true."""
        return json.dumps([self.values, self.policy])


@dataclass(frozen=True)
class Ready:
    """A place's scenario. run: its identity. data: resolved, as JSON. expected: seconds on one core. reason: why it does not
    run, or nothing."""

    run: str = ""
    data: str = ""
    expected: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Space:
    """policies: names and places in the document of those to choose from. force: whether a run may be too big. seen: what
    recorded traces held when they were first met, by file."""

    document: Document
    varied: tuple[Varied, ...]
    policies: Mapping[str, int]
    allow_outside: bool = False
    force: bool = False
    seen: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(varied.axis for varied in self.varied)

    @property
    def size(self) -> int | None:
        """Places in all; None if they cannot be counted."""
        counts = [_count(axis) for axis in self.axes]
        return None if None in counts else math.prod(n for n in counts if n is not None) * len(self.policies)

    def places(self) -> Iterator[Place]:
        """Every place of a space of at most `MAX_POINTS`, in order; of a larger one none."""
        if self.size is None or self.size > MAX_POINTS:
            return
        columns = [axis.values or range(int(axis.low), int(axis.high) + 1) for axis in self.axes]
        for *values, policy in itertools.product(*columns, self.policies):
            yield Place(tuple(values), policy)

    def distributions(self) -> dict[str, Any]:
        """What Optuna draws from: numbers in order as integers, so that it knows neighbours; other values without order."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, Any] = {}
        for axis in self.axes:
            if axis.values and _ordered(axis.values):
                found[axis.key] = IntDistribution(0, len(axis.values) - 1)
            elif axis.values:
                found[axis.key] = CategoricalDistribution(range(len(axis.values)))
            elif axis.whole:
                found[axis.key] = IntDistribution(int(axis.low), int(axis.high), log=axis.log)
            else:
                found[axis.key] = FloatDistribution(axis.low, axis.high, log=axis.log)
        return found | {POLICY: CategoricalDistribution(list(self.policies))}

    def place(self, params: Mapping[str, Any]) -> Place:
        """The place that drawn parameters mean."""
        values = []
        for axis in self.axes:
            drawn = params[axis.key]
            values.append(axis.values[drawn] if axis.values else drawn if axis.whole else float(f"{drawn:.12g}"))
        return Place(tuple(values), params[POLICY])

    def params(self, place: Place) -> dict[str, Any]:
        """Turn `place` round, for axes of listed values and of integers."""
        values = zip(self.axes, place.values, strict=True)
        found = {axis.key: _index(axis.values, value) if axis.values else value for axis, value in values}
        return found | {POLICY: place.policy}

    def ready(self, place: Place) -> Ready:
        """Return the scenario of a place, which has its policy alone; the tokens are those that all policies see. Raises
        `TraceChanged` where a trace is not what it was."""
        try:
            scenario = self.scenario(place)
        except ScenarioError as error:
            first = error.problems[0]
            path = re.sub(r"^policies\.0\b", "policies.*", first.path)  # it stands alone
            return Ready(reason=f"{path}: {first.rule}" if path else first.rule)
        expected = estimate(scenario)
        if expected.too_big and not self.force:
            return Ready(reason="too big to run without --force")
        self.remember(scenario)
        return Ready(run_id(scenario), json.dumps(resolved_data(scenario)), expected.seconds)

    def remember(self, scenario: Scenario) -> None:
        """Raise `TraceChanged` if a trace that the scenario names is not what it was when it was first met."""
        for path, content in traces(scenario).values():
            if self.seen.setdefault(path, content) != content:
                raise TraceChanged(f"{path}: has changed since the search began, so its runs do not belong together")

    def scenario(self, place: Place) -> Scenario:
        """As `ready`. Raises ScenarioError."""
        overrides = [varied.override(value) for varied, value in zip(self.varied, place.values, strict=True)]
        document = put(self.document, overrides)
        return check(_alone(document, self.policies[place.policy]), allow_outside=self.allow_outside)

    def without_effect(self, place: Place) -> set[str]:
        """Keys of axes whose other values mean the same run: knobs that the policy does not have."""
        here, found = self.ready(place).run, set()
        for i, axis in enumerate(self.axes):
            ends = [axis.values[0], axis.values[-1]] if axis.values else [axis.low, axis.high]
            others = [value for value in ends if json.dumps(value) != json.dumps(place.values[i])]
            moved = [self.ready(Place((*place.values[:i], v, *place.values[i + 1 :]), place.policy)) for v in others]
            if moved and all(ready.run == here for ready in moved):
                found.add(axis.key)
        return found


def check_axes(space: Space) -> None:
    """Raise ScenarioError with every axis whose key does not exist: at no place could it be set."""
    problems: list[Problem] = []
    for varied in space.varied:
        axis = varied.axis
        value = axis.values[0] if axis.values else axis.low
        try:
            document = put(space.document, [varied.override(value)])
        except ScenarioError as error:
            problems += error.problems
            continue
        unknown: list[list[Problem]] = []
        for index in space.policies.values():
            try:
                check(_alone(document, index), allow_outside=space.allow_outside)
                unknown.append([])
            except ScenarioError as error:
                unknown.append([p for p in error.problems if p.rule.startswith("unknown key")])
        if all(unknown):
            problems += unknown[0]
    if problems:
        bare = [p._replace(path="") if p.where == f"--vary {p.path}" else p for p in problems]
        raise ScenarioError(list(dict.fromkeys(bare)))


def chosen(scenario: Scenario, names: Sequence[str]) -> dict[str, int]:
    """Return the places of the named policies in a scenario; of all if none is named. Raises ScenarioError."""
    known = {policy.name: i for i, policy in enumerate(scenario.policies)}
    problems = [
        Problem(f"--policy {name[:60]}", "", f"no such policy; there are {', '.join(known)}", hint=nearest(name, known))
        for name in names
        if name not in known
    ]
    if problems:
        raise ScenarioError(problems)
    return {name: known[name] for name in names} if names else known


def _alone(document: Document, index: int) -> Document:
    """The document with one of its policies only; problems stay located where it stands."""
    policies = document.data.get("policies")
    if not isinstance(policies, list) or index >= len(policies):
        raise ScenarioError([Problem("", "policies", "an axis takes policies away")])
    marks = {}
    for path, mark in document.marks.items():
        if path[:1] == ("policies",) and len(path) > 1:
            if path[1] != index:
                continue
            path = ("policies", 0, *path[2:])
        marks[path] = mark
    return dataclasses.replace(document, data=document.data | {"policies": [policies[index]]}, marks=marks)


def _index(values: Sequence[Any], value: Any) -> int:
    return [json.dumps(one) for one in values].index(json.dumps(value))


def _ordered(values: Sequence[Any]) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return numbers and list(values) in (sorted(values), sorted(values, reverse=True))


def _count(axis: Axis) -> int | None:
    if axis.values:
        return len(axis.values)
    return int(axis.high) - int(axis.low) + 1 if axis.whole else None
