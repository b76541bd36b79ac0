"""A tally at count level: some ranks are routed token by token, the counts of the others are drawn (see `countlevel`)."""

from __future__ import annotations

from functools import partial

import numpy as np

from sim.countlevel import CountLaw, fit, whole
from sim.exchange import is_token_in_rank
from sim.gating import Choices, Router
from sim.kernels.choose import Kernels
from sim.rng import stream
from sim.scenario import Scenario
from sim.tally import Counts, Tally, by_group
from sim.tokens import F64, I64, Tokens


class DrawnTally(Tally):
    """As `Tally`; ``take`` sees the pilot's ranks only, ``record`` draws the rest.

    A gate that stands still under stationary traffic keeps its first pilot; any other is piloted anew in every step. Kept
    affinity, topics and sequences are those of the pilot. Draws share their random streams between policies.
    """

    def __init__(self, scenario: Scenario, index: int, replica: int, layer: int, kernels: Kernels) -> None:
        super().__init__(scenario, index, replica, layer, kernels)
        self.stands_still = not self.learns and scenario.traffic.stationary
        self.pilot_ranks = scenario.steps.pilot_ranks
        self.stream = partial(stream, scenario.seed, "counts", replica, layer)
        self.k = self.gate.k
        self.law: CountLaw | None = None

    @property
    def wants_tokens(self) -> bool:
        return self.law is None or not self.stands_still

    def reset(self, n_ranks: int, *, measure: bool, warming_up: bool = False) -> None:
        super().reset(n_ranks, measure=not warming_up)
        self.report = measure
        self.units: list[F64] = []
        self.unit_tokens: list[I64] = []

    def take(self, tokens: Tokens, parts: list[Choices], router: Router | None) -> None:
        super().take(tokens, parts, router)
        if not self.measure:
            return
        ids = np.concatenate([choices.kept for choices in parts])
        size = tokens.n_tokens // self.micro_batches
        sequence = np.zeros(len(ids), np.int32) if tokens.sequence is None else tokens.sequence
        part = np.arange(len(ids)) // size
        starts = np.flatnonzero(np.r_[True, (sequence[1:] != sequence[:-1]) | (part[1:] != part[:-1])])
        lengths = np.diff(np.r_[starts, len(ids)])
        unit = np.repeat(np.arange(len(starts), dtype=np.int32), lengths)
        hit = is_token_in_rank(ids, self.result.expert_rank, self.n_ranks)
        nodes = np.logical_or.reduceat(hit, np.arange(0, self.n_ranks, self.ranks_per_node), axis=1)
        self.units.append(
            np.concatenate(
                [
                    by_group(unit, ids, len(starts), self.experts),
                    np.add.reduceat(hit, starts, axis=0, dtype=np.int64),
                    np.add.reduceat(nodes, starts, axis=0, dtype=np.int64),
                ],
                axis=1,
            ).astype(np.float64)
        )
        self.unit_tokens.append(lengths)

    def record(self, step: int, tokens_per_rank: int) -> None:
        first = 0
        if self.units:
            first = self.pilot_ranks
            self.law = fit(np.concatenate(self.units), np.concatenate(self.unit_tokens))
            self.pilot = (self.kept_affinity, self.best_affinity, self.topic_kept, self.topic_asked, self.per_sequence)
        else:
            self.kept_affinity, self.best_affinity, self.topic_kept, self.topic_asked, self.per_sequence = self.pilot
        self._draw(step, first, tokens_per_rank // self.micro_batches)
        self.measure = self.report
        super().record(step, tokens_per_rank)

    def _draw(self, step: int, first: int, size: int) -> None:
        """Fill the counts of ranks ``first``... with draws that keep every law of `sim.conservation`."""
        assert self.law is not None
        ranks, experts, n_nodes = self.n_ranks, self.experts, self.node_tokens.shape[2]
        n = (ranks - first) * self.micro_batches
        drawn = self.law.draw(self.stream(step), size, n)
        loads = whole(drawn[:, :experts], size * self.k, size)
        order = np.argsort(self.result.expert_rank, kind="stable")
        pairs = loads[:, order].reshape(n, ranks, -1).sum(axis=2)
        low = -(-pairs // max(1, experts // ranks))
        hits = np.clip(np.rint(drawn[:, experts : experts + ranks]).astype(np.int64), low, np.minimum(pairs, size))
        starts = np.arange(0, ranks, self.ranks_per_node)
        copies = np.add.reduceat(hits, starts, axis=1)
        low = np.maximum.reduceat(hits, starts, axis=1)
        nodes = np.clip(np.rint(drawn[:, -n_nodes:]).astype(np.int64), low, np.minimum(copies, size))
        shape = (self.micro_batches, ranks - first, -1)
        self.kept[:, first:] = self.asked[:, first:] = loads.reshape(shape)
        self.rank_tokens[:, first:], self.node_tokens[:, first:] = hits.reshape(shape), nodes.reshape(shape)
        self.copies[:, first:, 0] = self.rank_tokens[:, first:].sum(axis=2)
        self.copies[:, first:, 1] = self.node_tokens[:, first:].sum(axis=2)
        self.pairs[:, first:] = size * self.k


def tally(scenario: Scenario, index: int, replica: int, layer: int, kernels: Kernels) -> Tally:
    """Return the tally that the scenario's resolution asks for."""
    kind = DrawnTally if scenario.steps.resolution == "count" else Tally
    return kind(scenario, index, replica, layer, kernels)


__all__ = ["Counts", "DrawnTally", "tally"]
