"""All data-parallel ranks of all units side by side, and the router that spreads requests over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.deployment import Unit
from sim.engine.serving.request import Request
from sim.tokens import I64, Bool


@dataclass(frozen=True)
class Sizes:
    """What a unit comes down to: unit, its block of the scenario. n_ranks: attention data-parallel ranks of a group.
    capacity_blocks: cache blocks of a rank. kv_bytes_per_token: of a rank's whole cache. port_bytes_per_s: of a rank's
    network ports together. latency_s: from unit to unit. devices: of a group."""

    unit: Unit
    n_ranks: int
    capacity_blocks: int
    kv_bytes_per_token: float
    port_bytes_per_s: float
    latency_s: float
    devices: int

    @property
    def capacity_tokens(self) -> int:
        """Tokens of cache of a rank."""
        return self.capacity_blocks * self.unit.block_size


class Fleet:
    """Arrays over all R ranks; a rank's number is its place. Groups hold views of them.

    unit, group: [R] numbers. requests: [R] waiting or running. waiting: [R] of them waiting. prompt_tokens, context: [R]
    tokens of prompts that wait or are computed, and of the contexts of decodes. alive, ready: [R] whether a rank lives,
    and its group serves. decode_alone: no unit computes prompts: they come with their cache. sent_ps, received_ps: [R]
    when its port is free again. slow: [R] factor on its port's time.
    """

    def __init__(self, sizes: Sequence[Sizes]) -> None:
        ranks = [(u, size.n_ranks) for u, size in enumerate(sizes) for _ in range(size.unit.count)]
        self.sizes = sizes
        self.unit = np.repeat([u for u, _ in ranks], [n for _, n in ranks])
        self.group = np.repeat(np.arange(len(ranks)), [n for _, n in ranks])
        n = len(self.unit)
        self.requests, self.waiting, self.prompt_tokens, self.context, self.sent_ps, self.received_ps = (
            np.zeros(n, dtype=np.int64) for _ in range(6)
        )
        self.alive, self.ready, self.slow = np.ones(n, bool), np.ones(n, bool), np.ones(n)
        self._blocks = np.array([sizes[u].capacity_blocks for u in self.unit], dtype=np.int64)
        self._block_size = np.array([sizes[u].unit.block_size for u in self.unit], dtype=np.int64)
        roles = np.array([sizes[u].unit.role for u in self.unit])
        self.decode_alone = bool((roles == "decode").all())
        self._takes: dict[str, Bool] = {"prompt": (roles != "decode") | self.decode_alone, "decode": roles == "decode"}
        self._hands_over = roles == "prefill"
        self._turn = {"prompt": -1, "decode": -1}

    def open(self, what: str, request: Request) -> Bool:
        """[R] ranks that may take ``request``: its prompt, and unless it is handed over then, all that it grows to, fit."""
        prompt = request.input_tokens + request.generated
        tokens = np.where(self._hands_over, prompt, request.most_tokens)
        fits = self._takes[what] & self.alive & (-(-tokens // self._block_size) <= self._blocks)
        ready = fits & self.ready
        return ready if ready.any() else fits

    def hands_over(self, place: int) -> bool:
        """Whether prompts computed at ``place`` decode elsewhere."""
        return bool(self._hands_over[place])

    def choose(self, what: str, request: Request, among: Bool | None = None) -> int | None:
        """Return the place for a request, of those ``among`` [R] if given, by the method of the first unit that may take it;
        None if none may."""
        allowed = self.open(what, request)
        found = np.flatnonzero(allowed if among is None else allowed & among)
        if not len(found):
            return None
        method = self.sizes[int(self.unit[found[0]])].unit.load_balance_method
        if method == "round_robin":
            later = found[found > self._turn[what]]
            self._turn[what] = int(later[0] if len(later) else found[0])
            return self._turn[what]
        load: I64 = self.requests if method == "shortest_queue" else self.prompt_tokens + self.context
        return int(found[int(np.argmin(load[found]))])
