"""A request on its way through the units, and how many tokens each of its iterations will bring."""

from __future__ import annotations

import numpy as np

from sim.requests import Requests
from sim.rng import stream
from sim.tokens import I64


class Request:
    """Mutable state of one request; times in picoseconds, -1 until they happen.

    number, arrival_ps, input_tokens, output_tokens, topic, prefix, prefix_tokens: as in `Requests`.
    generated: tokens the user has. accepted: [n] int64 tokens that each coming iteration brings, None: one each.
    prompt: tokens whose cache has to be there before the next token, generated ones included after a recomputation.
    computed: of these, how many are there. own, shared: cache blocks held alone, and through a cached prefix.
    since_ps: when the present stage began. queued_ps: all waiting so far. cached_tokens: hit at first admission, -1 before.
    place: index of the rank over all units. joined: token of its stay among the decodes; the rest is `Decodes`' own.
    """

    __slots__ = (
        "accepted", "arrival_ps", "cached_tokens", "computed", "context", "end_ps", "first_ps", "generated",
        "input_tokens", "iterations", "joined", "joined_step", "last_ps", "number", "output_tokens", "own", "place",
        "preemptions", "prefix", "prefix_tokens", "prompt", "queued_ps", "refused", "retries", "shared", "since_ps",
        "topic",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        arrival_ps: int,
        input_tokens: int,
        output_tokens: int,
        topic: int,
        prefix: int,
        prefix_tokens: int,
    ) -> None:
        self.number, self.arrival_ps = number, arrival_ps
        self.input_tokens, self.output_tokens, self.topic = input_tokens, output_tokens, topic
        self.prefix, self.prefix_tokens = prefix, prefix_tokens
        self.generated = self.computed = self.own = self.shared = self.queued_ps = self.retries = self.preemptions = 0
        self.prompt, self.since_ps = input_tokens, arrival_ps
        self.first_ps = self.last_ps = self.end_ps = self.place = self.joined = self.cached_tokens = -1
        self.refused = False
        self.accepted: I64 | None = None
        self.context = self.joined_step = self.iterations = 0

    @property
    def most_tokens(self) -> int:
        """Tokens in its cache when its last iteration begins; the last token is never put there."""
        return self.input_tokens + self.output_tokens - 1


def arriving(requests: Requests) -> list[Request]:
    """Return the state of all requests before they arrive."""
    columns = (requests.arrival_ps, requests.input_tokens, requests.output_tokens, requests.topic, requests.prefix)
    rows = zip(*(column.tolist() for column in columns), requests.prefix_tokens.tolist(), strict=True)
    return [Request(number, *row) for number, row in enumerate(rows)]


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
