"""A prefix cache beside the ranks: what any of a unit has computed, all of them may load."""

from __future__ import annotations

from collections import OrderedDict

from sim.engine.serving.request import Request


class Store:
    """Prefixes that one of a unit's ranks has computed, in whole blocks of ``block_size`` tokens.

    held: {prefix: (first block, end)}. blocks: of all of them, at most ``capacity`` (None: no limit); least recently used
    prefixes go first, their end before their beginning, and those that continue others before these.
    """

    def __init__(self, block_size: int, capacity: int | None) -> None:
        self.block_size, self.capacity = block_size, capacity
        self.held: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self.blocks = 0

    def find(self, request: Request) -> int:
        """Return the tokens, in whole blocks, that the request's prompt finds here; they have been used now."""
        found = 0
        for prefix, begin, end in request.path:
            whole = end // self.block_size
            held = self.held.get(prefix, (0, begin // self.block_size))[1]
            found = max(found, min(whole, held))
            if held < whole:
                break
        self._touch(request)
        return found * self.block_size

    def keep(self, request: Request) -> None:
        """The request's prompt has been computed: its prefixes are there for all that come later."""
        for prefix, begin, end in request.path:
            first, whole = begin // self.block_size, end // self.block_size
            before = self.held.get(prefix, (first, first))[1]
            if whole > before:
                self.held[prefix] = first, whole
                self.blocks += whole - before
        self._touch(request)
        while self.capacity is not None and self.blocks > self.capacity:
            self._evict(self.blocks - self.capacity)

    def _touch(self, request: Request) -> None:
        for prefix, _, _ in reversed(request.path):
            if prefix in self.held:
                self.held.move_to_end(prefix)

    def _evict(self, blocks: int) -> None:
        """Drop up to ``blocks`` of the prefix that comes first."""
        prefix, (first, end) = next(iter(self.held.items()))
        gone = min(blocks, end - first)
        self.blocks -= gone
        self.held[prefix] = first, end - gone  # keeps its turn
        if end - gone == first:
            del self.held[prefix]
