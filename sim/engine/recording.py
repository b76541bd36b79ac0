"""What a run keeps for its timeline: when everything happened on every stream, in integer picoseconds.

Arrays only, so that a worker process can hand them over. Nothing here is made unless a run is asked to record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sim.engine.plan import Plan, Stream, Timeline
from sim.exchange import Exchange, by_rank, token_bytes
from sim.pipeline import Chunk
from sim.scenario import Scenario
from sim.tokens import F64, I64


class Label(NamedTuple):
    """What an operation of a step is; see `sim.engine.plan.Op`."""

    phase: str
    layer: int
    micro_batch: int
    backward: bool
    stream: Stream


@dataclass(frozen=True, slots=True, eq=False)
class RecordedStep:
    """One step of one policy: n operations on P devices, int64 throughout.

    start_ps, end_ps, peer_start_ps: [n, P] as in `sim.engine.plan.Timeline`. tokens: [n, P]; attention and dense FFN: the
    micro-batch's; experts: rows they compute; dispatch and combine: copies that leave the device's hands, its own
    included. sent_bytes: [n, P], those of them that go to other devices, 0 for computation. devices_per_node: devices that
    share NVLink.
    """

    policy: str
    replica: int
    step: int
    devices_per_node: int
    makespan_ps: int
    labels: tuple[Label, ...]
    start_ps: I64
    end_ps: I64
    peer_start_ps: I64
    tokens: I64
    sent_bytes: I64


@dataclass(frozen=True, slots=True, eq=False)
class RecordedPipeline:
    """One pipelined step of one policy on PP ranks and G expert-parallel groups, whose devices run in step.

    programs: the chunks of every pipeline rank. start_ps, end_ps: per pipeline rank [G, chunks] int64. optimizer_ps: when
    the optimiser starts and ends, everywhere. tokens: of a micro-batch on one device.
    """

    policy: str
    replica: int
    step: int
    programs: tuple[tuple[Chunk, ...], ...]
    start_ps: tuple[I64, ...]
    end_ps: tuple[I64, ...]
    optimizer_ps: tuple[int, int]
    tokens: int


class RecordedGroup(NamedTuple):
    """A group of devices that serve in step, the ``number``-th of its unit. capacity_blocks: cache blocks of all its ranks together."""

    unit: str
    role: str
    number: int
    devices: int
    capacity_blocks: int


@dataclass(frozen=True, slots=True, eq=False)
class RecordedService:
    """The requests of one replica under one policy.

    iterations: column -> [n] int64 as in `sim.engine.serving.log.COLUMNS`, and ``context``, tokens of the contexts of its
    decodes; those that ended first. imbalance: [n]. rests: column -> [m] as in `REST_COLUMNS`. handovers: [h, 5] int64
    request, group that computed the prompt, group that decodes, when the prompt was done and when its cache had arrived
    (ps). rebalances, faults: rows of their tables. until_ps: the last time that is recorded; end_ps: of the run.
    """

    policy: str
    replica: int
    groups: tuple[RecordedGroup, ...]
    iterations: Mapping[str, I64]
    imbalance: F64
    rests: Mapping[str, I64]
    handovers: I64
    rebalances: tuple[Mapping[str, Any], ...]
    faults: tuple[Mapping[str, Any], ...]
    until_ps: int
    end_ps: int


Recorded = RecordedStep | RecordedPipeline | RecordedService


def recorded_step(
    scenario: Scenario, index: int, step: int, plan: Plan, timeline: Timeline, exchanges: Sequence[Sequence[Exchange]]
) -> RecordedStep:
    """Return step ``step`` of replica 0 of policy ``index``; exchanges: as in `sim.engine.training.Work`."""
    policy, cost = scenario.policies[index], scenario.cost
    model, parallel = scenario.model_of(policy), scenario.parallel_of(policy)
    number = {layer: i for i, layer in enumerate(model.moe_layers)}
    own = scenario.tokens_per_rank // scenario.schedule.micro_batches
    dtype = {"dispatch": cost.dispatch_dtype, "combine": cost.combine_dtype}
    tokens = np.full((len(plan.ops), plan.n_ranks), own, dtype=np.int64)
    sent_bytes = np.zeros_like(tokens)
    for i, op in enumerate(plan.ops):
        if op.phase == "tensor_parallel":  # two all-reduces of the group's hidden states in bf16
            tokens[i] *= parallel.tp_size
            sent_bytes[i] = tokens[i] * 4 * model.hidden_size
        elif op.phase in dtype:
            copies = exchanges[number[op.layer]][op.micro_batch].sent(cost.mode)
            copies = copies if op.phase == "dispatch" else copies.T
            tokens[i] = copies.sum(axis=1)
            sent_bytes[i] = (tokens[i] - copies.diagonal()) * token_bytes(model.dispatch_hidden_size, dtype[op.phase])
        elif op.phase in ("experts", "experts_wgrad"):
            exchange = exchanges[number[op.layer]][op.micro_batch]
            tokens[i] = by_rank(exchange.rows, exchange.expert_rank, plan.n_ranks).sum(axis=-1)
    return RecordedStep(
        policy.name,
        0,
        step,
        scenario.cluster.topology.domain(scenario.cluster),
        timeline.makespan_ps,
        tuple(Label(op.phase, op.layer, op.micro_batch, op.backward, op.stream) for op in plan.ops),
        timeline.start_ps,
        timeline.end_ps,
        timeline.peer_start_ps,
        tokens,
        sent_bytes,
    )
