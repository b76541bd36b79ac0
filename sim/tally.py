"""What one policy does in one layer: its gate, and everything that is counted while tokens pass through it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from sim.conservation import ConservationError, check_exchange
from sim.exchange import Exchange, dispatch_layout
from sim.gating import Choices, Gate, Router
from sim.gating.balance import Sample, Seen
from sim.hosting import Hosting, coactivation
from sim.kernels.choose import Kernels
from sim.metrics.balance import max_vio, uniform_max_vio
from sim.replicas import assign
from sim.scenario import Scenario
from sim.tokens import F32, F64, I16, I32, I64, Tokens

SAMPLE_TOKENS = 16_384
"""Tokens per step and layer that rules with losses look at, over all ranks: enough for the mean of a gradient."""


@dataclass
class Counts:
    """What one policy did in one layer over all steps (S steps, E experts).

    expert_tokens: [S, E] int64 kept pairs of token and expert. rank_tokens: [S, P] int64, those that each rank's experts
    receive. By step with a new placement:
    moves ([P, P] int64 experts sent from rank to rank before it). asked: [S] int64 pairs before capacity; asked_max_vio: [S]
    MaxVio of those. kept_affinity: [S] natural affinity of the kept choices over that of the unrestricted top-k. By
    measured step: exchanges (one `Exchange` per micro-batch), topic_tokens ([topics, E] int64 kept), topic_asked
    ([topics] int64), scopes (mean MaxVio over the groups of a scope). oracle_kept_affinity: bound on what any perfectly balanced choice could keep, on a sample of
    the last step. map: [slots] int32, the expert in each slot at the end. state: final balancing state. offset_rms: of the logit offsets that balancing learned.
    """

    policy: int
    layer: int
    expert_tokens: I64
    rank_tokens: I64
    asked: I64
    asked_max_vio: F64
    kept_affinity: F64
    exchanges: dict[int, list[Exchange]] = field(default_factory=dict)
    moves: dict[int, I64] = field(default_factory=dict)
    topic_tokens: dict[int, I64] = field(default_factory=dict)
    topic_asked: dict[int, I64] = field(default_factory=dict)
    scopes: dict[int, dict[str, float]] = field(default_factory=dict)
    oracle_kept_affinity: float = math.nan
    map: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    state: list[F64] = field(default_factory=list)
    offset_rms: float = 0.0


class Tally:
    """One policy's gate in one layer, with its counters."""

    def __init__(self, scenario: Scenario, index: int, replica: int, layer: int, kernels: Kernels) -> None:
        self.policy = scenario.policies[index]
        model = scenario.model_of(self.policy)
        traffic = scenario.traffic
        self.gate = Gate(
            self.policy,
            model,
            kernels,
            modalities=traffic.modalities,
            token_frequency=traffic.token_frequency if self.policy.select.needs == "token_ids" else None,
            dynamics=scenario.router_dynamics,
        )
        self.experts, self.ranks = model.n_routed_experts, scenario.parallel.ep_size
        self.hosting = Hosting(scenario, self.policy, replica, layer)
        self.result = Counts(
            index,
            layer,
            np.zeros((scenario.steps.count, self.experts), dtype=np.int64),
            np.zeros((scenario.steps.count, self.ranks), dtype=np.int64),
            np.zeros(scenario.steps.count, dtype=np.int64),
            np.zeros(scenario.steps.count),
            np.zeros(scenario.steps.count),
        )
        self.learns = self.policy.learns or bool(scenario.router_dynamics)
        self.parts, self.warmup_parts = scenario.parts, scenario.warmup_parts
        self.micro_batches = self.parts
        self.ranks_per_node = scenario.cluster.topology.domain(scenario.cluster)
        self.n_topics = len(traffic.topics)

    @property
    def wants_tokens(self) -> bool:
        """Whether the next step's tokens have to pass through the gate."""
        return True

    def reset(self, n_ranks: int, *, measure: bool, warming_up: bool = False) -> None:
        """Forget the last step; ``measure``: count the next one's exchange too."""
        self.micro_batches = self.warmup_parts if warming_up else self.parts
        self._reset(n_ranks, measure)

    def _reset(self, n_ranks: int, measure: bool) -> None:
        parts, experts = self.micro_batches, self.experts
        self.n_ranks = self.sampled_ranks = n_ranks
        self.measure = measure
        self.kept: I64 = np.zeros((parts, n_ranks, experts), dtype=np.int64)
        self.asked: I64 = np.zeros((parts, n_ranks, experts), dtype=np.int64)
        self.best_affinity = self.kept_affinity = 0.0
        self.samples: list[Sample] = []
        self.natural: list[F32] = []
        self.pairs_seen: F64 | None = None
        self.ids: dict[tuple[int, int], I16] = {}
        self.topic_asked: I64 = np.zeros((self.n_topics, experts), dtype=np.int64)
        if measure:
            nodes = -(-n_ranks // self.ranks_per_node)
            self.rank_tokens: I64 = np.zeros((parts, n_ranks, n_ranks), dtype=np.int64)
            self.node_tokens: I64 = np.zeros((parts, n_ranks, nodes), dtype=np.int64)
            self.copies: I64 = np.zeros((parts, n_ranks, 2), dtype=np.int64)
            self.pairs: I64 = np.zeros((parts, n_ranks), dtype=np.int64)
            self.topic_kept: I64 = np.zeros((self.n_topics, experts), dtype=np.int64)
            self.per_sequence: list[tuple[int, F64]] = []

    def take(self, tokens: Tokens, parts: list[Choices], router: Router | None) -> None:
        """Count one rank's choices, given whole or by micro-batch."""
        if len(parts) < self.micro_batches:
            parts = _split(parts[0], self.micro_batches)
        size = tokens.n_tokens // self.micro_batches
        for part, choices in enumerate(parts):
            rows = slice(part * size, (part + 1) * size)
            self._take_part(part, tokens, rows, choices)
            if router is not None and self.gate.samples:
                self._sample(part, tokens, rows, choices, router)

    def _take_part(self, part: int, tokens: Tokens, rows: slice, choices: Choices) -> None:
        rank, kernels, experts = tokens.rank, self.gate.kernels, self.experts
        kept = choices.kept
        if self.measure:
            if self.hosting.single:
                self.kept[part, rank] = self._lay_out(part, rank, kept, self.hosting.expert_rank)
            else:  # which slots they go to may depend on what the other ranks ask for
                self.kept[part, rank] = kernels.expert_tokens(kept, experts)
                self.ids[part, rank] = kept
            self.pairs[part, rank] = np.count_nonzero(kept >= 0)
            self._take_groups(tokens, rows, kept)
        else:
            self.kept[part, rank] = kernels.expert_tokens(kept, experts)
        if self.hosting.watches_pairs:
            seen = coactivation(kept, experts)
            self.pairs_seen = seen if self.pairs_seen is None else self.pairs_seen + seen
        if choices.asked is kept:
            self.asked[part, rank] = self.kept[part, rank]
        else:
            self.asked[part, rank] = kernels.expert_tokens(choices.asked, experts)
        if not self.gate.select.varies and int(self.asked[part, rank].sum()) != len(kept) * self.gate.k:
            raise ConservationError(
                f"C1 each token asks for k experts: {self.asked[part, rank].sum()} != {len(kept)} x {self.gate.k}"
            )
        if self.n_topics > 1 and (self.measure or self.learns):
            self.topic_asked += by_group(tokens.topic[rows], choices.asked, self.n_topics, experts)

    def _lay_out(self, part: int, rank: int, ids: I16, at_rank: I32) -> I64:
        """Count where a source's tokens go; ``at_rank``: the rank of each expert or slot that ``ids`` name."""
        kernels, nodes = self.gate.kernels, self.ranks_per_node
        layout = dispatch_layout(ids, at_rank, self.n_ranks, nodes, len(at_rank), kernels)
        self.rank_tokens[part, rank] = layout.num_tokens_per_rank
        self.node_tokens[part, rank] = layout.num_tokens_per_rdma_rank
        self.copies[part, rank] = layout.copies
        return layout.num_tokens_per_expert

    def _take_groups(self, tokens: Tokens, rows: slice, kept: I16) -> None:
        if self.n_topics > 1:
            self.topic_kept += by_group(tokens.topic[rows], kept, self.n_topics, self.experts)
        if tokens.sequence is not None:
            sequence = tokens.sequence[rows] - tokens.sequence[rows].min()
            there = np.bincount(sequence) > 0  # in mixed order a part need not hold all numbers between
            self.per_sequence.append((len(kept), max_vio(by_group(sequence, kept, len(there), self.experts)[there])))

    def _sample(self, part: int, tokens: Tokens, rows: slice, choices: Choices, router: Router) -> None:
        n = len(choices.asked)
        chosen = spread(n, max(1, SAMPLE_TOKENS // (self.sampled_ranks * self.micro_batches)))
        at = rows.start + chosen
        self.samples.append(
            Sample(
                part,
                tokens.rank,
                router.logits[at],
                router.scores[at],
                choices.asked[chosen],
                tokens.topic[at],
                tokens.sequences[at],
                self.gate.score,
            )
        )

    def judge(self, kept: float, best: float) -> None:
        """Add natural affinity: of the kept choices, and of the unrestricted top-k."""
        # A gate may keep more than k experts (dense); its surplus counts as fully kept, not as more than all.
        self.kept_affinity += min(kept, best)
        self.best_affinity += best

    def learn(self, step: int, gain: float = 1.0, *, warming_up: bool = False) -> None:
        """Let the gate's rules learn from what was counted since `reset`."""
        topics = self.topic_asked if self.n_topics > 1 else None
        self.gate.update(Seen(self.asked, topics, tuple(self.samples)), step, gain, warming_up=warming_up)

    def record(self, step: int, tokens_per_rank: int) -> None:
        """Write the step into the result, after checking that nothing was lost."""
        result = self.result
        result.expert_tokens[step] = self.kept.sum(axis=(0, 1))
        result.asked[step] = self.asked.sum()
        result.asked_max_vio[step] = max_vio(self.asked.sum(axis=(0, 1)))
        result.kept_affinity[step] = self.kept_affinity / self.best_affinity if self.best_affinity > 0 else 1.0
        self.quotas = [self.hosting.quotas(kept) for kept in self.kept]
        result.rank_tokens[step] = sum(self.hosting.rank_tokens(quota) for quota in self.quotas)
        if self.hosting.moved is not None:
            result.moves[step] = self.hosting.moved
        self.observe()
        if not self.measure:
            return
        result.exchanges[step] = self._exchanges(tokens_per_rank)
        k = max(1, round(int(self.asked.sum()) / (tokens_per_rank * self.n_ranks)))
        part = tokens_per_rank // self.micro_batches
        result.scopes[step] = {
            "max_vio_micro_batch": float(max_vio(self.kept).mean()),
            "max_vio_micro_batch_floor": uniform_max_vio(part, self.experts, k),
            "max_vio_ep_group": float(max_vio(self.kept.sum(axis=1)).mean()),
        }
        if self.per_sequence:
            per_sequence = np.concatenate([vio for _, vio in self.per_sequence])
            length = max(1, sum(n for n, _ in self.per_sequence) // len(per_sequence))
            result.scopes[step] |= {
                "max_vio_sequence": float(per_sequence.mean()),
                "max_vio_sequence_floor": uniform_max_vio(length, self.experts, k),
            }
        if self.n_topics > 1:
            result.topic_tokens[step], result.topic_asked[step] = self.topic_kept, self.topic_asked.sum(axis=1)

    def observe(self) -> None:
        """Let the placement remember what was counted since `reset`."""
        self.hosting.observe(self.kept.sum(axis=(0, 1)), self.pairs_seen)

    def _exchanges(self, tokens_per_rank: int) -> list[Exchange]:
        found, slots = [], self.hosting.slots
        size = tokens_per_rank // self.micro_batches
        rows = self.gate.capacity.padded_tokens(size, self.gate.k, self.experts)
        for part, quota in enumerate(self.quotas):
            for rank in range(self.n_ranks if self.ids else 0):
                ids = assign(self.ids[part, rank], quota[rank], self.hosting.map)
                if not np.array_equal(self._lay_out(part, rank, ids, slots.slot_rank), quota[rank]):
                    raise ConservationError(f"C5 source {rank} fills its quotas")
            exchange = Exchange(
                self.rank_tokens[part],
                self.node_tokens[part],
                quota,
                slots.slot_rank,
                self.copies[part],
                None if rows is None else np.full((self.n_ranks, slots.n_slots), rows, dtype=np.int64),
            )
            check_exchange(exchange, size, self.pairs[part])
            found.append(exchange)
        return found

    def finish(self) -> Counts:
        """Return the result with the gate's final state."""
        gate, result = self.gate, self.result
        result.state, result.map = gate.states, self.hosting.map
        if gate.offset is not None:
            learned = gate.offset if gate.natural_offset is None else gate.offset - gate.natural_offset
            learned = learned - learned.mean(axis=-1, keepdims=True)  # what moves all experts alike moves nothing
            result.offset_rms = float(np.sqrt(np.mean(np.square(learned, dtype=np.float64))))
        return result


def spread(n: int, wanted: int) -> I64:
    """Return at most ``wanted`` of the positions 0..n-1, evenly spaced."""
    stride = -(-n // wanted)
    # An odd stride does not lock on to sequences whose lengths are powers of two.
    return np.arange(0, n, stride + (stride % 2 == 0))


def _split(whole: Choices, parts: int) -> list[Choices]:
    asked = np.split(whole.asked, parts)
    kept = asked if whole.kept is whole.asked else np.split(whole.kept, parts)
    return [Choices(a, b) for a, b in zip(asked, kept, strict=True)]


def by_group(group: I32, topk_ids: I16, n_groups: int, n_experts: int) -> I64:
    """Count (token, expert) pairs per group of tokens, [n_groups, E] int64; ids of -1 count nowhere."""
    cell = group.astype(np.int64)[:, None] * (n_experts + 1) + topk_ids + 1
    counts = np.bincount(cell.ravel(), minlength=n_groups * (n_experts + 1))
    return counts.reshape(n_groups, n_experts + 1)[:, 1:]
