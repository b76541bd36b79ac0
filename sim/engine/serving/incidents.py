"""Faults: what they do to a group, at the end of the iteration in which they strike. Those that overlap add up: a rank is
as slow as its worst fault makes it, and dead while any of them lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy

from sim.deployment import Fault
from sim.engine.serving.clock import At, Order
from sim.engine.serving.policy import Repair
from sim.tokens import I32
from sim.units import PS_PER_S, to_ps

if TYPE_CHECKING:
    from sim.engine.serving.group import Group
    from sim.engine.serving.world import World


@dataclass(frozen=True)
class Incident:
    """The beginning or the end of ``fault``, the ``number``-th of the scenario."""

    number: int
    fault: Fault
    over: bool

    def wait(self, world: World) -> simpy.events.ProcessGenerator:
        """Bring the news to the group when it is time."""
        at_s = self.fault.until_s if self.over else self.fault.at_s
        yield At(world.env, int(to_ps(at_s or 0.0)), Order.FAULT, 2 * self.number + self.over)
        for group in world.groups:
            if group.unit.name == self.fault.unit and group.index == self.fault.index:
                group.news.append(self)
                group.wake()

    def happen(self, group: Group) -> simpy.events.ProcessGenerator:
        """Change the group; after a death it stands still for a while."""
        if self.over:
            group.faults.pop(self.number, None)
        else:
            group.faults[self.number] = self.fault
        pause_ps = 0
        if self.fault.kind != "dead_rank":
            self._slow(group)
        elif self.over:
            self._begin_return(group)
        else:
            pause_ps = self._die(group)
        if pause_ps:
            group.ready[:] = False
            group.rest.begin()
            yield At(group.world.env, pause_ps, Order.FAULT, 2 * self.number + self.over)
            group.ready[:] = True

    def _slow(self, group: Group) -> None:
        kind = self.fault.kind
        factors: dict[int, float] = {}
        for fault in group.faults.values():
            if fault.kind == kind:
                factors[fault.rank] = max(factors.get(fault.rank, 1.0), fault.factor)
        pairs = tuple(sorted(factors.items()))
        if kind == "slow_device":
            group.state = replace(group.state, slow_devices=pairs)
        else:
            group.state = replace(group.state, slow_links=pairs)
            group.slow[:] = 1.0
            for device, factor in pairs:
                rank = _rank(group, device)
                group.slow[rank] = max(group.slow[rank], factor)
        group.retime()
        if not self.over:
            group.world.faults.append(self._row(group))

    def _die(self, group: Group) -> int:
        """Return for how long (ps) the group stands still."""
        fault = self.fault
        group.loading.pop(fault.rank, None)
        if fault.rank in group.state.dead:
            return 0
        group.state = replace(group.state, dead=tuple(sorted({*group.state.dead, fault.rank})))
        retried = _kill(group, _rank(group, fault.rank))
        if group.alive.any():
            repair = group.world.policy.repair(group.unit_number, group.maps, group.state.dead, group.maps)
            pause_ps = int(to_ps(fault.recovery_s + repair.loaded_bytes / fault.load_bytes_per_s))
        else:  # the group serves nothing until somebody is back, who loads everything
            repair, pause_ps = Repair(None if group.maps is None else np.full_like(group.maps, -1), 0.0), 0
        group.maps = repair.maps
        group.retime()
        if group.moving:
            group.moving.again()
        row = self._row(group, repair, pause_ps, retried)
        group.world.faults.append(row)
        if not group.alive.any() and not group.absent:
            group.absent = row
        return pause_ps

    def _begin_return(self, group: Group) -> None:
        """A rank that no fault holds down any more loads its experts; the others go on without it meanwhile."""
        world, rank = group.world, self.fault.rank
        if any(fault.kind == "dead_rank" and fault.rank == rank for fault in group.faults.values()):
            return
        plan = world.unit_maps[group.unit_number]
        dead = tuple(other for other in group.state.dead if other != rank)
        repair = world.policy.repair(group.unit_number, plan, dead, group.maps)
        world.faults.append(self._row(group, repair))
        group.loading[rank] = self.number
        load_ps = int(to_ps(repair.loaded_bytes / self.fault.load_bytes_per_s))
        loaded = Loaded(self.number, rank, plan)
        if not load_ps:
            loaded.come_back(group)
            return
        arrival = At(world.env, load_ps, Order.FAULT, 2 * self.number + 1)
        arrival.callbacks.append(lambda _: loaded.tell(group))

    def _row(self, group: Group, repair: Repair | None = None, pause_ps: int = 0, retried: int = 0) -> dict[str, Any]:
        fault = self.fault
        return {
            "time_s": float(group.world.env.now) / PS_PER_S,
            "unit": fault.unit,
            "index": fault.index,
            "rank": fault.rank,
            "kind": "revived_rank" if self.over else fault.kind,
            "until_s": float("nan") if fault.until_s is None else fault.until_s,
            "paused_s": pause_ps / PS_PER_S,
            "alive_share": repair.alive_share if repair else 1.0,
            "loaded_experts": repair.loaded if repair else 0,
            "loaded_bytes": repair.loaded_bytes if repair else 0.0,
            "load_s": repair.loaded_bytes / fault.load_bytes_per_s if repair else 0.0,
            "retried": retried,
        }


@dataclass(frozen=True)
class Loaded:
    """Device ``rank``, back since the end of fault ``number``, has its experts under ``plan``."""

    number: int
    rank: int
    plan: I32 | None

    def tell(self, group: Group) -> None:
        """Bring the news to the group."""
        group.news.append(self)
        group.wake()

    def happen(self, group: Group) -> simpy.events.ProcessGenerator:
        """Let the rank serve, unless it has died again since."""
        if group.loading.get(self.rank) == self.number:
            self.come_back(group)
        yield from ()

    def come_back(self, group: Group) -> None:
        """Let the rank serve."""
        world, rank = group.world, _rank(group, self.rank)
        del group.loading[self.rank]
        dead = tuple(other for other in group.state.dead if other != self.rank)
        group.state = replace(group.state, dead=dead)
        # A plan that the others have gone over to meanwhile is what the rank has loaded.
        plan = self.plan if group.moving else world.unit_maps[group.unit_number]
        group.maps = world.policy.repair(group.unit_number, plan, dead, group.maps).maps
        group.alive[rank] = all(_rank(group, other) != rank for other in dead)
        group.retime()
        if group.moving:
            group.moving.again()
        if group.alive.any():
            end_absence(group)


def end_absence(group: Group) -> None:
    """Write down for how long nobody was alive, if so."""
    if group.absent:
        group.absent["paused_s"] = group.world.seconds() - group.absent["time_s"]
    group.absent = None


def incidents(faults: Sequence[Fault]) -> Iterator[Incident]:
    """Yield the beginnings and ends of ``faults``."""
    for number, fault in enumerate(faults):
        yield Incident(number, fault, over=False)
        if fault.until_s is not None:
            yield Incident(number, fault, over=True)


def _rank(group: Group, device: int) -> int:
    """The data-parallel rank of a device."""
    return device * group.n_ranks // group.sizes.devices


def _kill(group: Group, rank: int) -> int:
    """Take everything off data-parallel rank ``rank``; return how many running requests have to be computed again."""
    if not group.alive[rank]:
        return 0
    world, place = group.world, group.first + rank
    world.deaths[place] += 1
    group.alive[rank] = False
    running, waiting, arriving = list(group.admitted[rank]), group.empty_queue(rank), list(group.arriving[rank])
    group.arriving[rank].clear()
    for request in running:
        group.drop(rank, request)
        request.retries += 1
        world.requeue(request)
    world.lose_held(place)
    group.blocks.forget(rank)
    for request in running + waiting:
        world.reroute(request)
    for request in arriving:
        world.fleet.requests[place] -= 1
        world.fleet.prompt_tokens[place] -= request.prompt
        world.offer(request)
    return len(running)
