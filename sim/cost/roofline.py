"""Data sheet only: the longer of computing and moving bytes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from sim.cost import ComputeCost, Part, Pass
from sim.cost.attention import AttentionShape, Phase, attention_work
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


def loads(expert_tokens: npt.ArrayLike) -> F64:
    """Return ``expert_tokens`` as float64; ValueError where one is negative or NaN."""
    tokens = f64(expert_tokens)
    if not tokens.min(initial=0.0) >= 0:
        raise ValueError("expert_tokens must not be negative or NaN")
    return tokens


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
    tokens = loads(expert_tokens)
    n, experts = tokens.sum(axis=-1), np.count_nonzero(tokens, axis=-1)
    weight = 8.0 if part == "wgrad" else BYTES_PER_ELEMENT[dtype]
    moved = 3 * experts * hidden_size * moe_intermediate_size * weight
    return 6 * n * hidden_size * moe_intermediate_size, moved + n * hidden_size * (BYTES_PER_ELEMENT[dtype] + 2)


def gemm_work(
    tokens: npt.ArrayLike, in_features: npt.ArrayLike, out_features: npt.ArrayLike, dtype: Dtype, part: Part
) -> tuple[F64, F64]:
    """Return ``(FLOPs, HBM bytes)`` of one pass of a dense product, as `ComputeCost.gemm_s` takes it: both inputs in
    ``dtype``, the output in bf16, or read and written as an fp32 gradient (wgrad)."""
    m, k, n = f64(tokens), f64(in_features), f64(out_features)
    element = BYTES_PER_ELEMENT[dtype]
    moved = {
        "forward": (n * k + m * k) * element + m * n * 2,
        "dgrad": (n * k + m * n) * element + m * k * 2,
        "wgrad": m * (n + k) * element + n * k * 8,
    }[part]
    return 2 * m * n * k, moved


class Roofline(ComputeCost):
    """max(FLOPs / peak, bytes / bandwidth) / efficiency; the default efficiency 1 makes it a lower bound."""

    kind: Literal["roofline"] = "roofline"
    efficiency: Fraction = 1.0
    """Share of the bound that kernels reach."""

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
        products_only: bool = False,
    ) -> F64:
        flops, moved = expert_work(expert_tokens, hidden_size, moe_intermediate_size, dtype, part)
        return self._bound(device, flops, moved, dtype, sm_fraction)

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
        flops, moved = gemm_work(tokens, in_features, out_features, dtype, part)
        seconds = self._bound(device, flops, moved, dtype, sm_fraction)
        if quantise and dtype != "bf16":
            again = f64(tokens) * f64(in_features) * (2 + BYTES_PER_ELEMENT[dtype])
            seconds = seconds + self.elementwise_s(device, bytes=again)
        return seconds

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
        flops = f64(tokens) * f64(flops_per_token) * (BACKWARD_ATTENTION if direction == "backward" else 1.0)
        return self._bound(device, flops, 0.0, dtype, sm_fraction)

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
        flops, moved = attention_work(
            shape, phase, query_tokens, kv_tokens, cache_bytes_per_element=cache_bytes_per_element, window=window
        )
        return self._bound(device, flops, moved, "bf16", sm_fraction)

    def elementwise_s(self, device: Device, *, bytes: npt.ArrayLike, kernels: npt.ArrayLike = 0) -> F64:
        return f64(bytes) / (device.memory_bandwidth_bytes_per_s * self.efficiency) + 0 * f64(kernels)

    def provenance(self, device: Device, step_in: Dtype | None = None) -> str:
        return f"data sheet of {device.name} at efficiency {self.efficiency:g} ({device.source})"
