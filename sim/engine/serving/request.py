"""A request on its way through the units, and how many tokens each of its iterations will bring."""

from __future__ import annotations

import numpy as np

from sim.requests import Requests
from sim.rng import stream
from sim.tokens import I64

Span = tuple[int, int, int]


class Request:
    """Mutable state of one request; times in picoseconds, -1 until they happen.

    number, arrival_ps, input_tokens, output_tokens, topic: as in `Requests`. path: the prefixes that it begins with, as
    (prefix, first token, end), one after the other.
    generated: tokens the user has. accepted: [n] int64 tokens that each coming iteration brings, None: one each.
    prompt: tokens whose cache has to be there before the next token, generated ones included after a recomputation.
    computed: of these, how many are there. own: cache blocks held alone. shared: cached prefixes that it stands on.
    since_ps: when the present stage began. queued_ps: all waiting so far. cached_tokens: hit at first admission, -1 before.
    place: index of the rank over all units. joined: token of its stay among the decodes; the rest is `Decodes`' own.
    """

    __slots__ = (
        "accepted", "arrival_ps", "cached_tokens", "computed", "context", "end_ps", "first_ps", "generated",
        "input_tokens", "iterations", "joined", "joined_step", "last_ps", "number", "output_tokens", "own", "path",
        "place", "preemptions", "prompt", "queued_ps", "refused", "retries", "shared", "since_ps", "topic",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        arrival_ps: int,
        input_tokens: int,
        output_tokens: int,
        topic: int,
        path: tuple[Span, ...] = (),
    ) -> None:
        self.number, self.arrival_ps, self.topic, self.path = number, arrival_ps, topic, path
        self.input_tokens, self.output_tokens = input_tokens, output_tokens
        self.generated = self.computed = self.own = self.queued_ps = self.retries = self.preemptions = 0
        self.prompt, self.since_ps = input_tokens, arrival_ps
        self.first_ps = self.last_ps = self.end_ps = self.place = self.joined = self.cached_tokens = -1
        self.refused = False
        self.shared: tuple[int, ...] = ()
        self.accepted: I64 | None = None
        self.context = self.joined_step = self.iterations = 0

    @property
    def most_tokens(self) -> int:
        """Tokens in its cache when its last iteration begins; the last token is never put there."""
        return self.input_tokens + self.output_tokens - 1


def arriving(requests: Requests) -> list[Request]:
    """Return the state of all requests before they arrive."""
    columns = (requests.arrival_ps, requests.input_tokens, requests.output_tokens, requests.topic)
    found = [
        Request(number, *row) for number, row in enumerate(zip(*(column.tolist() for column in columns), strict=True))
    ]
    tree = requests.tree
    for number in np.flatnonzero(requests.prefix >= 0).tolist():
        prefix, tokens, begin, path = int(requests.prefix[number]), int(requests.prefix_tokens[number]), 0, []
        for node in [prefix] if tree is None else tree.path(prefix):
            end = tokens if tree is None else min(tokens, int(tree.tokens[node]))
            path.append((node, begin, end))
            begin = end
        found[number].path = tuple(path)
    return found


class Acceptance:
    """How many tokens each iteration of each request brings: 1 + the proposals accepted before the first rejection.

    Drawn per request from a stream of its own number, so a request brings the same whatever policy serves it.
    """

    def __init__(self, speculative_tokens: int, acceptance: float, seed: int, replica: int) -> None:
        self.most, self.acceptance = speculative_tokens, acceptance
        self.seed, self.replica = seed, replica

    @property
    def mean(self) -> float:
        """Expected tokens of an iteration."""
        return sum(self.acceptance**i for i in range(self.most + 1))

    def draw(self, request: Request) -> I64 | None:
        """Return [n] int64 with sum at least output_tokens - 1; None without speculation."""
        wanted = request.output_tokens - 1
        if not self.most or not wanted:
            return None
        lots = stream(self.seed, "acceptance", self.replica, request.number).random((wanted, self.most))
        accepted: I64 = 1 + (lots < self.acceptance).cumprod(axis=1).sum(axis=1)
        return accepted[: int(np.searchsorted(np.cumsum(accepted), wanted)) + 1]
