"""What generated requests have in common: lengths and topics by distribution, arrivals by the member."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import numpy as np

from sim.requests import MAX_REQUESTS, Requests, RequestSource
from sim.requests._lengths import TokenCount
from sim.requests._prefixes import SharedPrefix
from sim.rng import stream
from sim.tokens import F64, I32, I64
from sim.units import to_ps

Draw = Callable[[str], np.random.Generator]
"""The generator of one named use, of this seed and replica."""
LONGEST_S = 9e6  # int64 picoseconds end at 106 days
_CHUNK = 2**22


class Generated(RequestSource):
    """Members implement `arrive`."""

    input_tokens: TokenCount
    """Lengths of prompts."""
    output_tokens: TokenCount
    """Lengths of answers."""
    prefix: SharedPrefix | None = None
    """Prompts that begin alike; null: none do."""

    @abstractmethod
    def expected(self, duration_s: float) -> float:
        """See `RequestSource`; without drawing any."""

    @abstractmethod
    def arrive(self, duration_s: float, rng: Draw) -> tuple[I64, I32]:
        """Return arrivals [n] int64 in ps, ascending from 0 and before ``duration_s``, and clients [n] int32."""

    def draw(self, duration_s: float, topic_weights: F64, seed: int, replica: int) -> Requests:
        def rng(name: str) -> np.random.Generator:
            return stream(seed, "requests", name, replica)

        arrival_ps, client = self.arrive(duration_s, rng)
        n = len(arrival_ps)
        input_tokens = self.input_tokens.draw(n, rng("input_tokens"))
        if self.prefix is None:
            prefix, prefix_tokens = np.full(n, -1, dtype=np.int32), np.zeros(n, dtype=np.int64)
        else:
            prefix, prefix_tokens = self.prefix.draw(input_tokens, self.input_tokens, rng)
        return Requests(
            arrival_ps=arrival_ps,
            input_tokens=input_tokens,
            output_tokens=self.output_tokens.draw(n, rng("output_tokens")),
            topic=draw_topics(topic_weights, n, rng("topic")),
            prefix=prefix,
            prefix_tokens=prefix_tokens,
            client=client,
        )


def draw_topics(weights: F64, n: int, rng: np.random.Generator) -> I32:
    """Return ``n`` topics, int32, each with the probability of its weight."""
    upto = np.cumsum(weights)
    return np.searchsorted(upto / upto[-1], rng.random(n), side="right").astype(np.int32)


def positions(total: float, first: float, gaps: Callable[[int], F64]) -> F64:
    """Return the points of a renewal process in [0, ``total``), ascending: ``first``, then one gap after the other.

    gaps(n) draws the next n gaps, of mean 1. Raises ValueError where more than `MAX_REQUESTS` points are to be expected.
    """
    check_count(total)
    parts = [np.array([first])]
    last, found = first, 0
    while last < total:
        check_count(found)
        n = min(_CHUNK, int((total - last) + 4 * (total - last) ** 0.5) + 16)
        step = gaps(n)
        step[0] += last  # the sum is one chain of additions, however it is cut
        parts.append(np.cumsum(step))
        last, found = float(parts[-1][-1]), found + n
    joined = np.concatenate(parts)
    return joined[: np.searchsorted(joined, total)]


def check_count(expected: float) -> None:
    """Raise ValueError if ``expected`` requests are too many."""
    if expected > MAX_REQUESTS:
        raise ValueError(f"requests: expected at most {MAX_REQUESTS:,} in one run, found about {expected:,.0f}")


def within(seconds: F64, duration_s: float) -> I64:
    """Return the ascending ``seconds`` in ps, without those that round to ``duration_s`` or more."""
    ps = to_ps(seconds)
    return ps[: np.searchsorted(ps, to_ps(min(duration_s, LONGEST_S)))]


def nobody(arrival_ps: I64) -> tuple[I64, I32]:
    """Return the arrivals with client 0 for all."""
    return arrival_ps, np.zeros(len(arrival_ps), dtype=np.int32)
