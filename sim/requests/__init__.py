"""Who asks, when, about what, and how much: requests for a serving run. Knows nothing about models, gates or time spent.

A member is a config; `draw` makes the requests of one replica, a pure function of (seed, replica), so every policy
serves the same ones.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from sim.plugin import Plugin
from sim.tokens import F64, I32, I64


@dataclass(frozen=True)
class Requests:
    """n requests in the order of their arrival.

    arrival_ps: [n] int64, ascending. input_tokens, output_tokens: [n] int64, at least 1. topic: [n] int32, index into the
    traffic's topics. prefix: [n] int32, which shared prefix a request starts with, -1 for none; requests of one prefix
    share their first ``prefix_tokens`` [n] int64 input tokens (less than input_tokens) with all earlier ones that are
    as long. client: [n] int32.
    """

    arrival_ps: I64
    input_tokens: I64
    output_tokens: I64
    topic: I32
    prefix: I32
    prefix_tokens: I64
    client: I32

    def __len__(self) -> int:
        return len(self.arrival_ps)


class RequestSource(Plugin):
    """A stream of requests."""

    @abstractmethod
    def draw(self, duration_s: float, topic_weights: F64, seed: int, replica: int) -> Requests:
        """Return all requests that arrive before ``duration_s``.

        topic_weights: [topics] float64, summing to 1: of the traffic, for sources that name no topics. Raises
        ValueError, one line, for a trace that cannot serve.
        """


__all__ = ["RequestSource", "Requests"]
