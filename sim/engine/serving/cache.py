"""Cache blocks of a group's data-parallel ranks: those of its requests, and prefixes that stay for later ones."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from sim.engine.serving.request import Request
from sim.tokens import I64, Bool


class _Prefix:
    """blocks: of the prefix, cached. pinned: the first of them, which its users stand on. users: requests."""

    __slots__ = ("blocks", "pinned", "users")

    def __init__(self) -> None:
        self.blocks = self.pinned = self.users = 0


class Blocks:
    """Cache blocks of D ranks; whoever takes one gives it back.

    capacity: blocks of a rank. used: [D] held by requests. idle: [D] of cached prefixes that no request stands on,
    evicted when room is short, least recently used prefix first, its end before its beginning. used + idle never exceeds
    capacity.
    """

    def __init__(self, n_ranks: int, capacity: int, block_size: int, caching: bool) -> None:
        self.capacity, self.block_size, self.caching = capacity, block_size, caching
        self.used = np.zeros(n_ranks, dtype=np.int64)
        self.idle = np.zeros(n_ranks, dtype=np.int64)
        self._prefixes: list[OrderedDict[int, _Prefix]] = [OrderedDict() for _ in range(n_ranks)]

    def of(self, tokens: int) -> int:
        """Blocks that ``tokens`` fill."""
        return -(-tokens // self.block_size)

    def short(self, wanted: I64) -> Bool:
        """[D] ranks that cannot give the blocks ``wanted`` [D], even without their idle ones."""
        found: Bool = self.used + wanted > self.capacity
        return found

    def take_all(self, wanted: I64) -> None:
        """Take ``wanted`` [D] blocks, none of them `short`."""
        if self.caching:
            over = self.used + self.idle + wanted - self.capacity
            for rank in np.flatnonzero(over > 0).tolist():
                self._evict(rank, int(over[rank]))
        self.used += wanted

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

    def admit(self, rank: int, request: Request) -> bool:
        """Take the blocks of the request's prompt; what is cached of it counts as computed. False without room."""
        prefix = self._prefixes[rank].get(request.prefix) if self.caching and request.prefix >= 0 else None
        hit = min(request.prefix_tokens // self.block_size, prefix.blocks) if prefix else 0
        newly = max(0, hit - prefix.pinned) if prefix else 0
        wanted = self.of(request.prompt) - hit
        if int(self.used[rank]) + newly + wanted > self.capacity:
            return False
        if prefix and hit:
            self._pin(rank, prefix, hit)
            prefix.users += 1
        self.take(rank, wanted)
        request.own, request.shared = wanted, hit
        request.computed = hit * self.block_size
        return True

    def _pin(self, rank: int, prefix: _Prefix, blocks: int) -> None:
        newly = blocks - prefix.pinned
        if newly > 0:
            prefix.pinned = blocks
            self.used[rank] += newly
            self.idle[rank] -= newly

    def keep(self, rank: int, request: Request) -> None:
        """The request's prompt has been computed: let its prefix stay for later requests."""
        whole = request.prefix_tokens // self.block_size
        if not self.caching or request.prefix < 0 or not whole:
            return
        prefix = self._prefixes[rank].setdefault(request.prefix, _Prefix())
        longer = whole - prefix.blocks
        if longer > 0:  # the request's own copy of the rest becomes everybody's
            request.own -= longer
            self.used[rank] -= longer
            self.idle[rank] += longer
            prefix.blocks = whole
            prefix.users += not request.shared
            request.shared = whole
            self._pin(rank, prefix, whole)
        self._prefixes[rank].move_to_end(request.prefix)

    def release(self, rank: int, request: Request) -> None:
        """Give back all blocks of ``request``; its prefix stays."""
        self.used[rank] -= request.own
        if request.shared:
            prefix = self._prefixes[rank][request.prefix]
            prefix.users -= 1
            if not prefix.users:
                self.used[rank] -= prefix.pinned
                self.idle[rank] += prefix.pinned
                prefix.pinned = 0
            self._prefixes[rank].move_to_end(request.prefix)
        request.own = request.shared = request.computed = 0

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
