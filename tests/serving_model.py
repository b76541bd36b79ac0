"""Slow and plain models of serving that the engine is held to: one loop over requests, and queues by recursion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from sim.deployment import Fault, Serving, Slo, Unit
from sim.engine.iteration import Timed, Work
from sim.engine.serving import Finished, Move, Repair, Sizes, State, World
from sim.requests import PrefixTree, Requests, RequestSource
from sim.settings import Parallel, Rebalance
from sim.tokens import F64, I32, I64

US = 10**6


class Nobody(RequestSource):
    """Tests hand requests to the engine themselves."""

    kind: Literal["tests_nobody"] = "tests_nobody"

    def draw(self, duration_s: float, topic_weights: F64, seed: int, replica: int) -> Requests:
        raise NotImplementedError


@dataclass
class Clock:
    """A linear law in which every part of `Work` counts; exact in integers."""

    base: int = 20_000 * US
    per_request: int = 7 * US
    per_token: int = 11 * US
    per_context: int = 13
    per_pair: int = 17
    per_sample: int = 19 * US
    factor: int = 1
    seen: list[Work] = field(default_factory=list)

    def duration(self, requests: int, tokens: int, context: int, pairs: float, sampled: int) -> int:
        terms = self.per_request * requests + self.per_token * tokens + self.per_context * context
        return self.factor * (self.base + terms + self.per_pair * int(2 * pairs) + self.per_sample * sampled)

    def prompt(self, n: int) -> int:
        """A prompt alone."""
        return self.duration(1, n, 0, n * (n + 1) / 2, 1) if n > 1 else self.duration(1, 1, 1, 0, 1)

    def time(self, work: Work, number: int) -> Timed:
        self.seen.append(work)
        requests = int(work.decode_requests.sum() + work.prefill_requests.sum())
        tokens = int(work.decode_tokens.sum() + work.prefill_tokens.sum())
        ps = self.duration(
            requests, tokens, int(work.decode_kv_tokens.sum()), float(work.prefill_pairs.sum()), int(work.sampled.sum())
        )
        return Timed(ps, 1.5, ps // 2, 0, ps - ps // 2, 0)


class Fake:
    """A `ServingPolicy` with a clock instead of experts."""

    def __init__(self, clock: Clock | None = None, rebalance: Rebalance | None = None) -> None:
        self.clock, self.rebalance = clock or Clock(), rebalance or Rebalance()
        self.states: list[State] = []
        self.chunks_ps: tuple[int, ...] = ()
        self.plans: list[tuple[F64, F64]] = []
        self.lost_bytes, self.loading_bytes = 4e9, 0.0  # of a rank that dies, and of one that comes back
        self.repairs: list[tuple[int, ...]] = []

    def first(self, unit: int) -> I32 | None:
        return np.zeros((1, 4), np.int32)

    def times(self, unit: int, maps: I32 | None, state: State) -> Clock:
        self.states.append(state)
        slow = max([1, *(int(factor) for _, factor in state.slow_devices)])
        return Clock(**{**self.clock.__dict__, "factor": slow, "seen": self.clock.seen})

    def plan(self, unit: int, topic_tokens: F64, ages_s: F64, maps: I32) -> I32 | None:
        self.plans.append((topic_tokens, ages_s))
        return maps + 1

    def move(self, unit: int, before: I32, after: I32) -> Move:
        return Move(3, 5.0, self.chunks_ps)

    def repair(self, unit: int, maps: I32 | None, dead: tuple[int, ...], held: I32 | None) -> Repair:
        self.repairs.append(dead)
        comes_back = maps is not held
        if comes_back or maps is None:
            return Repair(maps, 1.0, 1, self.loading_bytes)
        return Repair(maps.copy(), 0.75, 2, self.lost_bytes)


def requests_of(
    arrival_ps: list[int],
    inputs: list[int],
    outputs: list[int],
    prefix: list[int] | None = None,
    prefix_tokens: list[int] | None = None,
    tree: PrefixTree | None = None,
    topics: int = 3,
) -> Requests:
    n = len(arrival_ps)
    return Requests(
        np.array(arrival_ps, np.int64),
        np.array(inputs, np.int64),
        np.array(outputs, np.int64),
        (np.arange(n) % topics).astype(np.int32),
        np.array(prefix if prefix else [-1] * n, np.int32),
        np.array(prefix_tokens if prefix_tokens else [0] * n, np.int64),
        np.zeros(n, np.int32),
        tree,
    )


def unit(name: str = "u", ranks: int = 1, **more: object) -> Unit:
    return Unit.model_validate({"name": name, "parallel": Parallel(ep_size=ranks), **more})


def sizes_of(one: Unit, blocks: int = 1000, bytes_per_token: float = 1000.0, rate: float = 1e9) -> Sizes:
    return Sizes(one, one.parallel.ep_size, blocks, bytes_per_token, rate, 3e-6, one.parallel.ep_size)


def world(
    requests: Requests,
    sizes: tuple[Sizes, ...],
    policy: Fake | None = None,
    *,
    duration_s: float = 1.0,
    faults: tuple[Fault, ...] = (),
    slo: Slo | None = None,
    warmup_s: float = 0.0,
) -> World:
    serving = Serving(
        requests=Nobody(),
        duration_s=duration_s,
        warmup_s=warmup_s,
        units=tuple(size.unit for size in sizes),
        faults=faults,
        slo=slo or Slo(),
    )
    return World(serving, sizes, requests, policy or Fake(), 3)


def serve(requests: Requests, *sizes: Sizes, policy: Fake | None = None, **more: object) -> Finished:
    return world(requests, sizes, policy, **more).run()  # type: ignore[arg-type]


def lindley(arrival_ps: I64, service_ps: I64) -> I64:
    """Waits of a queue with one server, first come first served: W' = max(0, W + S - gap)."""
    waits = np.zeros(len(arrival_ps), np.int64)
    for i in range(1, len(waits)):
        waits[i] = max(0, waits[i - 1] + service_ps[i - 1] - (arrival_ps[i] - arrival_ps[i - 1]))
    return waits


def kiefer_wolfowitz(arrival_ps: I64, service_ps: I64, servers: int) -> I64:
    """Waits with ``servers`` servers: the sorted vector of their remaining work."""
    work = np.zeros(servers, np.int64)
    waits = np.zeros(len(arrival_ps), np.int64)
    for i, service in enumerate(service_ps):
        if i:
            work = np.maximum(work - (arrival_ps[i] - arrival_ps[i - 1]), 0)
        waits[i] = work[0]
        work[0] += service
        work.sort()
    return waits


@dataclass
class _Plain:
    """A request of the plain model."""

    number: int
    arrival: int
    inputs: int
    outputs: int
    given: int = 0
    prompt: int = 0
    computed: int = 0
    decoding: bool = False
    context: int = 0
    blocks: int = 0
    first: int = -1
    end: int = -1
    preemptions: int = 0


def plain_rank(requests: Requests, one: Unit, capacity: int, clock: Clock) -> list[_Plain]:
    """One rank, token by token and request by request, after the rules of the scheduler."""
    columns = (requests.arrival_ps, requests.input_tokens, requests.output_tokens)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    coming = [_Plain(i, *row) for i, row in enumerate(rows)]
    found, now = list(coming), 0
    rank = _Rank(one, capacity)
    for request in coming:
        request.prompt = request.inputs
    while coming or rank.waiting or rank.running:
        if not rank.waiting and not rank.running:
            now = max(now, coming[0].arrival)
        while coming and coming[0].arrival <= now:
            rank.waiting.append(coming.pop(0))
        chunks, stepping = rank.schedule()
        pairs = sum(n * r.computed + n * (n + 1) / 2 for r, n in chunks if n > 1)
        sampled = len(stepping) + sum(r.computed + n == r.prompt for r, n in chunks)
        tokens = len(stepping) + sum(n for _, n in chunks)
        context = sum(r.context for r in stepping) + sum(r.computed + 1 for r, n in chunks if n == 1)  # as a decode
        now += clock.duration(len(stepping) + len(chunks), tokens, context, pairs, sampled)
        for request in stepping:
            request.given += 1
        for request, n in chunks:
            request.computed += n
            if request.computed == request.prompt:
                request.given += 1
                request.decoding, request.context = True, request.prompt
                request.first = now if request.first < 0 else request.first
        for request in list(rank.running):
            if request.given == request.outputs:
                request.end = now
                rank.running.remove(request)
    return found


@dataclass
class _Rank:
    unit: Unit
    capacity: int
    waiting: list[_Plain] = field(default_factory=list)
    running: list[_Plain] = field(default_factory=list)

    def schedule(self) -> tuple[list[tuple[_Plain, int]], list[_Plain]]:
        """Return the prompts of the next iteration with their new tokens, and the decodes."""
        if self.unit.chunked_prefill:
            stepping = self.grow()
            return self.fill(self.unit.max_num_batched_tokens - len(stepping)), stepping
        chunks = self.fill(self.unit.max_num_batched_tokens)
        return chunks, [] if chunks else self.grow()

    def blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.unit.block_size)

    def used(self) -> int:
        return sum(request.blocks for request in self.running)

    def grow(self) -> list[_Plain]:
        while True:
            wanted = sum(self.blocks_of(r.context + 1) - r.blocks for r in self.running if r.decoding)
            if self.used() + wanted <= self.capacity:
                break
            last = self.running.pop()
            last.prompt, last.computed, last.blocks, last.decoding = last.inputs + last.given, 0, 0, False
            last.preemptions += 1
            self.waiting.insert(0, last)
        stepping = [request for request in self.running if request.decoding]
        for request in stepping:
            request.context += 1
            request.blocks = self.blocks_of(request.context)
        return stepping

    def fill(self, budget: int) -> list[tuple[_Plain, int]]:
        chunks: list[tuple[_Plain, int]] = []
        partial, whole = [r for r in self.running if not r.decoding], not self.unit.chunked_prefill
        while budget > 0:
            if partial:
                request = partial.pop(0)
            elif self.waiting and len(self.running) < self.unit.max_num_seqs:
                request = self.waiting[0]
                too_long = whole and chunks and request.prompt > budget
                if too_long or self.used() + self.blocks_of(request.prompt) > self.capacity:
                    break
                self.running.append(self.waiting.pop(0))
                request.blocks = self.blocks_of(request.prompt)
            else:
                break
            left = request.prompt - request.computed
            most = self.unit.long_prefill_token_threshold or budget
            chunks.append((request, left if whole else min(left, budget, most)))
            budget -= chunks[-1][1]
        return chunks
