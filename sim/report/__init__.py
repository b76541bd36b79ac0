"""The result as text for a terminal: policies side by side, floors beside balance figures, intervals where there are."""

from __future__ import annotations

from sim.report import serving, steps
from sim.report.about import describe
from sim.results import Result


def terminal(result: Result) -> str:
    """Return the whole text."""
    return steps.terminal(result) if result.scenario.serving is None else serving.terminal(result)


__all__ = ["describe", "terminal"]
