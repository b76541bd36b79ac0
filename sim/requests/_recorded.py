"""What recorded requests have in common: a file of the user, where to start in it, and how fast to play it."""

from __future__ import annotations

import functools
import os
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from sim.digest import digest
from sim.requests import PrefixTree, Requests, RequestSource
from sim.requests._generated import LONGEST_S, draw_topics
from sim.rng import stream
from sim.tokens import F64, I32, I64
from sim.units import Seconds, to_ps


@dataclass(frozen=True)
class Rows:
    """The requests of a file, in its order.

    seconds: [n] float64 from any origin. input_tokens, output_tokens: [n] int64. topic: [n] int64 or None. prefix: [n]
    int32, prefix_tokens: [n] int64 and tree as in `Requests`, or None.
    """

    seconds: F64
    input_tokens: I64
    output_tokens: I64
    topic: I64 | None = None
    prefix: I32 | None = None
    prefix_tokens: I64 | None = None
    tree: PrefixTree | None = None


class Recorded(RequestSource):
    """Members implement `read`. Where a file ends before the duration, so do its requests."""

    path: str = Field(min_length=1)
    """csv or JSON lines, gzip or not."""
    rate_scale: float = Field(default=1.0, ge=1e-3, le=1e3)
    """Plays the file this many times faster: gaps are divided by it, which keeps their coefficient of variation.
    Leaving out or repeating requests instead would make gaps more or less regular than they were."""
    start_s: Seconds = 0.0
    """Where to begin, in seconds of the file from its first request."""

    @abstractmethod
    def read(self) -> Rows:
        """Return what the file holds. Raises ValueError, one line, naming the file and place of what is wrong."""

    def spread(self, seconds: F64, rng: np.random.Generator) -> F64:
        """Return ascending ``seconds`` moved to within the precision of the file."""
        return seconds

    @property
    def caveats(self) -> tuple[str, ...]:
        return ("requests are one recorded trace: intervals over replicas do not cover other days",)

    def fingerprint(self) -> str:
        return digest(self.path)

    def draw(self, duration_s: float, topic_weights: F64, seed: int, replica: int) -> Requests:
        rows = _read(self, _state(self.path))
        n = len(rows.seconds)
        if rows.topic is not None and int(rows.topic.max()) >= len(topic_weights):
            raise ValueError(
                f"{self.path}: line {int(rows.topic.argmax()) + 2}: topic: expected at most {len(topic_weights) - 1} (the "
                f"traffic has {len(topic_weights)} topics), found {int(rows.topic.max())}"
            )
        order = np.argsort(rows.seconds, kind="stable")
        seconds = rows.seconds[order]
        seconds = self.spread(seconds - seconds[0], stream(seed, "requests", "spread", replica))
        first = int(np.searchsorted(seconds, self.start_s))
        if first == n:
            raise ValueError(
                f"{self.path}: expected requests after start_s = {self.start_s:g}, found none in {seconds[-1]:g} s"
            )
        seconds = (seconds[first:] - self.start_s) / self.rate_scale
        if seconds[-1] > LONGEST_S:
            raise ValueError(f"{self.path}: expected at most {LONGEST_S:g} s at this rate_scale, found {seconds[-1]:g}")
        arrival_ps = to_ps(seconds)
        count = int(np.searchsorted(arrival_ps, to_ps(min(duration_s, LONGEST_S))))
        taken = order[first : first + count]
        topic = draw_topics(topic_weights, n, stream(seed, "requests", "topic", replica))
        return Requests(
            arrival_ps=arrival_ps[:count],
            input_tokens=rows.input_tokens[taken],
            output_tokens=rows.output_tokens[taken],
            topic=topic[taken] if rows.topic is None else rows.topic[taken].astype(np.int32),
            prefix=np.full(count, -1, dtype=np.int32) if rows.prefix is None else rows.prefix[taken],
            prefix_tokens=np.zeros(count, dtype=np.int64) if rows.prefix_tokens is None else rows.prefix_tokens[taken],
            client=np.zeros(count, dtype=np.int32),
            tree=rows.tree,
        )


def _state(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
        return stat.st_mtime_ns, stat.st_size
    except OSError:
        return 0, 0  # `read` says why


@functools.lru_cache(maxsize=4)
def _read(source: Recorded, state: tuple[int, int]) -> Rows:
    """Replicas share what was read, as long as the file stays as it is."""
    return source.read()
