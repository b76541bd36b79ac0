"""The decodes of a group's data-parallel ranks as sums: what an iteration costs does not grow with their number.

Every rank counts its own decode steps. What a request will need and when it ends is written down when it joins, in ring
buffers over coming steps: new cache blocks, tokens, endings. A step then reads one column of each.
"""

from __future__ import annotations

import heapq

import numpy as np

from sim.engine.serving.request import Request
from sim.tokens import F64, I64, Bool

_FIRST_HORIZON = 1024  # steps that the rings cover at first; a power of two


class Decodes:
    """Decodes of D ranks.

    count, context: [D] int64 requests that decode, and tokens of their contexts. step: [D] decode steps done.
    block_size: tokens of a cache block. tokens_per_step: expected tokens of a request's step.
    """

    def __init__(self, n_ranks: int, n_topics: int, block_size: int, tokens_per_step: float, context: I64) -> None:
        self.count = np.zeros(n_ranks, dtype=np.int64)
        self.context = context
        self.step = np.zeros(n_ranks, dtype=np.int64)
        self.topics = np.zeros(n_topics, dtype=np.int64)
        self._block_size, self._pace = block_size, tokens_per_step
        self._ranks = np.arange(n_ranks)
        self._horizon = _FIRST_HORIZON
        self._blocks = np.zeros((n_ranks, self._horizon), dtype=np.int32)
        self._ends = np.zeros((n_ranks, self._horizon), dtype=np.int32)
        # Without speculation every decode brings one token, so the count says it all.
        self._tokens = np.zeros((n_ranks, self._horizon), dtype=np.int32) if tokens_per_step > 1 else None
        self._ending: list[dict[int, list[Request]]] = [{} for _ in range(n_ranks)]
        # Longest contexts first: all grow alike, so their order stays; entries of those that left are skipped.
        self._heaps: list[list[tuple[float, int, Request]]] = [[] for _ in range(n_ranks)]
        self._longest: F64 = np.full(n_ranks, -np.inf)
        self._joins = 0

    def join(self, rank: int, request: Request) -> None:
        """Let ``request``, whose cache holds its prompt, decode from the next step on."""
        step = int(self.step[rank])
        request.context, request.joined_step = request.prompt, step
        left = request.output_tokens - request.generated
        if request.accepted is None:
            request.iterations = left
        else:
            brought = np.cumsum(request.accepted)
            request.iterations = int(np.searchsorted(brought, left)) + 1
        if request.iterations > self._horizon:
            self._widen(request.iterations)
        self._joins += 1
        request.joined = self._joins
        self.count[rank] += 1
        self.context[rank] += request.prompt
        self.topics[request.topic] += 1
        self._write(rank, request, 0, 1)
        last = step + request.iterations - 1
        self._ending[rank].setdefault(last, []).append(request)
        self._ends[rank, last & (self._horizon - 1)] += 1
        heapq.heappush(self._heaps[rank], (step * self._pace - request.prompt, request.joined, request))
        self._see_longest(rank)

    def _write(self, rank: int, request: Request, done: int, sign: int) -> None:
        """Add (or take back) what the request's steps from its ``done``-th on need."""
        mask, start, n = self._horizon - 1, request.joined_step, request.iterations
        if self._tokens is None:
            first = -request.context % self._block_size  # the step whose token opens a block
            if done > first:
                first += -(-(done - first) // self._block_size) * self._block_size
            self._blocks[rank, np.arange(start + first, start + n, self._block_size) & mask] += sign
            return
        brought = self._brought(request)
        held = -(-(request.context + np.concatenate(([0], np.cumsum(brought)))) // self._block_size)
        where = np.arange(start + done, start + n) & mask
        self._blocks[rank, where] += sign * np.diff(held)[done:].astype(np.int32)
        self._tokens[rank, where] += sign * brought[done:].astype(np.int32)

    def _brought(self, request: Request) -> I64:
        """[iterations] tokens of each step; of the last one what is asked for."""
        assert request.accepted is not None
        brought = request.accepted[: request.iterations].copy()
        brought[-1] -= int(brought.sum()) - (request.most_tokens - request.context)
        return brought

    def leave(self, rank: int, request: Request) -> None:
        """Take ``request`` out before its end; its tokens so far are in ``generated``."""
        done = int(self.step[rank]) - request.joined_step
        self._write(rank, request, done, -1)
        last = request.joined_step + request.iterations - 1
        self._ending[rank][last].remove(request)
        self._ends[rank, last & (self._horizon - 1)] -= 1
        if request.accepted is None:
            brought = done
        else:
            brought = int(self._brought(request)[:done].sum())
            request.accepted = request.accepted[done:]
        request.generated += brought
        self._forget(rank, request, request.context + brought)

    def _forget(self, rank: int, request: Request, context: int) -> None:
        request.joined = -1
        self.count[rank] -= 1
        self.context[rank] -= context
        self.topics[request.topic] -= 1
        self._see_longest(rank)

    def _see_longest(self, rank: int) -> None:
        heap = self._heaps[rank]
        while heap and heap[0][2].joined != heap[0][1]:
            heapq.heappop(heap)
        self._longest[rank] = -heap[0][0] if heap else -np.inf

    def longest(self) -> I64:
        """[D] the longest context of the next step; with speculation by the mean pace, kept only on average."""
        grown = np.maximum(self._longest + (self.step + 1) * self._pace, 0.0)
        return np.rint(grown).astype(np.int64)

    def new_blocks(self) -> I64:
        """[D] cache blocks that the next step opens."""
        found: I64 = self._blocks[self._ranks, self.step & (self._horizon - 1)].astype(np.int64)
        return found

    def new_tokens(self) -> I64:
        """[D] tokens that the next step brings."""
        if self._tokens is None:
            return self.count
        found: I64 = self._tokens[self._ranks, self.step & (self._horizon - 1)].astype(np.int64)
        return found

    def advance(self, active: Bool, brought: I64) -> list[tuple[int, Request]]:
        """Do one step on the ranks ``active`` [D], whose contexts had ``brought`` [D] tokens added when it began; return
        those that end, with their rank."""
        column = self.step & (self._horizon - 1)
        ends = self._ends[self._ranks, column]
        ending = np.flatnonzero((ends > 0) & active)
        self._blocks[self._ranks[active], column[active]] = 0
        if self._tokens is not None:
            self._tokens[self._ranks[active], column[active]] = 0
        found: list[tuple[int, Request]] = []
        for rank in ending.tolist():
            done = self._ending[rank].pop(int(self.step[rank]))
            self._ends[rank, column[rank]] = 0
            found += [(rank, request) for request in done]
        self.step += active
        for rank, request in found:
            request.generated = request.output_tokens
            self._forget(rank, request, request.most_tokens)
        return found

    def _widen(self, needed: int) -> None:
        """Let the rings cover ``needed`` steps."""
        old, ranks = self._horizon, self._ranks[:, None]
        while self._horizon < needed:
            self._horizon *= 2
        steps = self.step[:, None] + np.arange(old)

        def wider(ring: np.ndarray) -> np.ndarray:
            new = np.zeros((len(self.step), self._horizon), dtype=np.int32)
            new[ranks, steps & (self._horizon - 1)] = ring[ranks, steps & (old - 1)]
            return new

        self._blocks, self._ends = wider(self._blocks), wider(self._ends)
        self._tokens = None if self._tokens is None else wider(self._tokens)
