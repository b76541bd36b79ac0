"""From counts to a plan: the operations of one step, their order on the streams, and their durations.

One MoE layer, forward: attention (projections, core, norms, gate) -> dispatch -> experts -> combine, the shared experts
while the dispatch is in flight. Backward mirrors it: the gradients are dispatched to the experts, these run dgrad, the
results are combined, and wgrad fills the time that the combine takes (as in DualPipe and ZB1P). A dense layer is compute
only; tensor parallelism adds an all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.conservation import check_flops
from sim.cost import Part
from sim.cost.elementwise import elementwise_bytes_per_token
from sim.engine.plan import Op, Plan, Stream
from sim.exchange import Exchange, token_bytes
from sim.hardware import BYTES_PER_ELEMENT
from sim.model import Model
from sim.network import Network
from sim.scenario import Policy, Scenario
from sim.tokens import F64, I64
from sim.units import to_ps

Duration = tuple[I64, I64 | None]  # duration_ps [P], transfer_ps [P, P] or None
Key = tuple[int, bool, int, str]  # micro_batch, backward, layer, phase

# How one layer's phases of two interleaved micro-batches share the streams: phases of equal slot stand side by side.
_SLOT = {
    "attention": 0, "dense_ffn": 1, "tensor_parallel": 2, "dispatch": 2, "shared_experts": 3, "experts": 4, "combine": 5,
}  # fmt: skip
_SLOT_BACKWARD = {
    "dispatch": 0, "shared_experts": 1, "dense_ffn": 1, "experts": 2, "experts_wgrad": 3, "combine": 3, "attention": 4,
    "tensor_parallel": 5,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """What one policy's step has to do: ``exchanges[l][m]`` of MoE layer l (0-based) and micro-batch m."""

    scenario: Scenario
    policy: Policy
    network: Network
    exchanges: Sequence[Sequence[Exchange]]


class Durations:
    """Seconds of every phase, as integer picoseconds per rank."""

    def __init__(self, work: Work) -> None:
        scenario, policy = work.scenario, work.policy
        self.work, self.cost = work, scenario.cost
        self.model: Model = scenario.model_of(policy)
        self.parallel = scenario.parallel_of(policy)
        self.device = scenario.cluster.device
        self.n_ranks = self.parallel.ep_size
        self.tokens = scenario.tokens_per_rank // scenario.schedule.micro_batches
        lent = self.cost.communication.sms(self.cost.mode) if self.model.is_moe and self.n_ranks > 1 else 0
        overlapped = scenario.schedule.overlap != "none"
        self.sm_fraction = (self.device.n_sm - lent) / self.device.n_sm if overlapped else 1.0
        self.element = BYTES_PER_ELEMENT[self.cost.gemm_dtype]
        self.moe_index = {layer: i for i, layer in enumerate(self.model.moe_layers)}
        self.billed_expert_flops = 0
        self._same: dict[tuple[bool, str, bool], F64] = {}

    def _gemm(self, flops: float, parameters: float, width: int, backward: bool) -> F64:
        if flops <= 0:
            return np.zeros(())
        shards = self.parallel.tp_size
        total = np.zeros(())
        for part in ("dgrad", "wgrad") if backward else ("forward",):
            total = total + self.cost.compute.gemm_s(
                self.device,
                tokens=self.tokens * shards,
                flops_per_token=flops / shards,
                weight_bytes=parameters / shards * self.element,
                activation_bytes_per_token=2.0 * width * self.element,
                dtype=self.cost.gemm_dtype,
                sm_fraction=self.sm_fraction,
                part=part,
            )
        return total

    def same(self, layer: int, phase: str, backward: bool) -> F64:
        """Seconds of a phase that does not depend on routing; equal for all ranks and layers of one sort."""
        key = (layer in self.moe_index, phase, backward)
        if key in self._same:
            return self._same[key]
        model, scenario = self.model, self.work.scenario
        flops = model.layer_flops_per_token(layer, scenario.schedule.sequence_length)
        weights = model.layer_parameters(layer)
        if phase == "attention":
            heads = model.num_attention_heads
            qk = (
                (model.qk_nope_head_dim or 0) + (model.qk_rope_head_dim or 0)
                or model.head_dim
                or model.hidden_size // heads
            )
            v = model.v_head_dim or model.head_dim or model.hidden_size // heads
            is_moe = layer in self.moe_index
            seconds = (
                self._gemm(
                    flops.attention_projection + flops.router,
                    weights.attention_projection + weights.router,
                    model.hidden_size,
                    backward,
                )
                + self.cost.compute.attention_core_s(
                    self.device,
                    tokens=self.tokens,
                    flops_per_token=flops.attention_core,
                    dtype="bf16",
                    sm_fraction=self.sm_fraction,
                    direction="backward" if backward else "forward",
                )
                + self.cost.compute.elementwise_s(
                    self.device,
                    bytes=self.tokens
                    * elementwise_bytes_per_token(
                        hidden_size=model.hidden_size,
                        moe_intermediate_size=(model.moe_intermediate_size if is_moe else model.intermediate_size) or 0,
                        num_experts_per_tok=model.num_experts_per_tok if is_moe else 1,
                        attention_width=2 * heads * (qk + v),
                        direction="backward" if backward else "forward",
                    ),
                )
            )
        elif phase == "shared_experts":
            seconds = self._gemm(flops.shared_experts, weights.shared_experts, model.hidden_size, backward)
        elif phase == "dense_ffn":
            seconds = self._gemm(flops.dense_ffn, weights.dense_ffn, model.hidden_size, backward)
        else:  # tensor_parallel: two ring all-reduces of the group's hidden states over the node's links
            shards, link = self.parallel.tp_size, scenario.cluster.intra_node
            volume = 2 * 2 * (shards - 1) / shards * self.tokens * shards * model.hidden_size * 2
            seconds = np.asarray(volume / link.rate_bytes_per_s + 4 * (shards - 1) * link.latency_s)
        self._same[key] = seconds
        return seconds

    def experts(self, exchange: Exchange, part: Part) -> F64:
        """Seconds [P] of each rank's routed experts for one micro-batch and pass."""
        computed = exchange.expert_tokens if exchange.computed_tokens is None else exchange.computed_tokens
        per_expert = computed.sum(axis=0)
        pairs = np.bincount(exchange.expert_rank, weights=per_expert, minlength=self.n_ranks)
        active = np.bincount(exchange.expert_rank, weights=per_expert > 0, minlength=self.n_ranks)
        self.billed_expert_flops += int(pairs.sum()) * self.model.expert_flops
        seconds = self.cost.compute.grouped_gemm_s(
            self.device,
            pairs=pairs,
            active_experts=active,
            ep_tokens=exchange.rank_tokens.sum(axis=0),
            hidden_size=self.model.dispatch_hidden_size,
            moe_intermediate_size=self.model.moe_intermediate_size or 0,
            dtype=self.cost.gemm_dtype,
            sm_fraction=self.sm_fraction,
            part=part,
        )
        return np.where(pairs > 0, seconds, 0.0)

    def transfer(self, exchange: Exchange, direction: str) -> Duration:
        """Durations of a dispatch, or of the combine that brings the same tokens back."""
        dtype = self.cost.dispatch_dtype if direction == "dispatch" else self.cost.combine_dtype
        seconds, reaches = self.cost.communication.pair_times_s(
            self.work.network,
            rank_tokens=exchange.sent(self.cost.mode),
            node_tokens=exchange.node_tokens,
            bytes_per_token=token_bytes(self.model.dispatch_hidden_size, dtype),
            mode=self.cost.mode,
            direction=direction,  # type: ignore[arg-type]
        )
        if direction == "combine":
            seconds, reaches = seconds.T, reaches.T
        transfer = np.where(reaches, to_ps(seconds), np.int64(-1))
        return np.maximum(transfer.max(axis=1), 0), transfer


@dataclass(frozen=True, slots=True)
class _Item:
    """An operation before it has a place in the program: its slot within the layer and the items it waits for."""

    slot: int
    key: Key
    stream: Stream
    after: tuple[Key, ...]
    duration: Duration


def _layer_items(
    d: Durations,
    layer: int,
    micro: int,
    backward: bool,
    before: tuple[Key, ...],
    cache: dict[tuple[int, int, str], Duration],
) -> list[_Item]:
    """Return the operations of one layer, micro-batch and direction; ``before`` must end first."""
    slots = _SLOT_BACKWARD if backward else _SLOT

    def key(phase: str) -> Key:
        return (micro, backward, layer, phase)

    def even(phase: str) -> Duration:
        return np.full(d.n_ranks, int(to_ps(d.same(layer, phase, backward))), dtype=np.int64), None

    def item(phase: str, stream: Stream, after: tuple[Key, ...], duration: Duration) -> _Item:
        return _Item(slots[phase], key(phase), stream, after, duration)

    tensor_parallel = d.parallel.tp_size > 1
    items: list[_Item] = []
    if layer in d.moe_index:
        exchange = d.work.exchanges[d.moe_index[layer]][micro]
        for direction in ("dispatch", "combine"):
            if (layer, micro, direction) not in cache:
                cache[layer, micro, direction] = d.transfer(exchange, direction)
        dispatch, combine = cache[layer, micro, "dispatch"], cache[layer, micro, "combine"]
        experts = to_ps(d.experts(exchange, "dgrad" if backward else "forward"))
        shared = d.model.n_shared_experts > 0 or bool(d.same(layer, "shared_experts", backward) > 0)
        first = before
        if not backward:
            items.append(item("attention", "compute", before, even("attention")))
            first = (key("attention"),)
        items.append(item("dispatch", "communication", first, dispatch))
        if shared:
            items.append(item("shared_experts", "compute", first, even("shared_experts")))
        items.append(item("experts", "compute", (key("dispatch"),), (experts, None)))
        items.append(item("combine", "communication", (key("experts"),), combine))
        if backward:
            wgrad = to_ps(d.experts(exchange, "wgrad"))
            items.append(item("experts_wgrad", "compute", (key("experts"),), (wgrad, None)))
        last: tuple[Key, ...] = (key("combine"), key("shared_experts")) if shared else (key("combine"),)
        if backward:
            items.append(item("attention", "compute", last, even("attention")))
            last = (key("attention"),)
    else:
        order = ("dense_ffn", "attention") if backward else ("attention", "dense_ffn")
        items.append(item(order[0], "compute", before, even(order[0])))
        items.append(item(order[1], "compute", (key(order[0]),), even(order[1])))
        last = (key(order[1]),)
    if tensor_parallel:
        items.append(_Item(6, key("tensor_parallel"), "communication", last, even("tensor_parallel")))
    return items


def _ends(items: list[_Item]) -> tuple[Key, ...]:
    """Return the keys nobody in ``items`` waits for: what the next layer has to wait for."""
    waited = {key for item in items for key in item.after}
    return tuple(item.key for item in items if item.key not in waited)


def build_plan(work: Work) -> Plan:
    """Return the plan of one step. Raises ConservationError if the expert FLOPs billed are not those routed."""
    d = Durations(work)
    schedule = work.scenario.schedule
    layers = range(d.model.num_hidden_layers)
    cache: dict[tuple[int, int, str], Duration] = {}

    def chain(micro: int, backward: bool, before: tuple[Key, ...] = ()) -> list[list[_Item]]:
        blocks = []
        for layer in reversed(layers) if backward else layers:
            block = _layer_items(d, layer, micro, backward, before, cache)
            before = _ends(block)
            blocks.append(block)
        return blocks

    micros = range(schedule.micro_batches)
    training = schedule.phase == "training"
    program: list[_Item] = []
    if schedule.overlap == "forward_backward":
        # Steady state: the forward of the next micro-batch beside the backward of this one, whose own forward lies
        # before the window; so backward chains wait for nothing but the streams.
        for micro in micros:
            program += _interleave([chain((micro + 1) % len(micros), False), chain(micro, True)])
    else:
        width = 2 if schedule.overlap == "micro_batches" else 1
        for group in (micros[i : i + width] for i in range(0, len(micros), width)):
            forward = [chain(micro, False) for micro in group]
            program += _interleave(forward)
            if training:
                ends = {micro: _ends(blocks[-1]) for micro, blocks in zip(group, forward, strict=True)}
                program += _interleave([chain(micro, True, ends[micro]) for micro in group])
    index = {item.key: i for i, item in enumerate(program)}
    ops = tuple(
        Op(
            phase=item.key[3],
            layer=item.key[2],
            micro_batch=item.key[0],
            backward=item.key[1],
            stream=item.stream,
            after=tuple(sorted(index[key] for key in item.after)),
            duration_ps=item.duration[0],
            transfer_ps=item.duration[1],
        )
        for item in program
    )
    pairs = sum(
        int((e.expert_tokens if e.computed_tokens is None else e.computed_tokens).sum())
        for layer in work.exchanges
        for e in layer
    )
    check_flops(d.billed_expert_flops, pairs * (3 if training else 1), d.model.expert_flops)
    return Plan(d.n_ranks, ops)


def _interleave(chains: list[list[list[_Item]]]) -> list[_Item]:
    """Merge chains layer by layer; within a layer by slot, earlier chains first. Keeps every chain's own order."""
    merged: list[_Item] = []
    for blocks in zip(*chains, strict=True):
        merged += sorted((item for block in blocks for item in block), key=lambda item: item.slot)
    return merged
