"""What a group holds while no iteration goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sim.engine.serving.group import Group


class Rest:
    """Queue and cache of ``group`` while it sleeps or recovers: a row of the log from change to change."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._open: tuple[int, int, int, int] | None = None  # since when, and what has been there since

    def begin(self) -> None:
        """No iteration goes on from now, or still none, but what is held may have changed at this instant."""
        self.end()
        group = self._group
        used = group.blocks.used
        self._open = int(group.world.env.now), group.n_waiting_here, int(used.sum()), int(used.max())

    def look(self) -> None:
        """What is held has changed at this instant, perhaps in the middle of an iteration."""
        if self._open:
            self.begin()

    def end(self) -> None:
        """An iteration begins."""
        if self._open:
            since, *held = self._open
            now = int(self._group.world.env.now)
            if now > since and any(held):
                self._group.world.log.rest((self._group.number, since, now, *held))
        self._open = None
