"""A pipelined training step: chunks on every pipeline rank and EP group, then the optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sim.cost.collectives import all_gather_s, point_to_point_s, reduce_scatter_s
from sim.engine import pipeline
from sim.engine.recording import RecordedPipeline
from sim.pipeline import Chunk
from sim.pipeline.blocks import block_parameters
from sim.scenario import Scenario
from sim.settings import Policy
from sim.tokens import I64
from sim.units import to_ps

GRADIENT_BYTES, WEIGHT_BYTES = 4.0, 2.0
# Per parameter of a device's shard, Adam reads the gradient (4), reads and writes the fp32 master weight (8) and two
# bf16 moments (8), and writes the bf16 weight (2); formats of the DeepSeek-V3 report, section 3.3.1.
ADAM_BYTES = 22.0

PARTS = ("forward", "backward", "weight_gradients", "overlapped", "bubble", "optimizer")
_PART_OF = {"input_gradients": "backward"}


def programs(scenario: Scenario, policy: Policy) -> list[list[Chunk]]:
    """Return the chunks of every pipeline rank."""
    size = scenario.parallel_of(policy).pp_size
    schedule = scenario.schedule
    return [schedule.pipeline.program(rank, size, schedule.micro_batches) for rank in range(size)]


def hop_s(scenario: Scenario, policy: Policy) -> float:
    """Seconds that a micro-batch's hidden states (bf16) take from one stage to the next."""
    parallel, model = scenario.parallel_of(policy), scenario.model_of(policy)
    tokens = scenario.tokens_per_rank // scenario.schedule.micro_batches
    domain = scenario.cluster.topology.domain(scenario.cluster)
    return float(
        point_to_point_s(scenario.cluster, tokens * model.hidden_size * 2.0, inter_node=parallel.devices > domain)
    )


def optimizer_s(scenario: Scenario, policy: Policy) -> float:
    """Seconds of the optimiser on the slowest pipeline rank, ZeRO-1 (arXiv 1910.02054).

    Gradients are reduced and scattered in fp32, each device updates its share, weights are gathered in bf16; dense
    parameters over all data-parallel ranks of a stage (and its copies), routed experts over the stage's EP groups.
    """
    parallel, schedule, cluster = scenario.parallel_of(policy), scenario.schedule, scenario.cluster
    model, stages = scenario.model_of(policy), scenario.stages(policy)
    copies = schedule.pipeline.copies
    domain = cluster.topology.domain(cluster)
    dense_ranks = parallel.dense_ranks * copies
    expert_ranks = parallel.ep_groups * copies
    # Members of a group that share a node; the copies of a stage lie at the other end of the pipeline.
    if parallel.devices <= domain:
        dense_beside, expert_beside = dense_ranks, expert_ranks
    else:
        dense_beside = max(1, min(domain // parallel.tp_size, dense_ranks // copies))
        expert_beside = max(1, min(domain // parallel.ep_size, parallel.ep_groups))
    slowest = 0.0
    for rank in range(parallel.pp_size):
        held = [
            block_parameters(model, block)
            for stage in schedule.pipeline.stages(rank, parallel.pp_size)
            for block in stages[stage]
        ]
        dense = sum(d for d, _ in held) / parallel.tp_size
        experts = sum(e for _, e in held) / parallel.ep_size
        seconds = 0.0
        for parameters, ranks, beside in ((dense, dense_ranks, dense_beside), (experts, expert_ranks, expert_beside)):
            seconds += float(reduce_scatter_s(cluster, ranks, parameters * GRADIENT_BYTES, beside))
            moved = np.asarray(parameters / ranks * ADAM_BYTES)
            seconds += float(scenario.cost.compute.elementwise_s(cluster.device, bytes=moved))
            seconds += float(all_gather_s(cluster, ranks, parameters * WEIGHT_BYTES, beside))
        slowest = max(slowest, seconds)
    return slowest


def pipelined_step(scenario: Scenario, policy: Policy, chunk_ps: Mapping[tuple[int, int], I64]) -> dict[str, Any]:
    """Time a step from the times of its chunks, ``chunk_ps[rank, group]`` [n] int64.

    Returns ``parts`` {name of `PARTS`: [PP x groups] int64 picoseconds, rank after rank}, which sum to ``makespan_ps``
    everywhere, and ``events``. All groups start together and the optimiser starts when the last rank of the last group
    is done, because the gradient norm is a sum over all of them.
    """
    plan, lines = programs(scenario, policy), _lines(scenario, policy, chunk_ps)
    done, optimizer = max(line.makespan_ps for line in lines), int(to_ps(optimizer_s(scenario, policy)))
    parts = {name: np.zeros((len(plan), len(lines)), dtype=np.int64) for name in PARTS}
    for rank, program in enumerate(plan):
        for group in range(len(lines)):
            for chunk, spent in zip(program, chunk_ps[rank, group].tolist(), strict=True):
                parts[_PART_OF.get(chunk.kind, chunk.kind)][rank, group] += spent
    parts["optimizer"] += optimizer
    parts["bubble"] += done + optimizer - sum(parts.values())
    return {
        "parts": {name: value.ravel() for name, value in parts.items()},
        "makespan_ps": done + optimizer,
        "events": sum(line.n_events for line in lines),
    }


def _lines(
    scenario: Scenario, policy: Policy, chunk_ps: Mapping[tuple[int, int], I64]
) -> list[pipeline.PipelineTimeline]:
    """Return the times of every EP group's chunks."""
    plan = programs(scenario, policy)
    engine = pipeline.simulate if scenario.schedule.engine == "simpy" else pipeline.recurrence
    hop_ps = int(to_ps(hop_s(scenario, policy)))
    groups = range(scenario.parallel_of(policy).ep_groups)
    return [engine(plan, [chunk_ps[rank, group] for rank in range(len(plan))], hop_ps) for group in groups]


def recorded_pipeline(
    scenario: Scenario, policy: Policy, step: int, chunk_ps: Mapping[tuple[int, int], I64]
) -> RecordedPipeline:
    """Return step ``step`` of replica 0 for a timeline, from the times of its chunks as in `pipelined_step`."""
    plan, lines = programs(scenario, policy), _lines(scenario, policy, chunk_ps)
    done = max(line.makespan_ps for line in lines)
    return RecordedPipeline(
        policy.name,
        0,
        step,
        tuple(tuple(program) for program in plan),
        tuple(np.stack([line.start_ps[rank] for line in lines]) for rank in range(len(plan))),
        tuple(np.stack([line.end_ps[rank] for line in lines]) for rank in range(len(plan))),
        (done, done + int(to_ps(optimizer_s(scenario, policy)))),
        scenario.tokens_per_rank // scenario.schedule.micro_batches,
    )
