"""From counts to a plan: the operations of one step of one expert-parallel group, their order and their durations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.conservation import check_flops
from sim.engine.chain import Item, Key, chain, ends, expert_part, interleave
from sim.engine.durations import Durations, Way, slowdowns, slowed_ps
from sim.engine.plan import Op, Plan
from sim.exchange import Exchange
from sim.network import Network
from sim.pipeline.blocks import layer_blocks
from sim.scenario import Scenario
from sim.settings import Policy
from sim.tokens import I64


@dataclass(frozen=True, slots=True)
class Work:
    """What one policy's step has to do: ``exchanges[l][m]`` of MoE layer l (0-based) and micro-batch m."""

    scenario: Scenario
    policy: Policy
    network: Network
    exchanges: Sequence[Sequence[Exchange]]


def build_plan(work: Work) -> Plan:
    """Return the plan of one step. Raises ConservationError if the expert FLOPs billed are not those routed."""
    scenario, schedule = work.scenario, work.scenario.schedule
    d = Durations(scenario, work.policy, work.network, overlapped=schedule.overlap != "none")
    blocks, shared = layer_blocks(d.model), d.model.shared_expert_parameters > 0
    micros, training = range(schedule.micro_batches), schedule.phase == "training"

    def passes(micro: int, way: Way, before: tuple[Key, ...] = ()) -> list[list[Item]]:
        return chain(micro, way, blocks, shared=shared, tensor_parallel=d.parallel.tp_size > 1, before=before)

    program: list[Item] = []
    if schedule.overlap == "forward_backward":
        # Steady state: the forward of the next micro-batch beside the backward of this one, whose own forward lies
        # before the window; so backward chains wait for nothing but the streams.
        for micro in micros:
            program += interleave([passes((micro + 1) % len(micros), "forward"), passes(micro, "backward")])
    else:
        width = 2 if schedule.overlap == "micro_batches" else 1
        for group in (micros[i : i + width] for i in range(0, len(micros), width)):
            forward = [passes(micro, "forward") for micro in group]
            program += interleave(forward)
            if training:
                before = {micro: ends(items[-1]) for micro, items in zip(group, forward, strict=True)}
                program += interleave([passes(micro, "backward", before[micro]) for micro in group])
    index = {item.key: i for i, item in enumerate(program)}
    transfers: dict[tuple[int, int, str], tuple[I64, I64]] = {}

    def duration(key: Key) -> tuple[I64, I64 | None]:
        layer, phase = key.block.layer, key.phase
        if phase in ("dispatch", "combine"):
            at = (layer, key.chain, phase)
            if at not in transfers:
                exchange = work.exchanges[d.moe_index[layer]][key.chain]
                transfers[at] = d.transfer_ps(exchange, phase)  # type: ignore[arg-type]
            return transfers[at]
        if phase in ("experts", "experts_wgrad"):
            exchange = work.exchanges[d.moe_index[layer]][key.chain]
            return d.experts_ps(exchange, expert_part(key)), None
        return np.full(d.n_ranks, d.even_ps(key.block, phase, key.way), dtype=np.int64), None

    slowdown = slowdowns(scenario, work.policy)[0, 0]
    ops = []
    for item in program:
        key, (duration_ps, transfer_ps) = item.key, duration(item.key)
        if item.stream == "compute":
            duration_ps = slowed_ps(duration_ps, slowdown)
        after = tuple(sorted(index[before] for before in item.after))
        backward = key.way != "forward"
        ops.append(Op(key.phase, key.block.layer, key.chain, backward, item.stream, after, duration_ps, transfer_ps))
    pairs = sum(int(e.rows.sum()) for layer in work.exchanges for e in layer)
    check_flops(d.billed_expert_flops, pairs * (3 if training else 1), d.model.expert_flops)
    return Plan(d.n_ranks, tuple(ops))
