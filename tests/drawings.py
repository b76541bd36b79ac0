"""What a figure really shows: its texts, where they stand, and the same result under other names of policies."""

from __future__ import annotations

from typing import Any

import matplotlib
import matplotlib.text
import pytest
from matplotlib.figure import Figure

from sim.results import Result, summarise


def named(result: Result, change: Any) -> Result:
    """The same result with other names of policies."""
    new = {policy.name: change(policy.name) for policy in result.scenario.policies}
    tables = {
        key: {**rows, "policy": [new[policy] for policy in rows["policy"]]} if rows else {}
        for key, rows in result.tables.items()
    }
    policies = [policy.model_copy(update={"name": new[policy.name]}) for policy in result.scenario.policies]
    scenario = result.scenario.model_copy(update={"policies": tuple(policies)})
    return Result(scenario, tables, summarise(tables, scenario), 0)


def drawn(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Every text that is really drawn, with its box."""
    found: list[tuple[str, Any]] = []
    inner = matplotlib.text.Text.draw

    def draw(self: Any, renderer: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            found.append((self.get_text(), self.get_window_extent(renderer)))
        inner(self, renderer)

    with monkeypatch.context() as patch:
        patch.setattr(matplotlib.text.Text, "draw", draw)
        figure.draw_without_rendering()
    return found


def apart(figure: Figure, found: list[tuple[str, Any]]) -> None:
    assert found
    for i, (text, box) in enumerate(found):
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.width + 1 and box.y1 <= figure.bbox.height + 1
        assert inside, f"{text!r} leaves the figure"
        for other, there in found[:i]:
            assert not box.overlaps(there), f"{text!r} covers {other!r}"
