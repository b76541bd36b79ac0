"""Seconds of every phase of a layer, as integer picoseconds: what the cost laws say about one policy's work."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.cost import Direction, Part
from sim.cost.collectives import all_reduce_s
from sim.cost.elementwise import elementwise_bytes_per_token
from sim.exchange import Exchange, by_rank, token_bytes
from sim.hardware import BYTES_PER_ELEMENT, Dtype
from sim.model import Model
from sim.network import Network
from sim.scenario import Policy, Scenario
from sim.tokens import I64
from sim.units import to_ps

Way = Literal["forward", "backward", "input", "weights"]
"""A chain's direction. ``backward`` is both of what ``input`` (activation gradients) and ``weights`` do."""
PARTS: dict[Way, tuple[Part, ...]] = {
    "forward": ("forward",),
    "backward": ("dgrad", "wgrad"),
    "input": ("dgrad",),
    "weights": ("wgrad",),
}


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
        self.tokens = scenario.tokens_per_rank // scenario.schedule.micro_batches
        self.overlapped = overlapped
        lent = self.cost.communication.sms(self.cost.mode) if self.model.is_moe and self.n_ranks > 1 else 0
        self.sm_fraction = (self.device.n_sm - lent) / self.device.n_sm if overlapped else 1.0
        self.element = BYTES_PER_ELEMENT[self.cost.gemm_dtype]
        self.moe_index = {layer: i for i, layer in enumerate(self.model.moe_layers)}
        self.billed_expert_flops = 0
        self._even: dict[tuple[bool, str, Way], int] = {}

    def gemm_s(self, flops: float, parameters: float, width: int, way: Way, dtype: Dtype | None = None) -> float:
        """Seconds of a dense product of ``flops`` per token; split over the tensor-parallel ranks."""
        if flops <= 0:
            return 0.0
        shards, dtype = self.parallel.tp_size, dtype or self.cost.gemm_dtype
        element = BYTES_PER_ELEMENT[dtype]
        return sum(
            float(
                self.cost.compute.gemm_s(
                    self.device,
                    tokens=self.tokens * shards,
                    flops_per_token=flops / shards,
                    weight_bytes=parameters / shards * element,
                    activation_bytes_per_token=2.0 * width * element,
                    dtype=dtype,
                    sm_fraction=self.sm_fraction,
                    part=part,
                )
            )
            for part in PARTS[way]
        )

    def even_ps(self, layer: int, phase: str, way: Way) -> int:
        """Picoseconds of a phase that does not depend on routing; equal for all ranks and all layers of one sort."""
        key = (layer in self.moe_index, phase, way)
        if key not in self._even:
            seconds = {
                "attention": self._attention_s,
                "shared_experts": self._shared_s,
                "dense_ffn": self._dense_s,
                "tensor_parallel": self._tensor_parallel_s,
                "head": self._head_s,
            }[phase](layer, way)
            self._even[key] = int(to_ps(np.asarray(seconds)))
        return self._even[key]

    def _attention_s(self, layer: int, way: Way) -> float:
        """Projections, router, core and the elementwise kernels of a layer."""
        model, heads = self.model, self.model.num_attention_heads
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
        is_moe = layer in self.moe_index
        width = model.moe_intermediate_size if is_moe else model.intermediate_size
        per_token = elementwise_bytes_per_token(
            hidden_size=model.hidden_size,
            moe_intermediate_size=width or 0,
            num_experts_per_tok=model.num_experts_per_tok if is_moe else 1,
            attention_width=2 * heads * (qk + v),
            direction=direction,
        )
        elementwise = self.cost.compute.elementwise_s(self.device, bytes=self.tokens * per_token)
        return seconds + float(core) + float(elementwise)

    def _shared_s(self, layer: int, way: Way) -> float:
        flops = self.model.layer_flops_per_token(layer, self.scenario.schedule.sequence_length).shared_experts
        return self.gemm_s(flops, self.model.layer_parameters(layer).shared_experts, self.model.hidden_size, way)

    def _dense_s(self, layer: int, way: Way) -> float:
        flops = self.model.layer_flops_per_token(layer, self.scenario.schedule.sequence_length).dense_ffn
        return self.gemm_s(flops, self.model.layer_parameters(layer).dense_ffn, self.model.hidden_size, way)

    def _tensor_parallel_s(self, layer: int, way: Way) -> float:
        """Two all-reduces of the group's hidden states, in each direction (Megatron, arXiv 1909.08053, section 3)."""
        if way == "weights":
            return 0.0
        shards = self.parallel.tp_size
        message = self.tokens * shards * self.model.hidden_size * 2.0
        return 2 * float(all_reduce_s(self.scenario.cluster, shards, message, shards))

    def _head_s(self, layer: int, way: Way) -> float:
        """The output matrix in bf16 (DeepSeek-V3 report, section 3.3.1), and the logits through memory: bf16, written
        and read once in either direction."""
        size = self.model.vocab_size * self.model.hidden_size
        seconds = self.gemm_s(2 * size, size, self.model.hidden_size, way, "bf16")
        if way == "weights":
            return seconds
        logits = self.tokens * 2.0 * 2 * self.model.vocab_size
        return seconds + float(self.cost.compute.elementwise_s(self.device, bytes=logits))

    def experts_ps(self, exchange: Exchange, part: Part) -> I64:
        """Picoseconds [..., P] of each rank's routed experts for one micro-batch and pass."""
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
        )
        return to_ps(np.where(local.any(axis=-1), seconds, 0.0))

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
        )
        if direction == "combine":
            seconds, reaches = np.swapaxes(seconds, -1, -2), np.swapaxes(reaches, -1, -2)
        transfer: I64 = np.where(reaches, to_ps(seconds), np.int64(-1))
        return np.maximum(transfer.max(axis=-1), 0), transfer

