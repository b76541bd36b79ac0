"""Routing over the steps of a block of layers: the same tokens through every policy's gate, counted as they go.

A layer's gate is a closed loop (tokens -> counts -> bias -> next tokens) that no other layer touches, so blocks of
layers run anywhere, in any order, with the same result. No seconds here; those are made of the counts afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from sim.conservation import check_exchange
from sim.exchange import Exchange, dispatch_layout
from sim.gating import Gate
from sim.gating.score import Score
from sim.kernels.choose import Kernels, choose
from sim.placement import expert_to_rank
from sim.rng import stream
from sim.scenario import Policy, Scenario
from sim.tokens import F32, F64, I16, I32, I64, Tokens
from sim.traffic import Batch, TrafficShape


@dataclass(frozen=True)
class Task:
    """A unit of work: ``layers`` (MoE layer numbers) of ``replica``, for the policies at ``policies`` (one model)."""

    scenario: Scenario
    policies: tuple[int, ...]
    replica: int
    layers: range


@dataclass
class Counts:
    """What one policy did in one layer over all steps (S steps, E experts).

    expert_tokens: [S, E] int64. kept_affinity: [S] sum of unbiased scores of the chosen experts over that of the
    unrestricted top-k. exchanges: by measured step, one `Exchange` per micro-batch. state: final balancing state.
    """

    policy: int
    layer: int
    expert_rank: I32
    expert_tokens: I64
    kept_affinity: F64
    exchanges: dict[int, list[Exchange]] = field(default_factory=dict)
    state: list[F64] = field(default_factory=list)


def measured_steps(scenario: Scenario) -> list[int]:
    """Steps whose exchange is counted: the timed ones and the last."""
    return sorted({*scenario.timed_steps(), scenario.steps.count - 1})


def shape_of(scenario: Scenario, policy: Policy) -> TrafficShape:
    """What the traffic has to know for ``policy``'s model."""
    model = scenario.model_of(policy)
    return TrafficShape(
        model.n_moe_layers, model.n_routed_experts, model.num_experts_per_tok, scenario.parallel.ep_size
    )


def token_layers(scenario: Scenario) -> int:
    """Tokens x MoE layers x policies that a run routes: the size of its work."""
    return sum(token_layers_of(scenario, policy) for policy in scenario.policies)


def token_layers_of(scenario: Scenario, policy: Policy) -> int:
    """The part of `token_layers` that one policy routes."""
    warmup = scenario.steps.warmup
    tokens = scenario.steps.count * scenario.parallel.ep_size * scenario.tokens_per_rank
    if policy.learns:
        tokens += warmup.steps * warmup.ranks * warmup.tokens_per_rank
    return tokens * scenario.model_of(policy).n_moe_layers * scenario.replicas


class _Layer:
    """One policy's gate in one layer, with its counters."""

    def __init__(self, task: Task, index: int, layer: int, kernels: Kernels) -> None:
        scenario = task.scenario
        self.policy = scenario.policies[index]
        self.model = scenario.model_of(self.policy)
        self.gate = Gate(self.policy, self.model, kernels)
        experts, ranks = self.model.n_routed_experts, scenario.parallel.ep_size
        slots = self.policy.placement.place(experts, ranks, stream(scenario.seed, "placement", task.replica, layer))
        self.result = Counts(
            index,
            layer,
            expert_to_rank(slots, experts, ranks),
            np.zeros((scenario.steps.count, experts), dtype=np.int64),
            np.zeros(scenario.steps.count),
        )
        self.learns = self.policy.learns
        self.micro_batches = scenario.schedule.micro_batches
        self.ranks_per_node = scenario.cluster.topology.domain(scenario.cluster)

    def reset(self, n_ranks: int, measure: bool) -> None:
        parts = self.micro_batches
        experts = self.model.n_routed_experts
        self.counts: I64 = np.zeros((parts, n_ranks, experts), dtype=np.int64)
        self.kept = self.best = 0.0
        self.measure = measure
        if measure:
            nodes = -(-n_ranks // self.ranks_per_node)
            self.rank_tokens: I64 = np.zeros((parts, n_ranks, n_ranks), dtype=np.int64)
            self.node_tokens: I64 = np.zeros((parts, n_ranks, nodes), dtype=np.int64)
            self.copies: I64 = np.zeros((parts, n_ranks, 2), dtype=np.int64)

    def take(self, rank: int, topk_ids: I16) -> None:
        """Count one rank's choices, micro-batch by micro-batch."""
        for part, ids in enumerate(np.split(topk_ids, self.micro_batches)):
            if self.measure:
                layout = dispatch_layout(
                    ids,
                    self.result.expert_rank,
                    self.counts.shape[1],
                    self.ranks_per_node,
                    self.model.n_routed_experts,
                    self.gate.kernels,
                )
                self.rank_tokens[part, rank] = layout.num_tokens_per_rank
                self.node_tokens[part, rank] = layout.num_tokens_per_rdma_rank
                self.counts[part, rank] = layout.num_tokens_per_expert
                self.copies[part, rank] = layout.copies
            else:
                self.counts[part, rank] = self.gate.kernels.expert_tokens(ids, self.model.n_routed_experts)

    def exchanges(self, tokens_per_rank: int, k: int) -> list[Exchange]:
        """Return the counted exchanges, after checking that nothing was lost."""
        found = []
        for part in range(self.micro_batches):
            exchange = Exchange(
                self.rank_tokens[part],
                self.node_tokens[part],
                self.counts[part],
                self.result.expert_rank,
                self.copies[part],
            )
            check_exchange(exchange, tokens_per_rank // self.micro_batches, k)
            found.append(exchange)
        return found


def run(task: Task) -> list[Counts]:
    """Roll the task's layers through warm-up and all steps; one `Counts` per (policy, layer), in that order."""
    scenario = task.scenario
    kernels = choose(token_layers(scenario))
    source = scenario.traffic.start(
        shape_of(scenario, scenario.policies[task.policies[0]]), scenario.seed, task.replica
    )
    layers = {layer: [_Layer(task, index, layer, kernels) for index in task.policies] for layer in task.layers}
    learners = {layer: [gate for gate in gates if gate.learns] for layer, gates in layers.items()}
    warmup = scenario.steps.warmup
    if any(learners.values()):
        for step in range(warmup.steps):
            tokens = warmup.tokens_per_rank - warmup.tokens_per_rank % scenario.schedule.micro_batches
            batch = source.batch("warmup", step, n_ranks=warmup.ranks, tokens_per_rank=tokens)
            _route(task, batch, learners, warmup.ranks, "warmup", step, measure=False)
            gain = warmup.gain ** (1.0 - step / max(1, warmup.steps - 1))
            for gates in learners.values():
                for gate in gates:
                    gate.gate.update(gate.counts, 0, gain)
    measured = set(measured_steps(scenario))
    for step in range(scenario.steps.count):
        ranks, tokens = scenario.parallel.ep_size, scenario.tokens_per_rank
        batch = source.batch("train", step, n_ranks=ranks, tokens_per_rank=tokens)
        _route(task, batch, layers, ranks, "train", step, measure=step in measured)
        for gates in layers.values():
            for gate in gates:
                gate.result.expert_tokens[step] = gate.counts.sum(axis=(0, 1))
                gate.result.kept_affinity[step] = gate.kept / gate.best if gate.best > 0 else 1.0
                if step in measured:
                    k = gate.gate.k if gate.policy.select.kind != "dense" else gate.model.n_routed_experts
                    gate.result.exchanges[step] = gate.exchanges(tokens, k)
                if gate.learns:
                    gate.gate.update(gate.counts, step)
    for gates in layers.values():
        for gate in gates:
            gate.result.state = gate.gate.states
    return [layers[layer][i].result for i in range(len(task.policies)) for layer in task.layers]


def _route(
    task: Task, batch: Batch, layers: dict[int, list[_Layer]], n_ranks: int, phase: str, step: int, measure: bool
) -> None:
    """Send one batch through the gates. Ranks outside, layers inside: a rank's latents serve all its layers."""
    for gates in layers.values():
        for gate in gates:
            gate.reset(n_ranks, measure)
    for rank in range(n_ranks):
        for layer, gates in layers.items():
            tokens = batch.tokens(layer, rank)
            if tokens.logits is None:
                _replay(tokens, gates, rank)
            else:
                rng = partial(stream, task.scenario.seed, "gate", task.replica, phase, step, layer, rank)
                _choose(tokens, tokens.logits, gates, rank, rng, phase == "train")


def _replay(tokens: Tokens, gates: list[_Layer], rank: int) -> None:
    if tokens.topk_ids is None:
        raise ValueError("tokens carry neither logits nor recorded choices")
    for gate in gates:
        gate.take(rank, tokens.topk_ids)
        gate.kept = gate.best = 1.0


def _choose(
    tokens: Tokens,
    logits: F32,
    gates: list[_Layer],
    rank: int,
    rng: Callable[[], np.random.Generator],
    judge: bool,
) -> None:
    """Route one rank's tokens through every gate; scores and the unrestricted top-k are shared by equal gates."""
    shared: dict[Score, tuple[F32, I16 | None, float]] = {}
    for layer in gates:
        gate = layer.gate
        if gate.score not in shared:
            scores = gate.score.scores(logits, gate.kernels)
            plain, best = None, 0.0
            if judge:
                ones, zeros = np.ones(scores.shape[1], np.float32), np.zeros(scores.shape[1], np.float32)
                plain = gate.kernels.topk(scores, ones, zeros, gate.k)
                best = float(gate.kernels.picked(scores, plain).sum(dtype=np.float64))
            shared[gate.score] = (scores, plain, best)
        scores, plain, best = shared[gate.score]
        ids = gate.choose(scores, rng, tokens.topk_ids, plain)
        layer.take(rank, ids)
        if judge:
            # A gate may keep more than k experts (dense); its surplus counts as fully kept, not as more than all.
            kept = best if ids is plain else float(gate.kernels.picked(scores, ids).sum(dtype=np.float64))
            layer.kept += min(kept, best)
            layer.best += best
