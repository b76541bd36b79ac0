"""Prompts that begin alike: popular prefixes to draw from, and trees of recorded token blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from sim.kernels.elementary import power
from sim.requests import PrefixTree
from sim.requests._lengths import Lengths, TokenCount
from sim.tokens import I32, I64


class SharedPrefix(BaseModel):
    """A request starts, with one probability for all, with one of ``prefixes`` texts (system prompts, documents).

    The n-th has weight n^-zipf; each has one length, drawn once. The probability is such that ``share`` of all input
    tokens lie in prefixes: what a cache finds that keeps them all, but for the first request of each. A simple model:
    no conversations that grow, no prefix that continues another; recorded traces have those.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    share: float = Field(gt=0, lt=1)
    """Of all input tokens, those that lie in prefixes."""
    tokens: TokenCount
    """Length of a prefix; a request shorter than its prefix shares all but its last token."""
    prefixes: int = Field(default=100, gt=0, le=1_000_000)
    """How many there are."""
    zipf: float = Field(default=1.0, ge=0, le=4)
    """Exponent of their popularity; 0: equal."""

    def draw(self, input_tokens: I64, law: Lengths, rng: Callable[[str], np.random.Generator]) -> tuple[I32, I64]:
        """Return prefix [n] int32 and prefix_tokens [n] int64 of requests whose ``input_tokens`` follow ``law``.

        Raises ValueError if even with a prefix in every request the share is not reached.
        """
        lengths = self.tokens.draw(self.prefixes, rng("prefix lengths"))
        upto = np.cumsum(power(np.arange(1.0, self.prefixes + 1), -self.zipf))
        weights = np.diff(upto, prepend=0.0) / upto[-1]
        inputs = law.grid()
        # Mean of min(length, input - 1) over inputs: those that are shorter, and the prefix's own length for the others.
        sums = np.concatenate([[0], np.cumsum(inputs - 1)])
        shorter = np.searchsorted(inputs - 1, lengths)
        mean = (sums[shorter] + lengths * (len(inputs) - shorter)) / len(inputs)
        reach = float((weights * mean).sum() / inputs.mean())
        if reach < self.share:
            raise ValueError(
                f"prefix.tokens: expected prefixes long enough for a share of {self.share} of input tokens, "
                f"found at most {reach:.3g}"
            )
        n = len(input_tokens)
        chosen = np.searchsorted(upto / upto[-1], rng("prefix").random(n), side="right")
        tokens = np.minimum(lengths[chosen], input_tokens - 1)
        tokens[rng("prefix use").random(n) >= self.share / reach] = 0
        return np.where(tokens > 0, chosen, -1).astype(np.int32), tokens


def block_tree(blocks: Sequence[Sequence[int]], block_tokens: int) -> tuple[I32, PrefixTree]:
    """Return each request's prefix [n] int32 and the tree of prefixes, from lists of block ids.

    Two requests share their first blocks as far as the ids agree. A request's prefix is the longest that any other
    request of the lists has too, -1 if none; runs of blocks that always come together are one prefix.
    """
    child: dict[tuple[int, int], int] = {}
    parents: list[int] = []
    visits: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    for ids in blocks:
        node = -1
        for depth, block in enumerate(ids, start=1):
            found = child.get((node, block))
            if found is None:
                found = child[node, block] = len(parents)
                parents.append(node)
                visits.append(0)
                depths.append(depth)
            visits[found] += 1
            node = found
        ends.append(node)
    ends = [_shared_ancestor(node, parents, visits) for node in ends]
    parent, count = np.array(parents, dtype=np.int64), np.array(visits, dtype=np.int64)
    kept = count > 1
    inner = np.flatnonzero(parent >= 0)
    kept[parent[inner[count[inner] == count[parent[inner]]]]] = False
    number = np.cumsum(kept) - 1
    above = parent.copy()
    for node in range(len(parents)):  # parents come before children: one pass finds the nearest kept one
        if above[node] >= 0 and not kept[above[node]]:
            above[node] = above[above[node]]
    up = above[kept]
    tree = PrefixTree(
        parent=np.where(up >= 0, number[up], -1).astype(np.int32),
        tokens=np.array(depths, dtype=np.int64)[kept] * block_tokens,
    )
    prefix = np.append(number, -1)[np.array(ends, dtype=np.int64)]  # the last entry serves requests without
    return prefix.astype(np.int32), tree


def _shared_ancestor(node: int, parents: list[int], visits: list[int]) -> int:
    while node >= 0 and visits[node] < 2:
        node = parents[node]
    return node
