"""From work to seconds: kernels on a device, token movement over a network. Pure functions of arrays, no clock.

Two families, one file per member: `ComputeCost` (``calibrated``, ``roofline``, ``table``) and `CommunicationCost`
(``port``, ``flow``, ``all_gather``, ``alpha_beta``, ``table``); `sim.cost.collectives` are functions. Times are those of
one kernel or one all-to-all by itself. Two figures couple them where they overlap: ``sm_fraction``, the share of SMs
left to compute, and `CommunicationCost.overlap_slowdown`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from sim.cost.attention import AttentionShape, Phase
from sim.hardware import Device, Dtype
from sim.network import Network
from sim.plugin import Plugin
from sim.tokens import F64, Bool

Part = Literal["forward", "dgrad", "wgrad"]
Pass = Literal["forward", "backward"]
Mode = Literal["normal", "low_latency"]
Direction = Literal["dispatch", "combine"]


class ComputeCost(Plugin):
    """Seconds of kernels on one device. Arguments broadcast as numpy arrays; results are float64 of that shape.

    ``sm_fraction`` in (0, 1] scales compute rates, not memory bandwidth: a few SMs saturate HBM. Every method raises
    ValueError for a number format that the device lacks.
    """

    @abstractmethod
    def grouped_gemm_s(
        self,
        device: Device,
        *,
        expert_tokens: npt.ArrayLike,
        ep_tokens: npt.ArrayLike,
        hidden_size: int,
        moe_intermediate_size: int,
        dtype: Dtype,
        sm_fraction: npt.ArrayLike = 1.0,
        part: Part = "forward",
        products_only: bool = False,
    ) -> F64:
        """Return the time of a rank's routed experts in one layer: gate, up and down projection.

        expert_tokens: [..., e], the tokens of each of the rank's experts, zero where none; order does not matter, and
        zeros may be appended where ranks hold different numbers. Result: [...]. Small batches take as long as reading
        the experts that have tokens, and the rows of each are padded to the kernel's tile.
        ep_tokens: tokens in the buffer that the kernel walks: those of the whole EP group where every rank sees all
        tokens (all-gather), those received under DeepEP.
        part: one forward, activation-gradient (dgrad) or weight-gradient (wgrad) pass; each has the forward's FLOPs, so
        a backward is dgrad + wgrad.
        products_only: whether to leave out the kernels around the products (quantisation, permutation, the walk over
        ``ep_tokens``), for callers that count these among elementwise kernels.
        """

    @abstractmethod
    def gemm_s(
        self,
        device: Device,
        *,
        tokens: npt.ArrayLike,
        in_features: npt.ArrayLike,
        out_features: npt.ArrayLike,
        dtype: Dtype,
        sm_fraction: npt.ArrayLike = 1.0,
        part: Part = "forward",
        quantise: bool = False,
    ) -> F64:
        """Return the time of one dense product [tokens, in_features] x [in_features, out_features], bf16 out.

        Several matrices of one input (query, key and value; gate and up) are one product of their summed outputs.
        ``part`` as in `grouped_gemm_s`. quantise: whether the kernel that brings a bf16 input into ``dtype`` counts;
        training counts it among its elementwise kernels.
        """

    @abstractmethod
    def attention_core_s(
        self,
        device: Device,
        *,
        tokens: npt.ArrayLike,
        flops_per_token: npt.ArrayLike,
        dtype: Dtype,
        sm_fraction: npt.ArrayLike = 1.0,
        direction: Pass = "forward",
    ) -> F64:
        """Return the time of a training pass of softmax(QK^T)V without projections; serving has `attention_s`.

        flops_per_token: of the forward pass, also when ``direction`` is backward, which costs 2.5 times as many (five
        matrix products against two, FlashAttention-2, arXiv 2307.08691).
        """

    @abstractmethod
    def attention_s(
        self,
        device: Device,
        *,
        shape: AttentionShape,
        phase: Phase,
        query_tokens: npt.ArrayLike,
        kv_tokens: npt.ArrayLike,
        cache_bytes_per_element: float = 2.0,
        window: int | None = None,
        sm_fraction: npt.ArrayLike = 1.0,
    ) -> F64:
        """Return the time [...] of one layer's softmax(QK^T)V for a batch of requests [..., r], activations in bf16.

        shape: `sim.cost.attention.attention_shape` of the model in ``phase``. query_tokens: new tokens of each request,
        zero where a place is empty: its chunk in prefill, 1 (more with speculation) in decode. kv_tokens: its whole
        context, these included. window: most positions that a query attends to, for sliding windows and sparse
        attention.
        """

    @abstractmethod
    def elementwise_s(self, device: Device, *, bytes: npt.ArrayLike, kernels: npt.ArrayLike = 0) -> F64:
        """Return the time of memory-bound kernels that read and write ``bytes`` in all.

        kernels: how many are launched on their own, each with its overhead; 0 where the bytes are a lumped count.
        """

    @abstractmethod
    def provenance(self, device: Device, step_in: Dtype | None = None) -> str:
        """Return where the constants for ``device`` come from, for reports: of all kernels, or of those of a training
        step whose products run in ``step_in``."""


class CommunicationCost(Plugin):
    """Seconds of one all-to-all with DeepEP's semantics (normal and low-latency kernels).

    num_sms: SMs that normal-mode kernels occupy while they run (DeepSeek-V3 report, section 3.2.2: 20); the low-latency
    kernels return theirs to compute while data is in flight, and count as 0.

    dispatch_contention, combine_contention: how many times longer the transfer (not its latencies) of a normal kernel
    takes beside GEMMs than alone: both read and write the same HBM and L2, the copying SMs lose issue slots and their
    loads queue behind the GEMM's tiles. Set on deepseek-ai/profile-data train.json (February 2025, EP64, 4,096 tokens):
    medians of 3.88 and 6.06 ms against 2.66 and 5.16 ms that ``port`` with ``release: v1_first`` gives alone. Not seen
    in isolated tables, and not known for low-latency kernels, which stay at 1.
    """

    num_sms: Annotated[int, Field(ge=0)] = 20
    dispatch_contention: Annotated[float, Field(ge=1)] = 1.45
    combine_contention: Annotated[float, Field(ge=1)] = 1.16

    def sms(self, mode: Mode) -> int:
        """Return how many SMs compute has to do without while an all-to-all of ``mode`` runs."""
        return self.num_sms if mode == "normal" else 0

    def overlap_slowdown(self, direction: Direction, mode: Mode = "normal") -> float:
        """Return what to pass as ``slowdown`` to `pair_times_s` where compute runs at the same time; 1 when alone."""
        if mode == "low_latency":
            return 1.0
        return self.dispatch_contention if direction == "dispatch" else self.combine_contention

    @abstractmethod
    def pair_times_s(
        self,
        network: Network,
        *,
        rank_tokens: npt.ArrayLike,
        node_tokens: npt.ArrayLike,
        bytes_per_token: float,
        mode: Mode,
        direction: Direction = "dispatch",
        slowdown: float = 1.0,
    ) -> tuple[F64, Bool]:
        """Return ``(seconds, reaches)``, float64 and bool [..., P, P], indexed [token's owner s, expert's rank r].

        Dispatch: seconds from the start of s's dispatch until all that s sends to r has arrived, latency and kernel
        overhead included. Combine: the same data backwards, from the start of r's combine until r's results are back at
        s; pass the same (dispatch) token matrices and the combine's ``bytes_per_token``. Links are full duplex and
        alike in both directions, so only the overhead differs; transpose to read combine as [sender, receiver].
        ``reaches`` is False, and the time 0, where nothing travels; the diagonal never leaves the device.

        slowdown: factor on transfer times, latencies and overhead left alone (see `overlap_slowdown`).
        rank_tokens: [..., P, P], batch axes may lead; tokens of s for rank r, counted once per token in ``normal`` mode and once per (token,
        expert) pair in ``low_latency`` mode. node_tokens: [P, N], tokens of s with an expert on node n, counted once;
        read in ``normal`` mode: one copy per remote node travels to the peer rank of equal position, which forwards it
        inside the node. bytes_per_token: fp8 with scales is h + h/128*4 (7,392 for DeepSeek-V3), bf16 is 2h (14,336).

        Raises ValueError for arrays of other shapes, negative or not finite counts.
        """


def checked_tokens(network: Network, rank_tokens: npt.ArrayLike, node_tokens: npt.ArrayLike) -> tuple[F64, F64]:
    """Return both as float64 of shapes [..., P, P] and [..., P, N]; ValueError says which one is wrong."""
    ranks, nodes = network.n_ranks, network.n_nodes
    checked = []
    wanted = (("rank_tokens", rank_tokens, (ranks, ranks)), ("node_tokens", node_tokens, (ranks, nodes)))
    for name, value, shape in wanted:
        array = np.asarray(value, dtype=np.float64)
        if array.shape[-2:] != shape:
            raise ValueError(f"{name} has shape {array.shape}, the network needs {shape} (batch axes may lead)")
        # min and max pass NaN on, and NaN fails both comparisons.
        if not (array.min(initial=0.0) >= 0 and array.max(initial=0.0) < np.inf):
            raise ValueError(f"{name} has a negative or not finite count")
        checked.append(array)
    if checked[0].shape[:-2] != checked[1].shape[:-2]:
        raise ValueError(
            f"rank_tokens and node_tokens have different batch axes: {checked[0].shape[:-2]}, {checked[1].shape[:-2]}"
        )
    return checked[0], checked[1]
