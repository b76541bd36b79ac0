"""Data sheet only: the longer of computing and moving bytes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from sim.cost import ComputeCost, Part, Pass
from sim.hardware import BYTES_PER_ELEMENT, Device, Dtype, Fraction
from sim.tokens import F64

BACKWARD_ATTENTION = 2.5


def f64(value: npt.ArrayLike) -> F64:
    """Return ``value`` as a float64 array, 0-d for a scalar."""
    return np.asarray(value, dtype=np.float64)


def sm_share(sm_fraction: npt.ArrayLike) -> F64:
    """Return ``sm_fraction`` as float64; ValueError outside (0, 1]."""
    share = f64(sm_fraction)
    if not (share.min() > 0 and share.max() <= 1):
        raise ValueError(f"sm_fraction must lie in (0, 1], not {share.tolist()}")
    return share


def expert_work(
    expert_tokens: npt.ArrayLike,
    hidden_size: int,
    moe_intermediate_size: int,
    dtype: Dtype,
    part: Part,
) -> tuple[F64, F64]:
    """Return ``(FLOPs, HBM bytes)`` of one pass over a rank's routed experts.

    FLOPs 6 N h m: three matrices, two FLOPs per weight and pair. Bytes: the active experts' weights once (wgrad:
    read and write of fp32 gradients instead), a pair's input in ``dtype`` and its output in bf16. expert_tokens
    [..., e] as in `ComputeCost.grouped_gemm_s`; both results [...].
    """
    tokens = f64(expert_tokens)
    n, experts = tokens.sum(axis=-1), np.count_nonzero(tokens, axis=-1)
    weight = 8.0 if part == "wgrad" else BYTES_PER_ELEMENT[dtype]
    moved = 3 * experts * hidden_size * moe_intermediate_size * weight
    return 6 * n * hidden_size * moe_intermediate_size, moved + n * hidden_size * (BYTES_PER_ELEMENT[dtype] + 2)


class Roofline(ComputeCost):
    """max(FLOPs / peak, bytes / bandwidth) / efficiency; the default efficiency 1 makes it a lower bound."""

    kind: Literal["roofline"] = "roofline"
    efficiency: Fraction = 1.0

    def _bound(
        self, device: Device, flops: npt.ArrayLike, moved: npt.ArrayLike, dtype: Dtype, sm_fraction: npt.ArrayLike
    ) -> F64:
        compute = f64(flops) / (device.peak(dtype) * sm_share(sm_fraction))
        return np.maximum(compute, f64(moved) / device.memory_bandwidth_bytes_per_s) / self.efficiency

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
        flops, moved = expert_work(expert_tokens, hidden_size, moe_intermediate_size, dtype, part)
        return self._bound(device, flops, moved, dtype, sm_fraction)

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
        n = f64(tokens)
        moved = f64(weight_bytes) + n * f64(activation_bytes_per_token)
        return self._bound(device, n * f64(flops_per_token), moved, dtype, sm_fraction)

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
        n = f64(tokens)
        flops = n * f64(flops_per_token) * (BACKWARD_ATTENTION if direction == "backward" else 1.0)
        return self._bound(device, flops, n * f64(bytes_per_token), dtype, sm_fraction)

    def elementwise_s(self, device: Device, *, bytes: npt.ArrayLike) -> F64:
        return f64(bytes) / (device.memory_bandwidth_bytes_per_s * self.efficiency)

    def provenance(self, device: Device) -> str:
        return f"data sheet of {device.name} at efficiency {self.efficiency:g} ({device.source})"
