"""Moving experts while requests are served: when a plan is made, and what its transfers do to iterations."""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy

from sim.engine.iteration import Timed
from sim.engine.serving.clock import At, Order
from sim.tokens import F64, I32
from sim.units import PS_PER_S, to_ps

if TYPE_CHECKING:
    from sim.engine.serving.group import Group
    from sim.engine.serving.world import World


class Moving:
    """Transfers towards a new map in one group, a chunk of layers after the other; the map then changes at once.

    With ``stall`` every iteration is followed by one chunk, for which it waits. Without, chunks go on all the time and
    share the ports with the iteration's own messages, which take twice as long meanwhile. Dead ranks send and receive
    nothing: what the plan gives them is placed on the others. solver_ps: a first chunk, in which nothing is moved. row: of
    the table of plans, to which this group's share is added.
    """

    def __init__(self, group: Group, plan: I32, stall: bool, row: dict[str, Any], solver_ps: int = 0) -> None:
        self.group, self.plan, self.stall, self.row = group, plan, stall, row
        self._chunks = deque([solver_ps] if solver_ps else [])
        self._begin()

    def _begin(self) -> None:
        group, policy, row = self.group, self.group.world.policy, self.row
        assert group.maps is not None
        target = policy.repair(group.unit_number, self.plan, group.state.dead, group.maps).maps
        assert target is not None
        self.maps, move = target, policy.move(group.unit_number, group.maps, target)
        self._chunks.extend(move.chunks_ps)
        self._begun_ps = int(group.world.env.now)
        row["moved_slots"] += move.slots
        row["moved_bytes"] += move.moved_bytes
        row["transfer_s"] = max(row["transfer_s"], sum(move.chunks_ps) / PS_PER_S)

    def again(self) -> None:
        """Others are dead than when the move began: begin it anew, from what ranks hold now."""
        self._chunks.clear()
        if self.group.alive.any():
            self._begin()
        else:
            self.group.moving = None

    def during(self, timed: Timed) -> int:
        """Return how much longer an iteration takes because of the move."""
        if self.stall:
            extra = self._chunks.popleft() if self._chunks else 0
        else:
            passed = self._pass(timed.duration_ps)
            extra = passed * timed.communication_ps // max(1, timed.duration_ps)
        self.row["added_s"] += extra / PS_PER_S
        return extra

    def while_idle(self, since_ps: int) -> None:
        """The group did nothing from ``since_ps`` until now."""
        self._pass(int(self.group.world.env.now) - max(since_ps, self._begun_ps))
        self.look()

    def _pass(self, elapsed_ps: int) -> int:
        left = elapsed_ps
        while self._chunks and left:
            step = min(left, self._chunks[0])
            self._chunks[0] -= step
            left -= step
            if not self._chunks[0]:
                self._chunks.popleft()
        return elapsed_ps - left

    def look(self) -> None:
        """Change the map if all has arrived."""
        group = self.group
        if self._chunks:
            return
        group.moving = None
        group.maps = self.maps
        group.retime()
        self.row["effective_s"] = max(self.row["effective_s"], group.world.seconds())


def rebalancing(world: World, unit: int) -> simpy.events.ProcessGenerator:
    """The process that plans anew for all groups of ``unit``, every interval, from the tokens that they have served."""
    rule, policy = world.policy.rebalance, world.policy
    assert rule.interval_s is not None
    groups = [group for group in world.groups if group.unit_number == unit]
    pieces = max(1, math.ceil(rule.interval_s / (rule.window_s or rule.interval_s)))
    piece_ps = int(to_ps(rule.interval_s / pieces))
    served: list[F64] = [np.zeros(world.n_topics)]  # so far, at the end of every piece
    due_ps = 0
    while True:
        for _ in range(pieces):
            due_ps += piece_ps
            yield At(world.env, max(0, due_ps - int(world.env.now)), Order.PLAN, unit)
            served.append(np.sum([group.topic_tokens for group in groups], axis=0, dtype=np.float64))
        maps = world.unit_maps[unit]
        windows = np.array([late - early for early, late in pairwise(served)])
        row: dict[str, Any] = {"time_s": world.seconds(), "unit": groups[0].unit.name, "done": False, "reason": ""}
        row |= {"moved_slots": 0, "moved_bytes": 0.0, "transfer_s": 0.0, "added_s": 0.0, "effective_s": math.nan}
        world.rebalances.append(row)
        if maps is None or any(group.moving for group in groups) or not windows[-pieces:].any():
            row["reason"] = "no experts" if maps is None else "still moving" if windows[-pieces:].any() else "idle"
            continue
        ages_s: F64 = np.arange(len(windows) - 1.0, -1.0, -1.0) * (piece_ps / PS_PER_S)
        after = policy.plan(unit, windows, ages_s, maps)
        if after is None:
            row["reason"] = "balanced enough"
            continue
        row |= {"done": True, "effective_s": world.seconds()}
        world.unit_maps[unit] = after
        solver_ps = int(to_ps(rule.solver_s))
        if rule.transfer == "background" and solver_ps:
            yield At(world.env, solver_ps, Order.PLAN, unit)
        stall = rule.transfer == "stall"
        for group in groups:
            if group.alive.any():
                group.moving = Moving(group, after, stall, row, solver_ps if stall else 0)
                group.wake()
