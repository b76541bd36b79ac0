"""One group of ranks that serve in step: continuous batching, an iteration after the other.

As in vLLM's first-come first-served scheduler: running decodes come first and take their new cache blocks; where there
are none left, the request admitted last is put back to the head of the queue and computed again later. Waiting prompts
then fill what is left of the token budget. Nothing here loops over running requests.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy

from sim.deployment import Fault
from sim.engine.iteration import IterationTimes, Timed, Work
from sim.engine.serving.batch import work_of
from sim.engine.serving.cache import Blocks
from sim.engine.serving.clock import At, Order, Sleep
from sim.engine.serving.decodes import Decodes
from sim.engine.serving.gaps import Gaps
from sim.engine.serving.policy import State
from sim.engine.serving.request import Acceptance, Request
from sim.engine.serving.rest import Rest
from sim.tokens import I32, Bool
from sim.units import to_ps

if TYPE_CHECKING:
    from sim.engine.serving.incidents import Incident, Loaded
    from sim.engine.serving.moves import Moving
    from sim.engine.serving.world import World


class Group:
    """Ranks ``first`` .. of a unit. Everything that changes is reached through the world's events.

    waiting: per rank, requests in the order in which they will be taken. admitted: per rank, those that run, in the order
    of admission. partial: per rank, prompts that are partly computed. arriving: per rank, requests whose cache is to be
    handed over here, as long as there is no room for them. faults: those that last, by number. loading: devices
    that will be back once their experts are loaded, and the fault that ended.
    """

    def __init__(self, world: World, number: int, unit: int, index: int, first: int) -> None:
        self.world, self.number, self.unit_number, self.index, self.first = world, number, unit, index, first
        sizes = world.fleet.sizes[unit]
        self.sizes, self.unit, n = sizes, sizes.unit, sizes.n_ranks
        self.n_ranks = n
        here = slice(first, first + n)
        fleet = world.fleet
        self.n_requests, self.n_waiting, self.prompt_tokens = (
            fleet.requests[here],
            fleet.waiting[here],
            fleet.prompt_tokens[here],
        )
        self.alive, self.ready, self.slow = fleet.alive[here], fleet.ready[here], fleet.slow[here]
        caching, store = self.unit.prefix_cache == "rank", world.stores[unit]
        self.blocks = Blocks(n, sizes.capacity_blocks, self.unit.block_size, caching=caching, store=store)
        self.acceptance = Acceptance(self.unit.speculative_tokens, self.unit.acceptance, world.seed, world.replica)
        self.decodes = Decodes(n, world.n_topics, self.unit.block_size, self.acceptance.mean, fleet.context[here])
        self.waiting: list[deque[Request]] = [deque() for _ in range(n)]
        self.admitted: list[dict[Request, None]] = [{} for _ in range(n)]
        self.partial: list[list[Request]] = [[] for _ in range(n)]
        self.arriving: list[deque[Request]] = [deque() for _ in range(n)]
        self.seats = np.zeros(n, dtype=np.int64)  # taken or reserved
        self.prompting = np.zeros(n, dtype=np.int64)  # waiting or partly computed
        self.n_prompting = self.n_waiting_here = 0  # on all ranks
        self.landed: list[tuple[int, Request]] = []  # whose cache has been handed over since the last iteration began
        self.maps: I32 | None = world.unit_maps[unit]
        self.state = State()
        self.times: IterationTimes = world.policy.times(unit, self.maps, self.state)
        self.news: deque[Incident | Loaded] = deque()
        self.faults: dict[int, Fault] = {}
        self.loading: dict[int, int] = {}
        self.absent: dict[str, Any] | None = None  # the death of the last one alive, among the faults
        self.moving: Moving | None = None
        self.topic_tokens = np.zeros(world.n_topics, dtype=np.int64)
        self._per_decode = 1 + self.unit.speculative_tokens
        self._resting: Bool | None = None  # ranks whose decodes take no part in the iteration
        self._given, self._asking = 0, np.zeros(n, dtype=np.int64)
        self._context = 0  # tokens of the contexts of the iteration's decodes, where it is recorded
        self._graphs = np.array(sorted(self.unit.cuda_graph_sizes), dtype=np.int64)
        self._chunks: list[tuple[int, Request, int]] = []
        self.gaps = Gaps(n, world.log, together=self.unit.chunked_prefill)
        self.rest = Rest(self)
        self._sleep: Sleep | None = None
        self._cached = 0
        self._loading: dict[int, int] = {}  # tokens that ranks load from the shared cache in this iteration
        self.iterations = 0

    # Requests come and go

    def accept(self, rank: int, request: Request, *, front: bool = False) -> None:
        """Queue a request whose prompt is to be computed here."""
        request.prompt = request.input_tokens + request.generated
        request.place = self.first + rank
        (self.waiting[rank].appendleft if front else self.waiting[rank].append)(request)
        self.n_requests[rank] += 1
        self._count_waiting(rank, 1)
        self._count_prompting(rank, request, 1)
        self.wake()

    def _count_waiting(self, rank: int, change: int) -> None:
        self.n_waiting[rank] += change
        self.n_waiting_here += change

    def _count_prompting(self, rank: int, request: Request, sign: int) -> None:
        self.prompting[rank] += sign
        self.n_prompting += sign
        self.prompt_tokens[rank] += sign * request.prompt

    def held_up(self, rank: int, *more: Request) -> int:
        """Return how many requests of the queue of ``rank``, with ``more`` behind, have to wait for seats, blocks or
        budget; others start with the next iteration."""
        queue = [*self.waiting[rank], *more]
        budget = self.unit.max_num_batched_tokens - sum(r.prompt - r.computed for r in self.partial[rank])
        if self.unit.chunked_prefill:
            budget -= int(self.decodes.count[rank]) * self._per_decode
        seats = self.unit.max_num_seqs - int(self.seats[rank]) if self.ready[rank] else 0
        room = self.blocks.capacity - int(self.blocks.used[rank])
        for ahead, request in enumerate(queue):
            room -= self.blocks.of(request.prompt)
            if ahead >= seats or room < 0 or budget <= 0:
                return len(queue) - ahead
            budget -= request.prompt
        return 0

    def empty_queue(self, rank: int) -> list[Request]:
        """Take all waiting requests off ``rank``."""
        found = list(self.waiting[rank])
        self.waiting[rank].clear()
        for request in found:
            self.n_requests[rank] -= 1
            self._count_waiting(rank, -1)
            self._count_prompting(rank, request, -1)
        return found

    def wake(self) -> None:
        """Look for work at this instant, unless an iteration is going on; something here has changed."""
        self.rest.look()
        if self._sleep is not None:
            self._sleep.wake(self.number)

    def drop(self, rank: int, request: Request) -> None:
        """Take a running request off ``rank``, with its blocks; its tokens so far stay with it."""
        del self.admitted[rank][request]
        self.seats[rank] -= 1
        self.n_requests[rank] -= 1
        if request.joined >= 0:
            self._leave_decodes(rank, request)
        else:
            self.partial[rank].remove(request)
            self._count_prompting(rank, request, -1)
        self.blocks.release(rank, request)

    def _leave_decodes(self, rank: int, request: Request) -> None:
        before = request.generated
        self.decodes.leave(rank, request)
        brought = request.generated - before
        request.own += self.blocks.of(request.context + brought) - self.blocks.of(request.context)
        request.last_ps = self.gaps.leave(rank, request)

    def _start_decoding(self, rank: int, request: Request) -> None:
        """Let an admitted request, whose last token came at its ``last_ps``, decode."""
        if not self.acceptance.most:
            request.accepted = None
        elif request.accepted is None:
            request.accepted = self.acceptance.draw(request)
        self.gaps.join(rank, request, first=not self.decodes.count[rank])
        self.decodes.join(rank, request)

    def retime(self) -> None:
        """Look up the clock of what the group has become; nobody needs one where nobody is alive."""
        if self.alive.any():
            self.times = self.world.policy.times(self.unit_number, self.maps, self.state)

    # Iterations

    def run(self) -> simpy.events.ProcessGenerator:
        """The group's process."""
        env = self.world.env
        while True:
            while self.news:
                self._land()
                yield from self.news.popleft().happen(self)
            self._land()
            work = self._schedule()
            if work is None:
                self.rest.begin()
                self._sleep = Sleep(env)
                since = int(env.now)
                yield self._sleep
                self._sleep = None
                if self.moving:
                    self.moving.while_idle(since)
                continue
            self.rest.end()
            timed = self._loaded(self.times.time(work, self.iterations))
            start, duration = int(env.now), timed.duration_ps
            if self.moving:
                duration += self.moving.during(timed)
            yield At(env, duration, Order.END, self.number)
            self._finish(start, timed)
            if self.moving:
                self.moving.look()

    def _loaded(self, timed: Timed) -> Timed:
        """The iteration, begun when the slowest rank has loaded what its prompts hit in the shared cache."""
        rate = self.unit.cache_load_bytes_per_s
        if rate is None or not self._loading:
            return timed
        load_ps = int(to_ps(max(self._loading.values()) * self.sizes.kv_bytes_per_token / rate))
        return replace(
            timed, duration_ps=timed.duration_ps + load_ps, communication_ps=timed.communication_ps + load_ps
        )

    def _land(self) -> None:
        """Let requests that were handed over meanwhile take part from the next iteration on."""
        for rank, request in self.landed:
            self._start_decoding(rank, request)
        self.landed.clear()

    def _schedule(self) -> Work | None:
        """Fill an iteration, or return None if there is nothing to do."""
        decodes = self.decodes
        self._chunks, self._cached, self._resting, self._loading = [], 0, None, {}
        if self.unit.chunked_prefill:
            self._grow()
            self._fill()
        else:
            self._fill()
            if self._chunks and decodes.n:  # prompts first: ranks that have any do not decode
                self._resting = np.zeros(self.n_ranks, dtype=bool)
                self._resting[[rank for rank, _, _ in self._chunks]] = True
            self._grow()
        if not decodes.n and not self._chunks:
            return None
        asking, context = decodes.count.copy(), decodes.context.copy()
        longest, topics = decodes.longest(), decodes.topics * self._per_decode
        if self._resting is not None:
            topics = topics * int(asking[~self._resting].sum()) // max(1, decodes.n)  # counted over the group only
            for array in (asking, context, longest):
                array[self._resting] = 0
        self._asking = asking
        work = work_of(self._chunks, asking, context, longest, topics, self._per_decode, self._graphs)
        self.topic_tokens += topics
        if self.world.log.extra is not None:
            self._context = int(work.decode_kv_tokens.sum())
        return work

    def _grow(self) -> None:
        """Take the blocks that the next decode step opens, putting back requests for which there is no room."""
        decodes = self.decodes
        self._given = 0
        while decodes.n:
            wanted = decodes.new_blocks()
            if self._resting is not None:
                wanted = np.where(self._resting, 0, wanted)
            full = self.blocks.take_all(wanted)
            if not len(full):
                break
            for rank in full.tolist():
                self._put_back(rank)
        if decodes.n:
            brought = decodes.new_tokens()
            if self._resting is not None:
                brought = np.where(self._resting, 0, brought)
            self._given = int(brought.sum())
            decodes.context += brought

    def _put_back(self, rank: int) -> None:
        """Preempt the request admitted last; it waits at the head of its queue."""
        request = next(reversed(self.admitted[rank]))
        self.drop(rank, request)
        request.preemptions += 1
        self.world.requeue(request)
        self.accept(rank, request, front=True)

    def _fill(self) -> None:
        """Take prompts on all ranks as far as their token budgets go."""
        most = self.unit.max_num_batched_tokens
        for rank in np.flatnonzero(self.prompting).tolist() if self.n_prompting else ():
            decoding = int(self.decodes.count[rank]) if self.unit.chunked_prefill else 0
            self._fill_rank(rank, most - decoding * self._per_decode)

    def _fill_rank(self, rank: int, budget: int) -> None:
        whole, partial, waiting = not self.unit.chunked_prefill, self.partial[rank], self.waiting[rank]
        most = self.unit.long_prefill_token_threshold or budget
        for request in partial:
            if budget <= 0:
                return
            taken = min(request.prompt - request.computed, budget, most)
            self._chunks.append((rank, request, taken))
            budget -= taken
        before = len(self._chunks)
        while budget > 0 and waiting and self.seats[rank] < self.unit.max_num_seqs:
            request = waiting[0]
            if whole and len(self._chunks) > before and request.prompt > budget:
                break
            if not self.blocks.admit(rank, request):
                break
            self._admit(rank, request)
            left = request.prompt - request.computed
            taken = left if whole else min(left, budget, most)
            self._chunks.append((rank, request, taken))
            budget -= taken
            if taken < left:
                partial.append(request)

    def _admit(self, rank: int, request: Request) -> None:
        self.waiting[rank].popleft()
        self._count_waiting(rank, -1)
        self.seats[rank] += 1
        self.admitted[rank][request] = None
        if self.world.fleet.decode_alone and not request.generated:
            request.computed = request.prompt - 1  # the last token is the first one's query
        elif self.blocks.store is not None and request.computed:
            self._loading[rank] = self._loading.get(rank, 0) + request.computed
        if not self.world.fleet.decode_alone:
            self._cached += request.computed
        if request.cached_tokens < 0:
            request.cached_tokens = request.computed
        self.world.admitted(request)

    def _finish(self, start: int, timed: Timed) -> None:
        """The iteration is over: tokens reach users, requests end or go on."""
        now, blocks, log = int(self.world.env.now), self.blocks, self.world.log
        waiting, running = self.n_waiting_here, self.decodes.n + len(self._chunks)
        used, fullest = int(blocks.used.sum()), int(blocks.used.max())
        self.gaps.count(now, self._asking)
        given, asking = self._given, int(self._asking.sum())
        for rank, request in self.decodes.advance(self._resting) if self.decodes.n else ():
            request.own += blocks.of(request.most_tokens) - blocks.of(request.context)
            self._end(rank, request)
        computed = 0
        for rank, request, n in self._chunks:
            request.computed += n
            computed += n
            if request.computed == request.prompt:
                given += 1
                self._prompt_done(rank, request, now)
        for rank in range(self.n_ranks) if any(self.arriving) else ():
            self.receive(rank)
        row = (
            self.number, start, now, asking, running, waiting, used, fullest, computed, self._cached, given,
            timed.attention_ps, timed.experts_ps, timed.communication_ps, timed.other_ps,
        )  # fmt: skip
        log.iteration(row, timed.imbalance)
        if log.extra is not None:
            log.extra.contexts.append(self._context)
        self.iterations += 1

    def _prompt_done(self, rank: int, request: Request, now: int) -> None:
        if request in self.partial[rank]:
            self.partial[rank].remove(request)
        self._count_prompting(rank, request, -1)
        self.blocks.keep(rank, request)
        request.generated += 1
        if request.last_ps >= 0:
            self.world.log.gap(now, request.last_ps)
        else:
            request.first_ps = now
        request.last_ps = now
        if request.generated == request.output_tokens:
            self._end(rank, request)
        elif self.unit.role == "prefill":
            del self.admitted[rank][request]
            self.seats[rank] -= 1
            self.n_requests[rank] -= 1
            self.world.hand_over(request)
        else:
            self._start_decoding(rank, request)

    def _end(self, rank: int, request: Request) -> None:
        del self.admitted[rank][request]
        self.seats[rank] -= 1
        self.n_requests[rank] -= 1
        self.blocks.release(rank, request)
        self.world.end(request)

    # Cache from prefill units

    def receive(self, rank: int) -> None:
        """Start the transfers of requests handed over to ``rank`` for which there is room; requests that wait here to be
        computed again go first."""
        queue = self.arriving[rank]
        while queue and not self.waiting[rank] and self.seats[rank] < self.unit.max_num_seqs:
            if not self.world.still_there(queue[0]):
                self.world.lose(queue.popleft(), self.first + rank)
                continue
            if not self.blocks.take(rank, self.blocks.of(queue[0].prompt)):
                return
            self.seats[rank] += 1
            self.rest.look()
            self.world.transfer(queue.popleft(), self.first + rank)
