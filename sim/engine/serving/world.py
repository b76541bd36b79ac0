"""Requests from their arrival to their end, over all groups of all units, in SimPy and integer picoseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from sim.conservation import ConservationError
from sim.deployment import Serving, Unit
from sim.engine.serving.clock import At, Order
from sim.engine.serving.fleet import Fleet, Sizes
from sim.engine.serving.group import Group
from sim.engine.serving.incidents import end_absence, incidents
from sim.engine.serving.log import Log
from sim.engine.serving.moves import rebalancing
from sim.engine.serving.policy import ServingPolicy
from sim.engine.serving.request import Request, arriving
from sim.engine.serving.stages import Stage, System
from sim.engine.serving.store import Store
from sim.requests import Requests
from sim.tokens import Bool
from sim.units import PS_PER_S, to_ps


@dataclass(frozen=True)
class Finished:
    """A finished run. requests: in the order of arrival. stages: queue, running, handover and the whole. faults,
    rebalances: rows of their tables. n_events: of SimPy."""

    requests: list[Request]
    fleet: Fleet
    log: Log
    stages: tuple[Stage, ...]
    faults: list[dict[str, Any]]
    rebalances: list[dict[str, Any]]
    end_ps: int
    n_events: int


class World:
    """Everything that groups share: the clock, the router, the network between units, and who is where."""

    def __init__(
        self,
        serving: Serving,
        sizes: tuple[Sizes, ...],
        requests: Requests,
        policy: ServingPolicy,
        n_topics: int,
        seed: int = 0,
        replica: int = 0,
        record: bool = False,
    ) -> None:
        self.serving, self.policy, self.n_topics, self.seed, self.replica = serving, policy, n_topics, seed, replica
        self.env = simpy.Environment()
        self.fleet, self.log = Fleet(sizes), Log(int(to_ps(serving.warmup_s)), record)
        self.queue, self.running, self.handover = Stage("queue"), Stage("running"), Stage("handover")
        self.system = System("all stages")
        self.requests = arriving(requests)
        self.faults: list[dict[str, Any]] = []
        self.rebalances: list[dict[str, Any]] = []
        self.unit_maps = [policy.first(u) for u in range(len(sizes))]  # as last planned
        self.stores = [_store(size.unit) for size in sizes]
        self.groups: list[Group] = []
        self.deaths = np.zeros(len(self.fleet.unit), dtype=np.int64)  # of each rank so far
        self._held: dict[Request, int] = {}  # handed over: deaths of the rank that holds the cache, at that time
        first = 0
        for u, size in enumerate(sizes):
            for index in range(size.unit.count):
                self.groups.append(Group(self, len(self.groups), u, index, first))
                first += size.n_ranks
        self._left = len(self.requests)
        self._over = simpy.Event(self.env)

    def run(self) -> Finished:
        """Serve all requests. Raises ConservationError if one is lost, or a law does not hold."""
        for group in self.groups:
            self.env.process(group.run())
        self.env.process(self._arrivals())
        self.env.process(self._marks())
        for incident in incidents(self.serving.faults):
            self.env.process(incident.wait(self))
        if self.policy.rebalance.interval_s is not None:
            for u in range(len(self.fleet.sizes)):
                self.env.process(rebalancing(self, u))
        if self._left:
            try:
                self.env.run(until=self._over)
            except RuntimeError as error:  # SimPy: no event is left
                raise ConservationError(f"{self._left} requests wait for ever") from error
        for group in self.groups:
            group.rest.end()
            end_absence(group)
        stages = (self.queue, self.running, self.handover, self.system)
        served = Finished(
            self.requests,
            self.fleet,
            self.log,
            stages,
            self.faults,
            self.rebalances,
            int(self.env.now),
            next(self.env._eid),
        )
        self._check()
        return served

    def _check(self) -> None:
        for stage in (self.queue, self.running, self.handover, self.system):
            stage.check()
        given = int(self.log.columns()["output_tokens"].sum())
        generated = sum(request.generated for request in self.requests)
        if given != generated:
            raise ConservationError(f"tokens given to users: {given} != {generated} counted by requests")
        for request in self.requests:
            if request.end_ps < 0 or (request.generated != request.output_tokens and not request.refused):
                raise ConservationError(f"request {request.number} ended with {request.generated} tokens")
        left = [int(group.blocks.used.sum()) for group in self.groups]
        if any(left) or self.fleet.requests.any() or self.fleet.prompt_tokens.any() or self.fleet.context.any():
            raise ConservationError(f"cache blocks still taken in groups: {left}")

    def _arrivals(self) -> simpy.events.ProcessGenerator:
        for request in self.requests:
            yield At(self.env, request.arrival_ps - int(self.env.now), Order.ARRIVAL, request.number)
            place = self.fleet.choose("prompt", request, self._with_room(request))
            if place is None or not self._can_decode(place, request):
                request.refused = True
                self._finish(request)
                continue
            self.system.arrive(request.arrival_ps)
            self.queue.enter(request, request.arrival_ps)
            self._accept(place, request)

    def _marks(self) -> simpy.events.ProcessGenerator:
        for at_ps in sorted({int(to_ps(self.serving.warmup_s)), int(to_ps(self.serving.duration_s))}):
            yield At(self.env, at_ps - int(self.env.now), Order.FAULT)
            for stage in (self.queue, self.running, self.handover, self.system):
                stage.mark(at_ps)

    def _can_decode(self, place: int, request: Request) -> bool:
        """Whether a decode unit could hold a request that a prefill unit hands over."""
        over = self.fleet.hands_over(place) and request.output_tokens > request.generated + 1
        return not over or bool(self.fleet.open("decode", request).any())

    def _with_room(self, request: Request) -> Bool | None:
        """[R] ranks whose unit's queue is not full, or where a request would not have to wait; None: all."""
        if all(size.unit.max_queue is None for size in self.fleet.sizes):
            return None
        found = np.ones(len(self.fleet.unit), dtype=bool)
        for u, size in enumerate(self.fleet.sizes):
            groups = [group for group in self.groups if group.unit_number == u]
            waiting = sum(group.held_up(rank) for group in groups for rank in np.flatnonzero(group.n_waiting).tolist())
            if size.unit.max_queue is not None and waiting >= size.unit.max_queue:
                for group in groups:
                    for rank in range(group.n_ranks):
                        found[group.first + rank] = not group.held_up(rank, request)
        return found

    def _accept(self, place: int, request: Request) -> None:
        group = self.groups[self.fleet.group[place]]
        group.accept(place - group.first, request)

    # Stages

    def admitted(self, request: Request) -> None:
        """From the queue to the running ones."""
        now = int(self.env.now)
        request.queued_ps += self.queue.leave(request, now)
        self.running.enter(request, now)

    def requeue(self, request: Request) -> None:
        """From the running ones back to the queue."""
        now = int(self.env.now)
        self.running.leave(request, now)
        self.queue.enter(request, now)

    def end(self, request: Request) -> None:
        """A running request has all its tokens."""
        self.running.leave(request, int(self.env.now))
        self.system.end(request, int(self.env.now))
        self._finish(request)

    def _finish(self, request: Request) -> None:
        request.end_ps = int(self.env.now)
        self._left -= 1
        if not self._left:
            self._over.succeed()

    def reroute(self, request: Request) -> None:
        """Find a place for a request in the queue whose rank has died; without any it is refused."""
        place = self.fleet.choose("prompt", request)
        if place is None or not self._can_decode(place, request):
            request.refused = True
            request.queued_ps += self.queue.leave(request, int(self.env.now))
            self.system.end(request, int(self.env.now))
            self._finish(request)
        else:
            self._accept(place, request)

    # From prefill to decode units

    def hand_over(self, request: Request) -> None:
        """A prefill rank has computed the prompt and keeps its cache until a decode rank has it."""
        now = int(self.env.now)
        self.running.leave(request, now)
        self.handover.enter(request, now)
        self._held[request] = int(self.deaths[request.place])
        self.offer(request)

    def offer(self, request: Request) -> None:
        """Choose the decode rank that a held cache goes to."""
        place = self.fleet.choose("decode", request)
        if place is None:
            self._give_up(request)
            return
        group = self.groups[self.fleet.group[place]]
        self.fleet.requests[place] += 1
        self.fleet.prompt_tokens[place] += request.prompt
        group.arriving[place - group.first].append(request)
        group.receive(place - group.first)

    def _unhold(self, request: Request) -> None:
        source = self.groups[self.fleet.group[request.place]]
        source.blocks.release(request.place - source.first, request)
        source.wake()
        del self._held[request]

    def _give_up(self, request: Request) -> None:
        """No decode rank is left, or the held cache is lost: compute it again."""
        now = int(self.env.now)
        self._unhold(request)
        request.retries += 1
        self.handover.leave(request, now)
        self.queue.enter(request, now)
        self.reroute(request)

    def still_there(self, request: Request) -> bool:
        """Whether the cache of a request handed over is still held."""
        return self._held[request] == int(self.deaths[request.place])

    def lose_held(self, place: int) -> None:
        """Caches that rank ``place``, which has died, held for others are gone; who was to take them will notice."""
        source = self.groups[self.fleet.group[place]]
        for request in self._held:
            if request.place == place:
                source.blocks.release(place - source.first, request)

    def lose(self, request: Request, place: int) -> None:
        """Strike a request whose cache is no longer held off the list of the decode rank ``place``."""
        self.fleet.requests[place] -= 1
        self.fleet.prompt_tokens[place] -= request.prompt
        self._give_up(request)

    def transfer(self, request: Request, place: int) -> None:
        """Send the request's cache to ``place``, which has reserved room. Both ports are taken one transfer at a time."""
        fleet, now, source = self.fleet, int(self.env.now), request.place
        sizes, other = fleet.sizes[fleet.unit[source]], fleet.sizes[fleet.unit[place]]
        rate = min(sizes.port_bytes_per_s / fleet.slow[source], other.port_bytes_per_s / fleet.slow[place])
        begin = max(now, int(fleet.sent_ps[source]), int(fleet.received_ps[place]))
        end = begin + int(to_ps(request.prompt * sizes.kv_bytes_per_token / rate))
        fleet.sent_ps[source] = fleet.received_ps[place] = end
        arrival = At(self.env, end - now + int(to_ps(sizes.latency_s)), Order.TRANSFER, request.number)
        died = int(self.deaths[place])
        arrival.callbacks.append(lambda _: self._arrived(request, place, died))

    def _arrived(self, request: Request, place: int, died: int) -> None:
        now, group = int(self.env.now), self.groups[self.fleet.group[place]]
        rank, blocks = place - group.first, group.blocks.of(request.prompt)
        self.fleet.prompt_tokens[place] -= request.prompt
        if died != int(self.deaths[place]) or not self.still_there(request):
            self.fleet.requests[place] -= 1
            group.seats[rank] -= 1
            group.blocks.used[rank] -= blocks
            if self.still_there(request):
                self.offer(request)
            else:
                self._give_up(request)
            group.wake()
            if group.alive[rank]:
                group.receive(rank)  # others may have been waiting for the room
            return
        if self.log.extra is not None:
            source = int(self.fleet.group[request.place])
            self.log.extra.handovers.append((request.number, source, group.number, request.since_ps, now))
        self._unhold(request)
        request.own, request.place = blocks, place
        self.handover.leave(request, now)
        self.running.enter(request, now)
        group.admitted[rank][request] = None
        group.landed.append((rank, request))
        group.wake()

    def seconds(self) -> float:
        """Seconds so far."""
        return float(self.env.now) / PS_PER_S


def _store(unit: Unit) -> Store | None:
    if unit.prefix_cache != "shared":
        return None
    tokens = unit.cache_store_tokens
    return Store(unit.block_size, None if tokens is None else tokens // unit.block_size)
