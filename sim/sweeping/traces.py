"""Recorded traces that a scenario names: a run is of what they held when it was planned."""

from __future__ import annotations

from sim.scenario import Scenario
from sim.store import run_id


class TraceChanged(OSError):
    """A file that is not what it was when its runs were planned."""


def traces(scenario: Scenario) -> dict[str, tuple[str, str]]:
    """Return the file and the SHA-256 of each recorded trace (nothing of one that cannot be read), by the key that names
    it."""
    found = {"traffic.path": (getattr(scenario.traffic, "path", None), scenario.traffic.fingerprint())}
    if scenario.serving is not None:
        requests = scenario.serving.requests
        found["serving.requests.path"] = (getattr(requests, "path", None), requests.fingerprint())
    return {key: (path, content) for key, (path, content) in found.items() if path is not None}


def unchanged(scenario: Scenario, run: str) -> None:
    """Raise TraceChanged if the traces of a scenario are no longer those of which ``run`` is the identity."""
    if (named := traces(scenario)) and run_id(scenario) != run:
        files = " or ".join(path for path, _ in named.values())
        raise TraceChanged(f"{files}: has changed since this began, so runs of it do not belong together")
