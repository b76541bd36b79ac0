"""Faults: what they do to a group, at the end of the iteration in which they strike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import simpy

from sim.deployment import Fault
from sim.engine.serving.clock import At, Order
from sim.engine.serving.policy import Repair
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
        fault, state, fleet = self.fault, group.state, group.world.fleet
        slow = () if self.over else ((fault.rank, fault.factor),)
        rank = fault.rank * group.n_ranks // group.sizes.devices  # of attention data parallelism
        pause_ps, retried, repair = 0, 0, None
        if fault.kind == "slow_device":
            others = tuple(pair for pair in state.slow_devices if pair[0] != fault.rank)
            group.state = replace(state, slow_devices=tuple(sorted(others + slow)))
        elif fault.kind == "slow_link":
            others = tuple(pair for pair in state.slow_links if pair[0] != fault.rank)
            group.state = replace(state, slow_links=tuple(sorted(others + slow)))
            fleet.slow[group.first + rank] = 1.0 if self.over else fault.factor
        else:
            dead = {*state.dead} - {fault.rank} if self.over else {*state.dead, fault.rank}
            group.state = replace(state, dead=tuple(sorted(dead)))
            unit = group.unit_number
            maps = group.world.unit_maps[unit] if self.over else group.maps
            repair = group.world.policy.repair(unit, maps, group.state.dead)
            group.maps = repair.maps
            if self.over:
                group.alive[rank] = not any(d * group.n_ranks // group.sizes.devices == rank for d in dead)
            else:
                retried = _kill(group, rank)
                pause_ps = int(to_ps(fault.recovery_s + repair.loaded_bytes / fault.load_bytes_per_s))
        group.times = group.world.policy.times(group.unit_number, group.maps, group.state)
        if not self.over or repair is not None:
            group.world.faults.append(self._row(group, pause_ps, retried, repair))
        if pause_ps:
            group.ready[:] = False
            yield At(group.world.env, pause_ps, Order.FAULT, 2 * self.number + self.over)
            group.ready[:] = True

    def _row(self, group: Group, pause_ps: int, retried: int, repair: Repair | None) -> dict[str, object]:
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
            "load_s": repair.loaded_bytes / fault.load_bytes_per_s if repair and not self.over else 0.0,
            "retried": retried,
        }


def incidents(faults: Sequence[Fault]) -> Iterator[Incident]:
    """Yield the beginnings and ends of ``faults``."""
    for number, fault in enumerate(faults):
        yield Incident(number, fault, over=False)
        if fault.until_s is not None:
            yield Incident(number, fault, over=True)


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
    group.blocks.forget(rank)
    for request in running + waiting:
        world.reroute(request)
    for request in arriving:
        world.fleet.requests[place] -= 1
        world.fleet.prompt_tokens[place] -= request.prompt
        world.offer(request)
    return len(running)
