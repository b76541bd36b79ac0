"""Seconds of every phase of a layer, as integer picoseconds: what the cost laws say about one policy's work."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from sim.cost import Direction, Part
from sim.cost.collectives import all_reduce_s
from sim.cost.elementwise import expert_pair_bytes, trunk_bytes
from sim.exchange import Exchange, by_rank, token_bytes
from sim.hardware import Dtype
from sim.model import Model
from sim.network import Network
from sim.pipeline.blocks import Block, head_flops
from sim.scenario import Scenario
from sim.settings import Policy
from sim.tokens import F64, I64
from sim.units import to_ps

Way = Literal["forward", "backward", "input", "weights"]
"""A chain's direction. ``backward`` is both of what ``input`` (activation gradients) and ``weights`` do."""
PARTS: dict[Way, tuple[Part, ...]] = {
    "forward": ("forward",),
    "backward": ("dgrad", "wgrad"),
    "input": ("dgrad",),
    "weights": ("wgrad",),
}


def slowdowns(scenario: Scenario, policy: Policy) -> F64:
    """Return [pipeline rank, group, EP rank]: factors on compute times from the scenario's stragglers."""
    parallel = scenario.parallel_of(policy)
    factors = np.ones((parallel.pp_size, parallel.ep_groups, parallel.ep_size))
    for slow in scenario.stragglers:
        if slow.device < factors.size:  # a policy of its own size may have fewer devices
            factors.flat[slow.device] = slow.slowdown
    return factors


def slowed_ps(duration_ps: I64, slowdown: F64) -> I64:
    """Return compute times [..., P] on devices with factors ``slowdown`` [P], rounded to picoseconds."""
    return duration_ps if (slowdown == 1).all() else np.rint(duration_ps * slowdown).astype(np.int64)


class Durations:
    """Durations of one policy's phases on its devices.

    overlapped: whether compute and communication run at the same time, so that compute lacks the SMs that the
    communication kernels hold, and these are slowed by what shares memory and links with them.
    Methods that take an `Exchange` keep its leading axes.
    """

    def __init__(self, scenario: Scenario, policy: Policy, network: Network, overlapped: bool) -> None:
        self.scenario, self.network, self.cost = scenario, network, scenario.cost
        self.model: Model = scenario.model_of(policy)
        self.parallel = scenario.parallel_of(policy)
        self.device = scenario.cluster.device
        self.n_ranks = self.parallel.ep_size
        self.choice_s = policy.replicas.seconds(scenario.slots(policy)) if self.model.is_moe else 0.0
        self.tokens = scenario.tokens_per_rank // scenario.schedule.micro_batches
        self.overlapped = overlapped
        lent = self.cost.communication.sms(self.cost.mode) if self.model.is_moe and self.n_ranks > 1 else 0
        if lent >= self.device.n_sm:  # few wide cores (TPU): copying is not their work
            lent = 0
        self.sm_fraction = (self.device.n_sm - lent) / self.device.n_sm if overlapped else 1.0
        self.moe_index = {layer: i for i, layer in enumerate(self.model.moe_layers)}
        self.billed_expert_flops = 0
        self._even: dict[tuple[str, str, Way], int] = {}

    def gemm_s(self, flops: float, parameters: float, width: int, way: Way, dtype: Dtype | None = None) -> float:
        """Seconds of a dense product of ``flops`` per token; split over the tensor-parallel ranks."""
        if flops <= 0:
            return 0.0
        shards, dtype = self.parallel.tp_size, dtype or self.cost.gemm_dtype
        return sum(
            float(
                self.cost.compute.gemm_s(
                    self.device,
                    tokens=self.tokens * shards,
                    in_features=width,
                    out_features=parameters / shards / width,
                    dtype=dtype,
                    sm_fraction=self.sm_fraction,
                    part=part,
                )
            )
            for part in PARTS[way]
        )

    def even_ps(self, block: Block, phase: str, way: Way) -> int:
        """Picoseconds of a phase that does not depend on routing; equal for all ranks and all blocks of one kind."""
        key = (block.kind, phase, way)
        if key not in self._even:
            seconds = {
                "attention": self._attention_s,
                "shared_experts": self._shared_s,
                "dense_ffn": self._dense_s,
                "tensor_parallel": self._tensor_parallel_s,
                "head": self._head_s,
            }[phase](block, way)
            self._even[key] = int(to_ps(np.asarray(seconds)))
        return self._even[key]

    def _attention_s(self, block: Block, way: Way) -> float:
        """Projections, router, core and the elementwise kernels of a layer, without those of its FFN; and the choice of
        replicas, which comes before the dispatch."""
        model, layer, heads = self.model, block.layer, self.model.num_attention_heads
        flops = model.layer_flops_per_token(layer, self.scenario.schedule.sequence_length)
        weights = model.layer_parameters(layer)
        seconds = self.gemm_s(
            flops.attention_projection + flops.router,
            weights.attention_projection + weights.router,
            model.hidden_size,
            way,
        )
        if way == "weights":
            return seconds
        if way == "forward" and block.kind == "moe":
            seconds += self.choice_s
        if way != "forward" and self.scenario.schedule.recompute == "selective":
            again = (
                model.up_projection_parameters
            )  # norms and SwiGLU are in the elementwise constants, set on such a run
            seconds += self.gemm_s(2 * again, again, model.hidden_size, "forward")
        direction: Literal["forward", "backward"] = "forward" if way == "forward" else "backward"
        core = self.cost.compute.attention_core_s(
            self.device,
            tokens=self.tokens,
            flops_per_token=flops.attention_core,
            dtype="bf16",
            sm_fraction=self.sm_fraction,
            direction=direction,
        )
        qk = (
            (model.qk_nope_head_dim or 0) + (model.qk_rope_head_dim or 0)
            or model.head_dim
            or model.hidden_size // heads
        )
        v = model.v_head_dim or model.head_dim or model.hidden_size // heads
        per_token = trunk_bytes(
            hidden_size=model.hidden_size, attention_width=2 * heads * (qk + v), direction=direction
        )
        elementwise = self.cost.compute.elementwise_s(self.device, bytes=self.tokens * per_token)
        return seconds + float(core) + float(elementwise)

    def _shared_s(self, block: Block, way: Way) -> float:
        flops = self.model.layer_flops_per_token(block.layer, self.scenario.schedule.sequence_length).shared_experts
        return self.gemm_s(flops, self.model.layer_parameters(block.layer).shared_experts, self.model.hidden_size, way)

    def _dense_s(self, block: Block, way: Way) -> float:
        flops = self.model.layer_flops_per_token(block.layer, self.scenario.schedule.sequence_length).dense_ffn
        seconds = self.gemm_s(flops, self.model.layer_parameters(block.layer).dense_ffn, self.model.hidden_size, way)
        return seconds + float(self._pairs_s(self.tokens, self.model.hidden_size, self.model.intermediate_size, way))

    def _pairs_s(self, pairs: npt.ArrayLike, hidden_size: int, width: int | None, way: Way) -> F64:
        """Elementwise kernels (permutation, SwiGLU, quantisation) of an FFN; none belong to the weight gradient."""
        if way == "weights":
            return np.zeros(np.shape(pairs))
        per_pair = expert_pair_bytes(
            hidden_size=hidden_size,
            moe_intermediate_size=width or 0,
            direction="forward" if way == "forward" else "backward",
        )
        return self.cost.compute.elementwise_s(self.device, bytes=np.asarray(pairs, np.float64) * per_pair)

    def _tensor_parallel_s(self, block: Block, way: Way) -> float:
        """Two all-reduces of the group's hidden states, in each direction (Megatron, arXiv 1909.08053, section 3)."""
        if way == "weights":
            return 0.0
        shards = self.parallel.tp_size
        message = self.tokens * shards * self.model.hidden_size * 2.0
        return 2 * float(all_reduce_s(self.scenario.cluster, shards, message, shards))

    def _head_s(self, block: Block, way: Way) -> float:
        """The output matrix in bf16 (DeepSeek-V3 report, section 3.3.1), and the logits through memory: bf16, written
        and read once in either direction."""
        flops = head_flops(self.model, block)
        seconds = self.gemm_s(flops, flops / 2, self.model.hidden_size, way, "bf16")
        if way == "weights":
            return seconds
        logits = self.tokens * 2.0 * 2 * self.model.vocab_size
        return seconds + float(self.cost.compute.elementwise_s(self.device, bytes=logits))

    def experts_ps(self, exchange: Exchange, part: Part) -> I64:
        """Picoseconds [..., P] of each rank's routed experts for one micro-batch and pass: their GEMMs, and the
        elementwise kernels of the pairs that it computes."""
        per_expert = exchange.rows
        local = by_rank(per_expert, exchange.expert_rank, self.n_ranks)
        self.billed_expert_flops += int(per_expert.sum()) * self.model.expert_flops
        seconds = self.cost.compute.grouped_gemm_s(
            self.device,
            expert_tokens=local,
            ep_tokens=exchange.rank_tokens.sum(axis=-2),
            hidden_size=self.model.dispatch_hidden_size,
            moe_intermediate_size=self.model.moe_intermediate_size or 0,
            dtype=self.cost.gemm_dtype,
            sm_fraction=self.sm_fraction,
            part=part,
            products_only=True,
        )
        way: Way = {"forward": "forward", "dgrad": "input", "wgrad": "weights"}[part]  # type: ignore[assignment]
        pairs = local.sum(axis=-1)
        seconds = seconds + self._pairs_s(pairs, self.model.dispatch_hidden_size, self.model.moe_intermediate_size, way)
        return to_ps(np.where(pairs > 0, seconds, 0.0))

    def transfer_ps(self, exchange: Exchange, direction: Direction) -> tuple[I64, I64]:
        """Picoseconds ([..., P], [..., P, P]) of a dispatch, or of the combine that brings the same tokens back."""
        dtype = self.cost.dispatch_dtype if direction == "dispatch" else self.cost.combine_dtype
        seconds, reaches = self.cost.communication.pair_times_s(
            self.network,
            rank_tokens=exchange.sent(self.cost.mode),
            node_tokens=exchange.node_tokens,
            bytes_per_token=token_bytes(self.model.dispatch_hidden_size, dtype),
            mode=self.cost.mode,
            direction=direction,
            slowdown=self.cost.communication.overlap_slowdown(direction, self.cost.mode) if self.overlapped else 1.0,
        )
        if direction == "combine":
            seconds, reaches = np.swapaxes(seconds, -1, -2), np.swapaxes(reaches, -1, -2)
        transfer: I64 = np.where(reaches, to_ps(seconds), np.int64(-1))
        return np.maximum(transfer.max(axis=-1), 0), transfer
