"""A tally at count level: a pilot is routed token by token, all other ranks are drawn (see `countlevel`)."""

from __future__ import annotations

from functools import partial

import numpy as np

from sim.conservation import ConservationError
from sim.countlevel import Cut, block_counts, draw, joined
from sim.gating import Choices, Router
from sim.kernels.choose import Kernels
from sim.rng import stream
from sim.scenario import Scenario
from sim.tally import Counts, Tally
from sim.tokens import F64, I32, I64, Tokens


class DrawnTally(Tally):
    """As `Tally`; ``take`` sees a pilot only, ``record`` draws the rest.

    A gate that stands still under stationary traffic is piloted once, before the first step, and all ranks of all steps
    are drawn; any other is piloted by the first ranks of every step, and that step's other ranks are drawn. Kept
    affinity, topics and sequences are those of the pilot. Which blocks are picked depends on replica and step alone, so
    layers, and policies whose pilots are of one size, meet the same tokens.
    """

    def __init__(self, scenario: Scenario, index: int, replica: int, layer: int, kernels: Kernels) -> None:
        super().__init__(scenario, index, replica, layer, kernels)
        self.pilots_once = scenario.pilots_once(self.policy)
        self.pilot_ranks, self.group_ranks = scenario.steps.pilot_ranks, scenario.parallel.ep_size
        self.pilot_parts = scenario.schedule.micro_batches * scenario.pilot_tokens // scenario.tokens_per_rank
        self.stream = partial(stream, scenario.seed, "counts", replica)
        self.piloting = False

    @property
    def wants_tokens(self) -> bool:
        return not self.pilots_once

    def reset(self, n_ranks: int, *, measure: bool, warming_up: bool = False) -> None:
        super().reset(n_ranks, measure=measure, warming_up=warming_up)
        self.piloting = not (warming_up or self.pilots_once)
        if self.piloting:
            self.found: list[tuple[Cut, I32]] = []
            self.sampled_ranks = min(self.pilot_ranks, n_ranks)

    def begin_pilot(self) -> None:
        """Expect the tokens of the one pilot of a gate that stands still."""
        self.micro_batches = self.pilot_parts
        self._reset(self.pilot_ranks, measure=False)
        self.piloting, self.found = True, []
        self.topic_kept: I64 = np.zeros((self.n_topics, self.experts), dtype=np.int64)
        self.per_sequence: list[tuple[int, F64]] = []

    def end_pilot(self) -> None:
        """Keep what the pilot showed for all steps."""
        self.cut, self.blocks = joined(self.found, self.micro_batches)
        self.piloting, self.found = False, []
        self.micro_batches = self.parts
        if self.per_sequence:  # one entry instead of one per rank: every step reads them
            lengths, values = zip(*self.per_sequence, strict=True)
            self.per_sequence = [(sum(lengths), np.concatenate(values))]
        self.pilot = (
            self.kept_affinity,
            self.best_affinity,
            self.natural,
            self.topic_kept,
            self.topic_kept,
            self.per_sequence,
        )

    def take(self, tokens: Tokens, parts: list[Choices], router: Router | None) -> None:
        super().take(tokens, parts, router)
        if not self.piloting:
            return
        ids = parts[0].kept if len(parts) == 1 else np.concatenate([choices.kept for choices in parts])
        cut = Cut.of(tokens.sequence, tokens.n_tokens, self.micro_batches)
        blocks = block_counts(ids, cut, self.hosting.expert_rank, self.group_ranks, self.ranks_per_node, self.experts)
        # Every draw is a sum of blocks, so what holds for the pilot's blocks, counted twice, holds for all.
        found = blocks.sum(axis=(0, 1), dtype=np.int64)
        copies = self.gate.kernels.distinct_groups(ids, self.hosting.expert_rank, self.group_ranks)
        if not np.array_equal(found[: self.experts], self.kept[:, tokens.rank].sum(axis=0)):
            raise ConservationError("C1 a pilot's blocks hold its tokens' experts")
        if int(found[self.experts : self.experts + self.group_ranks].sum()) != copies:
            raise ConservationError("C2 a pilot's blocks hold its copies to ranks")
        self.found.append((cut, blocks))
        if self.pilots_once:
            size = tokens.n_tokens // self.micro_batches
            for part in range(self.micro_batches):
                rows = slice(part * size, (part + 1) * size)
                self._take_groups(tokens, rows, ids[rows])

    def record(self, step: int, tokens_per_rank: int) -> None:
        first = 0
        if self.pilots_once:
            (
                self.kept_affinity,
                self.best_affinity,
                self.natural,
                self.topic_kept,
                self.topic_asked,
                self.per_sequence,
            ) = self.pilot
        else:
            first = len(self.found)
            self.cut, self.blocks = joined(self.found, self.micro_batches)
        if first < self.n_ranks:
            self._draw(step, first, tokens_per_rank // self.micro_batches)
        super().record(step, tokens_per_rank)

    def _draw(self, step: int, first: int, size: int) -> None:
        """Fill the counts of ranks ``first``..."""
        drawn = draw(self.blocks, self.cut, self.stream(step), self.n_ranks - first, self.micro_batches)
        experts, ranks, nodes = np.split(drawn, [self.experts, self.experts + self.group_ranks], axis=2)
        self.kept[:, first:] = self.asked[:, first:] = experts
        if self.measure:
            self.rank_tokens[:, first:], self.node_tokens[:, first:] = ranks, nodes
            self.copies[:, first:, 0], self.copies[:, first:, 1] = ranks.sum(axis=2), nodes.sum(axis=2)
            self.pairs[:, first:] = size * self.gate.k


def tally(scenario: Scenario, index: int, replica: int, layer: int, kernels: Kernels) -> Tally:
    """Return the tally that the scenario's resolution asks for."""
    kind = DrawnTally if scenario.steps.resolution == "count" else Tally
    return kind(scenario, index, replica, layer, kernels)


__all__ = ["Counts", "DrawnTally", "tally"]
