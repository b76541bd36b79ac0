"""Kernel times from constants fitted to measured tables; data-sheet ratios carry them to devices without a table."""

from __future__ import annotations

from typing import Literal

import numpy.typing as npt

from sim.cost import ComputeCost, Part, Pass, attention, dense_gemm, grouped_gemm, h100
from sim.cost.attention import AttentionShape, Phase
from sim.cost.h100 import TRANSFERRED
from sim.cost.roofline import BACKWARD_ATTENTION, f64, loads, sm_share
from sim.hardware import BYTES_PER_ELEMENT, Device, Dtype, GroupedGemm
from sim.tokens import F64


class Calibrated(ComputeCost):
    """Grouped GEMM, dense GEMM and serving attention: the laws of `sim.cost.grouped_gemm`, `dense_gemm` and `attention`
    with the device's constants; training attention: FLOPs at a measured share of the peak."""

    kind: Literal["calibrated"] = "calibrated"

    def constants(self, device: Device, dtype: Dtype) -> GroupedGemm:
        """Return the grouped GEMM constants for ``device``: measured, or H100's at the ratio of the data sheets."""
        return h100.grouped_gemm(device, dtype)

    def provenance(self, device: Device, step_in: Dtype | None = None) -> str:
        formats: list[Dtype] = [dtype for dtype in BYTES_PER_ELEMENT if getattr(device.peak_flops_per_s, dtype)]
        if step_in is not None:
            formats = [step_in]
        parts = [f"grouped GEMM {dtype} {_stated(h100.grouped_gemm(device, dtype).source)}" for dtype in formats]
        serving = [name.replace("_", " ") for name in h100.ATTENTION] if step_in is not None else []
        rest = {name: source for name, source in h100.sources(device, formats).items() if name not in serving}
        return "; ".join([*parts, *_by_source(rest)])

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
        constants = self.constants(device, dtype)
        return grouped_gemm.grouped_gemm_s(
            constants.products if products_only else constants,
            sm_fraction=sm_share(sm_fraction),
            expert_tokens=loads(expert_tokens),
            ep_tokens=ep_tokens,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
            dtype=dtype,
            part=part,
        )

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
        return dense_gemm.gemm_s(
            h100.gemm(device, dtype),
            n_sm=device.n_sm,
            sm_fraction=sm_share(sm_fraction),
            tokens=tokens,
            in_features=in_features,
            out_features=out_features,
            dtype=dtype,
            part=part,
            quantise=quantise,
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
    ) -> F64:
        share = h100.training_attention(device)
        flops, rate = f64(tokens) * f64(flops_per_token), device.peak(dtype)
        if direction == "backward":
            flops, rate = BACKWARD_ATTENTION * flops, rate * share.backward
        else:
            rate = rate * share.forward
        return flops / (rate * sm_share(sm_fraction))

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
        return attention.attention_s(
            h100.attention(device, shape.family, phase),
            n_sm=device.n_sm,
            sm_fraction=sm_share(sm_fraction),
            shape=shape,
            phase=phase,
            query_tokens=query_tokens,
            kv_tokens=kv_tokens,
            cache_bytes_per_element=cache_bytes_per_element,
            window=window,
        )

    def elementwise_s(self, device: Device, *, bytes: npt.ArrayLike, kernels: npt.ArrayLike = 0) -> F64:
        fit = h100.elementwise(device)
        return f64(bytes) / fit.bandwidth_bytes_per_s + f64(kernels) * fit.overhead_s


def _stated(source: str) -> str:
    """A source that begins with "as" or "assumed" is no measurement of this kernel."""
    if source == TRANSFERRED:
        return source
    return f"{'derived' if source.startswith(('as ', 'assumed')) else 'measured'} ({source})"


def _by_source(sources: dict[str, str]) -> list[str]:
    """Join the kernels of one source, in order of first appearance."""
    return [
        f"{', '.join(name for name in sources if sources[name] == source)} {_stated(source)}"
        for source in dict.fromkeys(sources.values())
    ]
