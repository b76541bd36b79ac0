"""Kernel times from constants fitted to measured tables; data-sheet ratios carry them to devices without a table."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from sim.cost import ComputeCost, Part, Pass
from sim.cost.roofline import BACKWARD_ATTENTION, expert_work, f64, sm_share
from sim.hardware import Device, Dtype, Efficiencies, GroupedGemm
from sim.tokens import F64

# H100 as a fraction of its data sheet (1,979 TFLOP/s fp8, 3.35 TB/s): cutlass fp8 block kernels on the DeepSeek-V3
# shape, 243 rows of aiconfigurator-core 0.12.0, moe_h100_sxm_trtllm: a 33 us, P 809 TFLOP/s, B 3.21 and C 1.9 TB/s.
H100_OVERHEAD_S = 33e-6
H100_FLOPS = 809 / 1979
H100_BANDWIDTH = 3.21 / 3.35
H100_TOKENS = 1.9 / 3.35
# Weight gradients against forward + dgrad, 802 to 1,327 TFLOP/s, in the DeepSeek-V3 training trace on H800.
WGRAD_RATIO = 802 / 1327
# DeepSeek-V3 training trace (deepseek-ai/profile-data train.json) on H800, the same chip; derived in h800.yaml.
H100_EFFICIENCIES = Efficiencies(
    gemm=0.483,
    gemm_wgrad=0.349,
    attention_forward=0.660,
    attention_backward=0.482,
    memory=0.958,
    source="DeepSeek-V3 training trace on H800",
)
TRANSFERRED = "transferred from H100 by spec ratio"


class Calibrated(ComputeCost):
    """Grouped GEMM: t = a + ((F/P)^q + (W/B)^q)^(1/q) + T*h*2/C, q = 1 unless the device's table asks otherwise.

    F: FLOPs, W: bytes of the active experts' weights and of the pairs' activations, T: ``ep_tokens``. On the 243
    H100 rows the constants came from, the mean error is 4.7 % (leave one EP degree out: 5.0 %). Dense GEMM: the longer
    of compute and memory at their measured efficiencies; attention: compute at its efficiency, or its bytes.
    """

    kind: Literal["calibrated"] = "calibrated"

    def constants(self, device: Device, dtype: Dtype) -> GroupedGemm:
        """Return the grouped GEMM constants for ``device``: measured, or H100's at the ratio of the data sheets."""
        peak = device.peak(dtype)
        measured = device.kernels.grouped_gemm(dtype)
        if measured is not None:
            return measured
        bandwidth = device.memory_bandwidth_bytes_per_s
        return GroupedGemm(
            overhead_s=H100_OVERHEAD_S,
            flops_per_s=H100_FLOPS * peak,
            bandwidth_bytes_per_s=H100_BANDWIDTH * bandwidth,
            token_bytes_per_s=H100_TOKENS * bandwidth,
            source=TRANSFERRED,
        )

    def provenance(self, device: Device) -> str:
        parts = []
        for dtype in ("bf16", "fp8", "fp4"):
            if getattr(device.peak_flops_per_s, dtype) is not None:
                measured = device.kernels.grouped_gemm(dtype)
                source = TRANSFERRED if measured is None else f"measured ({measured.source})"
                parts.append(f"grouped GEMM {dtype} {source}")
        measured_rest = device.kernels.efficiencies
        source = TRANSFERRED if measured_rest is None else f"measured ({measured_rest.source})"
        return "; ".join([*parts, f"dense GEMM, attention and elementwise {source}"])

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
        fit = self.constants(device, dtype)
        rate = fit.flops_per_s
        if part == "wgrad":
            rate = fit.wgrad_flops_per_s or WGRAD_RATIO * fit.flops_per_s
        flops, moved = expert_work(expert_tokens, hidden_size, moe_intermediate_size, dtype, part)
        compute, memory = flops / (rate * sm_share(sm_fraction)), moved / fit.bandwidth_bytes_per_s
        # The p-norm is taken relative to the larger term so that no power underflows.
        high, low = np.maximum(compute, memory), np.minimum(compute, memory)
        ratio = np.divide(low, high, out=np.zeros_like(high), where=high > 0)
        seconds: F64 = fit.overhead_s + high * (1 + ratio**fit.norm) ** (1 / fit.norm)
        if fit.token_bytes_per_s is not None:
            seconds = seconds + f64(ep_tokens) * hidden_size * 2 / fit.token_bytes_per_s
        return seconds

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
        share = device.kernels.efficiencies or H100_EFFICIENCIES
        n = f64(tokens)
        rate = device.peak(dtype) * (share.gemm_wgrad if part == "wgrad" else share.gemm)
        moved = f64(weight_bytes) + n * f64(activation_bytes_per_token)
        return np.maximum(
            n * f64(flops_per_token) / (rate * sm_share(sm_fraction)), self.elementwise_s(device, bytes=moved)
        )

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
        share = device.kernels.efficiencies or H100_EFFICIENCIES
        n = f64(tokens)
        flops, rate = n * f64(flops_per_token), device.peak(dtype)
        if direction == "backward":
            flops, rate = BACKWARD_ATTENTION * flops, rate * share.attention_backward
        else:
            rate = rate * share.attention_forward
        memory = self.elementwise_s(device, bytes=n * f64(bytes_per_token))
        return np.maximum(flops / (rate * sm_share(sm_fraction)), memory)

    def elementwise_s(self, device: Device, *, bytes: npt.ArrayLike) -> F64:
        share = device.kernels.efficiencies or H100_EFFICIENCIES
        return f64(bytes) / (device.memory_bandwidth_bytes_per_s * share.memory)
