"""The decodes of a group's data-parallel ranks as sums: what an iteration costs does not grow with their number.

What a request will need and when it ends is written down when it joins, in ring buffers over coming steps: new cache
blocks, tokens, endings. A step then reads one row of each. Ranks step together unless some of them rest: a rank's own
step is the group's less the steps for which it rested.
"""

from __future__ import annotations

import heapq

import numpy as np

from sim.engine.serving.request import Request
from sim.tokens import I64, Bool

_FIRST_HORIZON = 1024  # steps that the rings cover at first; a power of two
_NOBODY = -(1 << 60)


class Decodes:
    """Decodes of D ranks.

    n, count, context: requests that decode, in all and [D], and [D] tokens of their contexts. topics: [topics] of the
    requests. block_size: tokens of a cache block. tokens_per_step: expected tokens of a request's step.
    """

    def __init__(self, n_ranks: int, n_topics: int, block_size: int, tokens_per_step: float, context: I64) -> None:
        self.n = 0
        self.count = np.zeros(n_ranks, dtype=np.int64)
        self.context = context
        self.topics = np.zeros(n_topics, dtype=np.int64)
        self._block_size, self._pace = block_size, tokens_per_step
        self._ranks = np.arange(n_ranks)
        self._step = 0
        self._rested = np.zeros(n_ranks, dtype=np.int64)
        self._even = True  # nobody has rested yet
        self._horizon = _FIRST_HORIZON
        self._blocks, self._ends = (np.zeros((self._horizon, n_ranks), dtype=np.int64) for _ in range(2))
        # Without speculation every decode brings one token, so the count says it all.
        self._tokens = np.zeros((self._horizon, n_ranks), dtype=np.int64) if tokens_per_step > 1 else None
        self._ending: list[dict[int, list[Request]]] = [{} for _ in range(n_ranks)]
        # Longest contexts first: all grow alike, so their order stays; entries of those that left are skipped.
        self._heaps: list[list[tuple[int, int, Request]]] = [[] for _ in range(n_ranks)]
        self._longest = np.full(n_ranks, _NOBODY, dtype=np.int64)
        self._joins = 0

    def _step_of(self, rank: int) -> int:
        return self._step - int(self._rested[rank])

    def _row(self, ring: I64) -> I64:
        """[D] what the next step of every rank finds in ``ring``; a view while all ranks step together."""
        if self._even:
            row: I64 = ring[self._step & (self._horizon - 1)]
            return row
        gathered: I64 = ring[(self._step - self._rested) & (self._horizon - 1), self._ranks]
        return gathered

    def join(self, rank: int, request: Request) -> None:
        """Let ``request``, whose cache holds its prompt, decode from the next step on."""
        step = self._step_of(rank)
        request.context, request.joined_step = request.prompt, step
        left = request.output_tokens - request.generated
        if request.accepted is None:
            request.iterations = left
        else:
            request.iterations = int(np.searchsorted(np.cumsum(request.accepted), left)) + 1
        if request.iterations > self._horizon:
            self._widen(request.iterations)
        self._joins += 1
        request.joined = self._joins
        self.n += 1
        self.count[rank] += 1
        self.context[rank] += request.prompt
        self.topics[request.topic] += 1
        self._write(rank, request, 0, 1)
        last = step + request.iterations - 1
        self._ending[rank].setdefault(last, []).append(request)
        self._ends[last & (self._horizon - 1), rank] += 1
        heapq.heappush(self._heaps[rank], (int(step * self._pace) - request.prompt, request.joined, request))
        self._see_longest(rank)

    def _write(self, rank: int, request: Request, done: int, sign: int) -> None:
        """Add (or take back) what the request's steps from its ``done``-th on need."""
        mask, start, n = self._horizon - 1, request.joined_step, request.iterations
        if self._tokens is None:
            first = -request.context % self._block_size  # the step whose token opens a block
            if done > first:
                first += -(-(done - first) // self._block_size) * self._block_size
            self._blocks[np.arange(start + first, start + n, self._block_size) & mask, rank] += sign
            return
        brought = self._brought(request)
        held = -(-(request.context + np.concatenate(([0], np.cumsum(brought)))) // self._block_size)
        where = np.arange(start + done, start + n) & mask
        self._blocks[where, rank] += sign * np.diff(held)[done:]
        self._tokens[where, rank] += sign * brought[done:]

    def _brought(self, request: Request) -> I64:
        """[iterations] tokens of each step; of the last one what is asked for."""
        assert request.accepted is not None
        brought = request.accepted[: request.iterations].copy()
        brought[-1] -= int(brought.sum()) - (request.most_tokens - request.context)
        return brought

    def leave(self, rank: int, request: Request) -> None:
        """Take ``request`` out before its end; the tokens of its steps so far are added to ``generated``."""
        done = self._step_of(rank) - request.joined_step
        self._write(rank, request, done, -1)
        last = request.joined_step + request.iterations - 1
        self._ending[rank][last].remove(request)
        self._ends[last & (self._horizon - 1), rank] -= 1
        if request.accepted is None:
            brought = done
        else:
            brought = int(self._brought(request)[:done].sum())
            request.accepted = request.accepted[done:]
        request.generated += brought
        self._forget(rank, request, request.context + brought)

    def _forget(self, rank: int, request: Request, context: int) -> None:
        request.joined = -1
        self.n -= 1
        self.count[rank] -= 1
        self.context[rank] -= context
        self.topics[request.topic] -= 1
        self._see_longest(rank)

    def _see_longest(self, rank: int) -> None:
        heap = self._heaps[rank]
        while heap and heap[0][2].joined != heap[0][1]:
            heapq.heappop(heap)
        self._longest[rank] = -heap[0][0] if heap else _NOBODY

    def longest(self) -> I64:
        """[D] the longest context of the next step; with speculation by the mean pace, kept only on average."""
        steps = self._step + 1 if self._even else self._step + 1 - self._rested
        found: I64 = np.maximum(self._longest + np.asarray(steps * self._pace).astype(np.int64), 0)
        return found

    def new_blocks(self) -> I64:
        """[D] cache blocks that the next step opens; not to be written to."""
        return self._row(self._blocks)

    def new_tokens(self) -> I64:
        """[D] tokens that the next step brings; not to be written to."""
        return self.count if self._tokens is None else self._row(self._tokens)

    def advance(self, resting: Bool | None) -> list[tuple[int, Request]]:
        """Do one step on all ranks but those ``resting`` [D]; return the requests that end, with their rank. The step's
        tokens were added to ``context`` when it began."""
        mask = self._horizon - 1
        if self._even and resting is None:
            row = self._step & mask
            ends = self._ends[row]
            ending = np.flatnonzero(ends).tolist() if ends.any() else []
            where: tuple[int] | tuple[I64, I64] = (row,)
        else:
            ranks = self._ranks if resting is None else np.flatnonzero(~resting)
            where = ((self._step - self._rested[ranks]) & mask, ranks)
            ending = ranks[self._ends[where] > 0].tolist()
        found = [(rank, request) for rank in ending for request in self._ending[rank].pop(self._step_of(rank))]
        for ring in (self._blocks, self._ends, self._tokens):
            if ring is not None:
                ring[where] = 0
        self._step += 1
        if resting is not None:  # what they were to do in this step, they do in the next one
            self._rested += resting
            self._even = False
        for rank, request in found:
            request.generated = request.output_tokens
            self._forget(rank, request, request.most_tokens)
        return found

    def _widen(self, needed: int) -> None:
        """Let the rings cover ``needed`` steps."""
        old = self._horizon
        while self._horizon < needed:
            self._horizon *= 2
        steps = (self._step - self._rested) + np.arange(old)[:, None]

        def wider(ring: I64) -> I64:
            new = np.zeros((self._horizon, len(self._ranks)), dtype=np.int64)
            new[steps & (self._horizon - 1), self._ranks] = ring[steps & (old - 1), self._ranks]
            return new

        self._blocks, self._ends = wider(self._blocks), wider(self._ends)
        self._tokens = None if self._tokens is None else wider(self._tokens)
