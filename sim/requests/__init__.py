"""Who asks, when, about what, and how much: requests for a serving run. Knows nothing about models, gates or time spent.

A member is a config; `draw` makes the requests of one replica, a pure function of (seed, replica), so every policy
serves the same ones. Generated sources draw lengths from distributions and topics from the traffic's weights; recorded
ones read the user's file, whose arrivals and lengths are the same under all seeds and replicas.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from sim.plugin import Plugin
from sim.tokens import F64, I32, I64

MAX_REQUESTS = 2**26
"""Most requests of one source: about 3 GB of arrays."""


@dataclass(frozen=True)
class PrefixTree:
    """Prefixes that continue other prefixes, as the turns of a conversation do.

    parent: [p] int32, the prefix that each one continues, smaller than its own index; -1 for none.
    tokens: [p] int64, length from the start of the input, larger than the parent's.
    """

    parent: I32
    tokens: I64

    def path(self, prefix: int) -> list[int]:
        """Return ``prefix`` and all that it continues, the shortest first."""
        found: list[int] = []
        while prefix >= 0:
            found.append(prefix)
            prefix = int(self.parent[prefix])
        return found[::-1]


@dataclass(frozen=True)
class Requests:
    """n requests in the order of their arrival.

    arrival_ps: [n] int64, ascending. input_tokens, output_tokens: [n] int64, at least 1. topic: [n] int32, index into the
    traffic's topics. prefix: [n] int32, which shared prefix a request starts with, -1 for none; requests of one prefix
    share their first ``prefix_tokens`` [n] int64 input tokens (less than input_tokens) with all earlier ones that are
    as long. client: [n] int32. tree: how prefixes continue each other; None: they do not.

    So two requests share the lesser of their prefix_tokens, and with a tree, if their prefixes differ, at most the
    tokens of the longest prefix that both continue.
    """

    arrival_ps: I64
    input_tokens: I64
    output_tokens: I64
    topic: I32
    prefix: I32
    prefix_tokens: I64
    client: I32
    tree: PrefixTree | None = None

    def __len__(self) -> int:
        return len(self.arrival_ps)

    def reusable_tokens(self) -> I64:
        """Return [n] int64: the first input tokens of each request that some earlier one has too: the hits of a prefix
        cache that is shared by all, forgets nothing and fills at once."""
        if self.tree is not None:
            return _reused_in_tree(self, self.tree)
        order = np.argsort(self.prefix, kind="stable")
        # A running maximum that starts again at every prefix: larger numbers for later ones keep them apart.
        apart = self.prefix[order].astype(np.int64) * (int(self.prefix_tokens.max(initial=0)) + 1)
        longest = np.maximum.accumulate(self.prefix_tokens[order] + apart) - apart
        reused = np.zeros(len(self), dtype=np.int64)
        again = np.flatnonzero(np.diff(self.prefix[order]) == 0) + 1
        reused[order[again]] = np.minimum(longest[again - 1], self.prefix_tokens[order[again]])
        reused[self.prefix < 0] = 0
        return reused


def _reused_in_tree(requests: Requests, tree: PrefixTree) -> I64:
    held = [0] * len(tree.parent)
    reused = np.zeros(len(requests), dtype=np.int64)
    tokens = requests.prefix_tokens.tolist()
    for i, prefix in enumerate(requests.prefix.tolist()):
        path = tree.path(prefix)
        reused[i] = max((min(tokens[i], held[node]) for node in path), default=0)
        for node in path:
            held[node] = max(held[node], min(tokens[i], int(tree.tokens[node])))
    return reused


class RequestSource(Plugin):
    """A stream of requests."""

    def expected(self, duration_s: float) -> float:
        """Return about how many requests arrive before ``duration_s``, for the estimate of a run."""
        return float(len(self.draw(duration_s, np.ones(1), 0, 0)))

    @abstractmethod
    def draw(self, duration_s: float, topic_weights: F64, seed: int, replica: int) -> Requests:
        """Return all requests that arrive before ``duration_s``.

        topic_weights: [topics] float64, summing to 1: of the traffic, for sources that name no topics. A longer
        duration gives the same requests and more. Raises ValueError, one line, for a trace that cannot serve.
        """

    @property
    def caveats(self) -> tuple[str, ...]:
        """Sentences that a report must print beside results made with these requests."""
        return ()

    def fingerprint(self) -> str:
        """Return the SHA-256 of the recorded data behind the requests, or nothing: part of a run's identity."""
        return ""


__all__ = ["MAX_REQUESTS", "PrefixTree", "RequestSource", "Requests"]
