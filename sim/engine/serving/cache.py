"""Cache blocks of a group's data-parallel ranks: those of its requests, and prefixes that stay for later ones."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from sim.engine.serving.request import Request, Span
from sim.engine.serving.store import Store
from sim.tokens import I64


class _Prefix:
    """blocks: of the prefix, cached. users: requests, and how many of these, the first ones, each stands on. pinned: the
    most of any."""

    __slots__ = ("blocks", "pinned", "users")

    def __init__(self) -> None:
        self.blocks = self.pinned = 0
        self.users: dict[Request, int] = {}


class Blocks:
    """Cache blocks of D ranks; whoever takes one gives it back.

    capacity: blocks of a rank. used: [D] held by requests. idle: [D] of cached prefixes that no request stands on,
    evicted when room is short, least recently used prefix first, its end before its beginning. used + idle never exceeds
    capacity. store: a cache beside the ranks; hits of it are copied into blocks of the request's own.
    """

    def __init__(
        self, n_ranks: int, capacity: int, block_size: int, *, caching: bool, store: Store | None = None
    ) -> None:
        self.capacity, self.block_size, self.caching, self.store = capacity, block_size, caching, store
        self.used = np.zeros(n_ranks, dtype=np.int64)
        self.idle = np.zeros(n_ranks, dtype=np.int64)
        self._prefixes: list[OrderedDict[int, _Prefix]] = [OrderedDict() for _ in range(n_ranks)]

    def of(self, tokens: int) -> int:
        """Blocks that ``tokens`` fill."""
        return -(-tokens // self.block_size)

    def take_all(self, wanted: I64) -> I64:
        """Take ``wanted`` [D] blocks on all ranks, evicting idle ones if need be; return the ranks that have no room. If
        there are any, nothing is taken."""
        used = self.used + wanted
        if int(used.max()) > self.capacity:
            return np.flatnonzero(used > self.capacity)
        if self.caching:
            over = used + self.idle - self.capacity
            for rank in np.flatnonzero(over > 0).tolist():
                self._evict(rank, int(over[rank]))
        self.used[:] = used
        return used[:0]

    def take(self, rank: int, n: int) -> bool:
        """Take ``n`` blocks of ``rank``, evicting idle ones if need be; False, and nothing taken, without room."""
        used = int(self.used[rank]) + n
        if used > self.capacity:
            return False
        over = used + int(self.idle[rank]) - self.capacity
        if over > 0:
            self._evict(rank, over)
        self.used[rank] = used
        return True

    def _blocks(self, span: Span) -> int:
        """Whole blocks of a prefix's part of a request."""
        return span[2] // self.block_size - span[1] // self.block_size

    def admit(self, rank: int, request: Request) -> bool:
        """Take the blocks of the request's prompt; what is cached of it counts as computed. False without room."""
        hits: list[tuple[int, _Prefix, int]] = []
        for span in request.path if self.caching else ():
            prefix = self._prefixes[rank].get(span[0])
            wanted = self._blocks(span)
            hit = 0 if prefix is None else min(wanted, prefix.blocks)
            if prefix is not None and hit:
                hits.append((span[0], prefix, hit))
            if hit < wanted:
                break
        found = sum(hit for _, _, hit in hits)
        newly = sum(max(0, hit - prefix.pinned) for _, prefix, hit in hits)
        wanted = self.of(request.prompt) - found
        if int(self.used[rank]) + newly + wanted > self.capacity:
            return False
        for _, prefix, hit in hits:
            self._pin(rank, prefix, request, hit)
        self.take(rank, wanted)
        request.own, request.shared = wanted, tuple(key for key, _, _ in hits)
        request.computed = found * self.block_size if self.store is None else self.store.find(request)
        return True

    def _pin(self, rank: int, prefix: _Prefix, request: Request, blocks: int) -> None:
        prefix.users[request] = blocks
        newly = blocks - prefix.pinned
        if newly > 0:
            prefix.pinned = blocks
            self.used[rank] += newly
            self.idle[rank] -= newly

    def keep(self, rank: int, request: Request) -> None:
        """The request's prompt has been computed: let its prefixes stay for later requests."""
        if self.store is not None:
            self.store.keep(request)
        for span in request.path if self.caching else ():
            whole = self._blocks(span)
            if not whole:
                continue
            prefix = self._prefixes[rank].setdefault(span[0], _Prefix())
            longer = whole - prefix.blocks
            if longer > 0:  # the request's own copy of the rest becomes everybody's
                request.own -= longer
                self.used[rank] -= longer
                self.idle[rank] += longer
                prefix.blocks = whole
                if span[0] not in request.shared:
                    request.shared += (span[0],)
                self._pin(rank, prefix, request, whole)
        self._touch(rank, request)

    def _touch(self, rank: int, request: Request) -> None:
        """The request's prefixes are the ones used last, shorter ones after those that continue them."""
        known = self._prefixes[rank]
        for span in reversed(request.path):
            if span[0] in known:
                known.move_to_end(span[0])

    def release(self, rank: int, request: Request) -> None:
        """Give back all blocks of ``request``; its prefixes stay."""
        self.used[rank] -= request.own
        for key in request.shared:
            prefix = self._prefixes[rank][key]
            if prefix.users.pop(request) == prefix.pinned:  # what nobody stands on any more may be evicted
                left = max(prefix.users.values(), default=0)
                self.used[rank] -= prefix.pinned - left
                self.idle[rank] += prefix.pinned - left
                prefix.pinned = left
        if request.shared:
            self._touch(rank, request)
        request.own, request.shared, request.computed = 0, (), 0

    def forget(self, rank: int) -> None:
        """Drop the cached prefixes of ``rank``, which no request may use."""
        self._prefixes[rank].clear()
        self.idle[rank] = 0

    def _evict(self, rank: int, blocks: int) -> None:
        self.idle[rank] -= blocks
        for key in list(self._prefixes[rank]):
            prefix = self._prefixes[rank][key]
            gone = min(blocks, prefix.blocks - prefix.pinned)
            prefix.blocks -= gone
            blocks -= gone
            if not prefix.blocks and not prefix.users:
                del self._prefixes[rank][key]
            if not blocks:
                return
