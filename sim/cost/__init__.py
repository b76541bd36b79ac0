"""From work to seconds: kernels on a device, token movement over a network. Pure functions of arrays, no clock.

Two families, one file per member: `ComputeCost` (``calibrated``, ``roofline``) and `CommunicationCost` (``port``,
``alpha_beta``). Times are those of one kernel or one all-to-all by itself: work that overlaps is measured 1.2-1.8
times slower on real machines (DeepSeek-V3 training trace against isolated DeepEP) and that slowdown is not modelled.
Only ``sm_fraction``, the share of SMs left to compute, couples the two.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

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
    ) -> F64:
        """Return the time of a rank's routed experts in one layer: gate, up and down projection.

        expert_tokens: [..., e], the tokens of each of the rank's experts, zero where none; order does not matter, and
        zeros may be appended where ranks hold different numbers. Result: [...]. Small batches take as long as reading
        the experts that have tokens, and the rows of each are padded to the kernel's tile.
        ep_tokens: tokens in the buffer that the kernel walks: those of the whole EP group where every rank sees all
        tokens (all-gather), those received under DeepEP.
        part: one forward, activation-gradient (dgrad) or weight-gradient (wgrad) pass; each has the forward's FLOPs, so
        a backward is dgrad + wgrad.
        """

    @abstractmethod
    def gemm_s(
        self,
        device: Device,
        *,
        tokens: npt.ArrayLike,
        flops_per_token: npt.ArrayLike,
        weight_bytes: npt.ArrayLike,
        activation_bytes_per_token: npt.ArrayLike,
        dtype: Dtype,
        sm_fraction: npt.ArrayLike = 1.0,
        part: Part = "forward",
    ) -> F64:
        """Return the time of dense GEMMs (projections, shared experts, head); ``part`` as in `grouped_gemm_s`."""

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
        bytes_per_token: npt.ArrayLike = 0.0,
    ) -> F64:
        """Return the time of softmax(QK^T)V without projections.

        flops_per_token: of the forward pass, also when ``direction`` is backward, which costs 2.5 times as many (five
        matrix products against two, FlashAttention-2, arXiv 2307.08691). bytes_per_token: HBM traffic per token, in
        decode its KV cache; the time is never below the time of reading it.
        """

    @abstractmethod
    def elementwise_s(self, device: Device, *, bytes: npt.ArrayLike) -> F64:
        """Return the time of memory-bound kernels that read and write ``bytes`` in all."""

    @abstractmethod
    def provenance(self, device: Device) -> str:
        """Return where the constants for ``device`` come from, for reports."""


class CommunicationCost(Plugin):
    """Seconds of one all-to-all with DeepEP's semantics (normal and low-latency kernels).

    num_sms: SMs that normal-mode kernels occupy while they run (DeepSeek-V3 report, section 3.2.2: 20); the low-latency
    kernels return theirs to compute while data is in flight, and count as 0.
    """

    num_sms: Annotated[int, Field(ge=0)] = 20

    def sms(self, mode: Mode) -> int:
        """Return how many SMs compute has to do without while an all-to-all of ``mode`` runs."""
        return self.num_sms if mode == "normal" else 0

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
    ) -> tuple[F64, Bool]:
        """Return ``(seconds [P, P] float64, reaches [P, P] bool)``, both indexed [token's owner s, expert's rank r].

        Dispatch: seconds from the start of s's dispatch until all that s sends to r has arrived, latency and kernel
        overhead included. Combine: the same data backwards, from the start of r's combine until r's results are back at
        s; pass the same (dispatch) token matrices and the combine's ``bytes_per_token``. Links are full duplex and
        alike in both directions, so only the overhead differs; transpose to read combine as [sender, receiver].
        ``reaches`` is False, and the time 0, where nothing travels; the diagonal never leaves the device.

        rank_tokens: [P, P], tokens of s for rank r, counted once per token in ``normal`` mode and once per (token,
        expert) pair in ``low_latency`` mode. node_tokens: [P, N], tokens of s with an expert on node n, counted once;
        read in ``normal`` mode: one copy per remote node travels to the peer rank of equal position, which forwards it
        inside the node. bytes_per_token: fp8 with scales is h + h/128*4 (7,392 for DeepSeek-V3), bf16 is 2h (14,336).

        Raises ValueError for arrays of other shapes, negative or not finite counts.
        """


def checked_tokens(network: Network, rank_tokens: npt.ArrayLike, node_tokens: npt.ArrayLike) -> tuple[F64, F64]:
    """Return both matrices as float64 of shapes [P, P] and [P, N]; ValueError says which one is wrong."""
    ranks, nodes = network.n_ranks, network.n_nodes
    checked = []
    wanted = (("rank_tokens", rank_tokens, (ranks, ranks)), ("node_tokens", node_tokens, (ranks, nodes)))
    for name, value, shape in wanted:
        array = np.asarray(value, dtype=np.float64)
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, the network needs {shape}")
        # min and max pass NaN on, and NaN fails both comparisons.
        if not (array.min() >= 0 and array.max() < np.inf):
            raise ValueError(f"{name} has a negative or not finite count")
        checked.append(array)
    return checked[0], checked[1]
