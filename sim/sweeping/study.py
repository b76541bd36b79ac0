"""A sweep in one call, and what it has in common with the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from sim.loading import opened
from sim.scenario import Scenario
from sim.store import resolved_data
from sim.sweeping.axes import Varied, from_mapping, not_set_too
from sim.sweeping.folder import Refused, named
from sim.sweeping.points import BadPoints, Plan, plan
from sim.sweeping.sweep import Sweep
from sim.sweeping.work import TooLong, run


def prepared(
    source: Any, varied: Sequence[Varied], overrides: Sequence[str], *, allow_outside: bool = False, **options: Any
) -> Plan:
    """Read a scenario, change it and make all points of its sweep; options as in `sim.sweeping.points.plan`."""
    not_set_too(varied, overrides)
    document = opened(source, overrides, allow_outside=allow_outside)
    return plan(document, varied, allow_outside=allow_outside, **options)


def sweep(
    source: Any,
    vary: Mapping[str, Any] | None = None,
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    replicas: int | None = None,
    design: str | None = None,
    points: int | None = None,
    seed: int | None = None,
    skip_invalid: bool = False,
    out: str | os.PathLike[str] | None = None,
    name: str = "sweep",
    jobs: int | None = 1,
    **options: Any,
) -> Sweep:
    """Sweep a scenario (a file, plain data or a `Scenario`) and return its `Sweep`.

    vary: values by key: a list, ``{"low": .., "high": ..}`` with ``"step"`` or ``"log"``, or text such as ``"1:8"``; by
    default the file's own ``sweep`` block. overrides, replicas, jobs: as in `sim.run`. design, points, seed: which points
    are tried. out: folder to write to; None: nothing is written. options: ``backend``, ``address``, ``resume``,
    ``overwrite``, ``force``, ``progress``. Raises ScenarioError, OSError, and ValueError for everything else that is
    refused.
    """
    sets = [f"{k}={json.dumps(v)}" for k, v in overrides.items()] if isinstance(overrides, Mapping) else list(overrides)
    sets += [] if replicas is None else [f"replicas={replicas}"]
    data = resolved_data(source) if isinstance(source, Scenario) else source
    chosen: dict[str, Any] = {"design": design, "points": points, "seed": seed, "skip_invalid": skip_invalid}
    try:
        found = prepared(data, from_mapping(vary or {}), sets, **chosen)
        return run(found, None if out is None else named(out, found.scenario.name, name), jobs=jobs, **options)
    except (BadPoints, Refused, TooLong) as error:
        raise ValueError(str(error)) from None
