"""One point: from plain scenario data to a row per policy and replica. Runs anywhere, on one process."""

from __future__ import annotations

from typing import Any

from sim.results import Table, per_replica


def evaluate(data: dict[str, Any], run: str = "") -> Table:
    """Run a scenario given as plain data and return its `sim.results.per_replica` rows.

    run: the identity that it had when it was planned. Raises `sim.sweeping.traces.TraceChanged` where a trace that it names
    is no longer the one of then, before the run or after it.
    """
    from sim.estimate import estimate
    from sim.loading import load
    from sim.study import simulate
    from sim.sweeping.traces import unchanged

    scenario = load(data)
    if run:
        unchanged(scenario, run)
    rows = per_replica(simulate(scenario, 1, estimate(scenario)).tables, scenario)
    if run:
        unchanged(scenario, run)
    return rows


class PointFailed(Exception):
    """A run that bad input or memory ended. index: of the item."""

    def __init__(self, index: int, text: str) -> None:
        super().__init__(index, text)
        self.index, self.text = index, text


def attempt(item: tuple[int, dict[str, Any], str]) -> Table:
    """`evaluate` one of many: whoever gets the error learns which it was."""
    index, data, run = item
    try:
        return evaluate(data, run)
    except (OSError, ValueError) as error:
        raise PointFailed(index, str(error)) from None
    except MemoryError:
        raise PointFailed(index, "ran out of memory; try fewer --jobs") from None
