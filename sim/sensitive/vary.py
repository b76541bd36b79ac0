"""``--vary`` texts of a user as constants, or why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from pydantic import BaseModel

from sim.loading import load
from sim.located import Problem, ScenarioError, nearest
from sim.scenario import Scenario
from sim.sensitive.constants import SPREAD, Constant, allowed, places_of
from sim.sensitive.labels import label_of
from sim.store import resolved_data


def parse(scenario: Scenario, texts: Sequence[str], spread: float = SPREAD) -> list[Constant]:
    """Return the constants that ``--vary`` texts name: ``KEY``, ``KEY=±20%``, ``KEY=low:high``. Raises ScenarioError with
    every bad one."""
    found: list[Constant] = []
    bad: list[Problem] = []
    for text in texts:
        try:
            found.append(_parsed(scenario, text, spread))
        except ScenarioError as error:
            bad += error.problems
    if bad:
        raise ScenarioError(bad)
    # What is one assumption by default may be asked about piece by piece.
    keys: dict[str, set[tuple[str, ...]]] = {}
    for one in found:
        keys.setdefault(one.label, set()).add(one.keys)
    return [replace(one, label=one.keys[0]) if len(keys[one.label]) > 1 else one for one in found]


_PERCENT = re.compile(r"(?:±|\+-|\+/-)?\s*(\d+\.?\d*|\.\d+)\s*%")
_COUNTS = 64
_RANGE = re.compile(r"([^:]+):([^:]+)")


def _parsed(scenario: Scenario, text: str, spread: float) -> Constant:
    key, equals, given = (part.strip() for part in text.partition("="))

    def refused(rule: str) -> ScenarioError:
        return ScenarioError([Problem(f"--vary {text}", "", rule)])

    places = places_of(scenario, key)
    if not places:
        _refuse_unknown(scenario, key, text)
        raise refused("has no number in this scenario to vary; state one first: --set KEY=VALUE")
    values = tuple(value for _, value in places)
    constant = Constant(key, tuple(".".join(path) for path, _ in places), values, 1 - spread, 1 + spread)
    if equals and (percent := _PERCENT.fullmatch(given)):
        share = float(percent[1]) / 100
        constant = replace(constant, low=1 - share, high=1 + share)
    elif equals:
        constant = _ranged(constant, given, refused)
    if all(value == 0 for value in values) and not constant.absolute:
        raise refused("is 0, of which no percentage is anything: give a range, KEY=low:high")
    if not constant.low < constant.high:
        raise refused("low must be below high")
    for x in _tried(constant):
        if not allowed(scenario, constant, x):
            sets = [f"{k}={v!r}" for k, v in zip(constant.keys, constant.at(x), strict=True)]
            raise refused(f"the scenario refuses {sets[0]}: {_why(scenario, sets)}")
    return replace(constant, label=label_of(key, scenario))


def _ranged(constant: Constant, given: str, refused: Callable[[str], ScenarioError]) -> Constant:
    found = _RANGE.fullmatch(given)
    try:
        assert found is not None
        low, high = float(found[1]), float(found[2])
    except (AssertionError, ValueError):
        raise refused("must be KEY=±20% or KEY=low:high, numbers in SI units") from None
    if len(set(constant.values)) > 1:
        raise refused("stands for several numbers that differ: give a percentage")
    base = constant.values[0]
    if not low < high:
        raise refused("low must be below high")
    if base == 0:
        return replace(constant, low=low, high=high, absolute=True)
    low, high = sorted((low / base, high / base))  # of a negative base the lower number is the larger factor
    return replace(constant, low=low, high=high)


def _tried(constant: Constant) -> list[float]:
    """Points of the range to ask the scenario about: its ends, and of a count, of which what lies between may be refused as
    well, the first `_COUNTS` whole numbers."""
    found = [constant.low, constant.high]
    if constant.whole and constant.reroutes and len(set(constant.values)) == 1:
        base, (first, last) = constant.values[0], sorted(constant.at(x)[0] for x in found)
        between = range(int(first) + 1, min(int(last), int(first) + _COUNTS))
        found += [n if constant.absolute else n / base for n in between]
    return found


def _refuse_unknown(scenario: Scenario, key: str, text: str) -> None:
    """Raise ScenarioError where ``key`` names nothing that a scenario has."""
    parts = key.split(".")
    if parts[0] == "gating":
        parts = ["policies", "0", *parts[1:]]
    value: object = scenario
    for depth, part in enumerate(parts):
        shown = ".".join(parts[:depth])
        if isinstance(value, tuple):
            if part != "*" and not (part.isdecimal() and int(part) < len(value)):
                raise ScenarioError(
                    [Problem(f"--vary {text}", key, f"{shown} is a list of {len(value)}: 0 to {len(value) - 1}, or *")]
                )
            value = value[0 if part == "*" else int(part)]
        elif isinstance(value, BaseModel):
            if part not in type(value).model_fields:
                hint = nearest(part, type(value).model_fields)
                raise ScenarioError([Problem(f"--vary {text}", key, "unknown key", hint=hint)])
            value = getattr(value, part)
        else:
            return


def _why(scenario: Scenario, sets: list[str]) -> str:
    try:
        load(resolved_data(scenario), sets)
    except ScenarioError as error:
        return "; ".join(problem.rule for problem in error.problems)
    return "out of its range"
