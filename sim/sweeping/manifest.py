"""``sweep.json``: what a sweep is. Two sweeps with the same one have the same bytes, so no times and no hosts in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import sim
from sim.designs import Axis
from sim.located import short
from sim.store import resolved_data
from sim.sweeping.points import Plan
from sim.sweeping.traces import traces

FORMAT = 1


def definition(plan: Plan) -> dict[str, Any]:
    """Return the sweep as plain data."""
    from importlib.metadata import version

    keys = [axis.key for axis in plan.axes]
    return {
        "format": FORMAT,
        "scenario": resolved_data(plan.scenario),
        "traces": {key: found for key, (_, found) in traces(plan.scenario).items() if found},
        "axes": {axis.key: _axis(axis) for axis in plan.axes},
        "design": plan.block.design.model_dump(mode="json"),
        "points": plan.block.points,
        "seed": plan.block.seed,
        "metrics": [metric.name for metric in plan.metrics],
        "policies": list(dict.fromkeys(name for point in plan.running for name in point.policies)),
        "versions": {"gatesim": sim.__version__} | {name: version(name) for name in ("numpy", "scipy", "pyarrow")},
        "runs": [
            {"point": point.index, "values": dict(zip(keys, point.values, strict=True))}
            | ({"skipped": point.skipped} if point.skipped else {"run": point.run})
            for point in plan.points
        ],
    }


def _axis(axis: Axis) -> dict[str, Any]:
    if axis.values:
        return {"values": list(axis.values)}
    return {"low": axis.low, "high": axis.high, "log": axis.log}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what differs between two definitions, key by key: ``policies.1.select.topk_group: 4 -> 2``.

    Type and value count: 1 is not 1.0. Of a recorded trace the content counts, not its place.
    """
    before, after = dict(_flat(old, ())), dict(_flat(new, ()))
    found = []
    for path in dict.fromkeys([*before, *after]):
        if _text(before.get(path)) == _text(after.get(path)) or path[0] == "runs":
            continue
        key = ".".join(path[1:] if path[0] == "scenario" else path)
        if path[0] == "scenario" and key in old.get("traces", {}) and key in new["traces"]:
            continue
        found.append(f"{key}: {_said(before, path)} -> {_said(after, path)}")
    if found:
        return found
    if len(old["runs"]) != len(new["runs"]):
        return [f"runs: {len(old['runs'])} -> {len(new['runs'])}"]
    for a, b in zip(old["runs"], new["runs"], strict=True):
        if _text(a) != _text(b):
            named = ", ".join(f"{key} = {short(value)}" for key, value in a["values"].items())
            what = (
                "its scenario, or a file that it names, has changed"
                if "run" in a and "run" in b
                else f"{a.get('skipped', 'runs')} -> {b.get('skipped', 'runs')}"
            )
            found.append(f"point {a['point']} ({named}): {what}")
    return found


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _flat(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, (*path, str(key)))
    elif isinstance(value, list) and value and path[0] == "scenario":
        for i, item in enumerate(value):
            yield from _flat(item, (*path, str(i)))
    else:
        yield path, value


def _said(values: dict[tuple[str, ...], Any], path: tuple[str, ...]) -> str:
    return short(values[path]) if path in values else "nothing"
