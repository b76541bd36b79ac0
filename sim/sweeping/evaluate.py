"""One point: from plain scenario data to a row per policy and replica. Runs anywhere, on one process."""

from __future__ import annotations

from typing import Any

from sim.results import Table, per_replica


def evaluate(data: dict[str, Any]) -> Table:
    """Run a scenario given as plain data and return its `sim.results.per_replica` rows."""
    from sim.estimate import estimate
    from sim.loading import load
    from sim.study import simulate

    scenario = load(data)
    return per_replica(simulate(scenario, 1, estimate(scenario)).tables, scenario)


class PointFailed(Exception):
    """A run that bad input or memory ended. index: of the item."""

    def __init__(self, index: int, text: str) -> None:
        super().__init__(index, text)
        self.index, self.text = index, text


def attempt(item: tuple[int, dict[str, Any]]) -> Table:
    """`evaluate` one of many: whoever gets the error learns which it was."""
    index, data = item
    try:
        return evaluate(data)
    except (OSError, ValueError) as error:
        raise PointFailed(index, str(error)) from None
    except MemoryError:
        raise PointFailed(index, "ran out of memory; try fewer --jobs") from None
