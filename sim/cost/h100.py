"""H100's kernel constants, dense GEMM, attention and elementwise, and their transfer to devices without a table.

A transfer scales rates by the ratio of the data sheets (tensor peak of the format, HBM bandwidth) and keeps times.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from sim.cost.attention import Phase
from sim.hardware import AttentionKernel, DenseGemm, Device, Dtype, Elementwise, GroupedGemm, TrainingAttention

PEAK_BF16, PEAK_FP8, BANDWIDTH = 989e12, 1979e12, 3.35e12  # H100 SXM data sheet
TRANSFERRED = "transferred from H100 by spec ratio"

# Tables of aiconfigurator-core 0.12.0, data/h100_sxm, fitted by `sim.calibration` to two thirds of the shapes (4,000 rows
# of them, drawn by pandas with random_state 0). Mean error in % there, on the other third, and of the transfer to all
# H200 rows: bf16 9.5, 9.4, 10.8; fp8 11.5, 11.2, 12.4; mla_prefill 7.2, 7.6, 6.6; mla_decode 9.6, 10.1, 11.2;
# gqa_prefill 8.4, 8.5, 8.5; gqa_decode 11.7, 11.1, 11.3.
GEMM_BF16 = DenseGemm(
    overhead_s=3.05e-6,
    tile_overhead_s=0.175e-6,
    step_s=0.0,
    flops_per_s=793e12,
    bandwidth_bytes_per_s=2.8e12,
    norm=2.59,
    source="SGLang 0.5.14 (cuBLAS) on H100",
)
GEMM_FP8 = DenseGemm(
    overhead_s=2.93e-6,
    tile_overhead_s=1.13e-6,
    step_s=0.626e-9,
    flops_per_s=1790e12,
    bandwidth_bytes_per_s=3.35e12,
    quantise_bytes_per_s=2.88e12,
    norm=1.3,
    source="SGLang 0.5.14 (DeepGEMM, 1 x 128 and 128 x 128 blocks) on H100",
)
# TensorRT-LLM tables at EP 1..256, balanced, tensor parallelism 1, fitted by `sim.calibration.moe` to all shapes: fp8 17
# shapes (3,537 rows), error 5.2 %; bf16 14 shapes (2,764 rows), 10.8 %.
GROUPED_FP8 = GroupedGemm(
    overhead_s=23.6e-6,
    flops_per_s=1330e12,
    bandwidth_bytes_per_s=3.0e12,
    pair_bytes_per_s=0.718e12,
    token_bytes_per_s=1.36e12,
    norm=5.7,
    tile_rows=128,
    source="TensorRT-LLM 1.3.0rc20 (cutlass, fp8 block) on H100, aiconfigurator-core 0.12.0, fit",
)
GROUPED_BF16 = GroupedGemm(
    overhead_s=28.9e-6,
    flops_per_s=989e12,
    bandwidth_bytes_per_s=3.02e12,
    pair_bytes_per_s=2.30e12,
    token_bytes_per_s=1.19e12,
    norm=2.78,
    tile_rows=128,
    source="TensorRT-LLM 1.3.0rc20 (cutlass) on H100, aiconfigurator-core 0.12.0, fit",
)
N_SM = 132
ATTENTION = {
    "mla_prefill": AttentionKernel(
        overhead_s=15.1e-6,
        position_s=11.3e-9,
        unit_s=2.99e-6,
        flops_per_s=637e12,
        bandwidth_bytes_per_s=3.35e12,
        padding_tokens=17.3,
        norm=1.4,
        source="TensorRT-LLM 1.3.0rc20 on H100",
    ),
    "mla_decode": AttentionKernel(
        overhead_s=13.5e-6,
        position_s=0.0,
        unit_s=0.0,
        flops_per_s=614e12,
        bandwidth_bytes_per_s=3.01e12,
        padding_tokens=80.8,
        norm=6.36,
        source="TensorRT-LLM 1.3.0rc20 on H100",
    ),
    "gqa_prefill": AttentionKernel(
        overhead_s=14.3e-6,
        position_s=8.46e-9,
        unit_s=3.29e-6,
        flops_per_s=553e12,
        bandwidth_bytes_per_s=1.6e12,
        padding_tokens=120.0,
        norm=1.25,
        source="TensorRT-LLM 1.3.0rc20 on H100",
    ),
    "gqa_decode": AttentionKernel(
        overhead_s=11.4e-6,
        position_s=0.0,
        unit_s=1.44e-6,
        flops_per_s=742e12,
        bandwidth_bytes_per_s=3.11e12,
        padding_tokens=89.7,
        norm=1.08,
        source="vLLM 0.24.0 (FlashAttention) on H100",
    ),
}
# DeepSeek-V3 training trace (deepseek-ai/profile-data train.json) on H800, the same chip; derived in h800.yaml.
TRAINING_ATTENTION = TrainingAttention(forward=0.660, backward=0.482, source="DeepSeek-V3 training trace on H800")
# Bandwidth: W/B of the grouped GEMM fit. Overhead: static fp8 quantisation (h100_sxm quantize, TensorRT-LLM, 1,628 rows
# of three bytes per element: 12 %, of the rows beyond the L2 cache 5 %; H200 by spec ratio 3.5 and 8 %).
ELEMENTWISE = Elementwise(
    overhead_s=1.32e-6, bandwidth_bytes_per_s=3.21e12, source="TensorRT-LLM quantisation and grouped GEMM on H100"
)


def grouped_gemm(device: Device, dtype: Dtype, *, measured: bool = True) -> GroupedGemm:
    """Return the grouped GEMM constants for ``device``; ``measured`` False: the transfer even where it has its own.

    The tensor peak carries P and the pairs' rate D (prologues and epilogues of tiles), the bandwidth B, the number of
    SMs the token walk C. On H200, where only the bandwidth differs, D and C are indeed H100's within 7 %. fp4 is as
    fp8, of its own peak. ValueError for a format that the device lacks.
    """
    peak = device.peak(dtype)
    own = device.kernels.grouped_gemm(dtype)
    if own is not None and measured:
        return own
    # Hopper scales fp8 blocks outside the tensor cores; those with fp4 do so inside, as fast as plain bf16. Chosen on
    # rows of B200, GB200 and B300 (fp8 blocks 14 % off instead of 19); of RTX PRO 6000's triton kernel 39 %, not 31.
    plain = dtype == "bf16" or (dtype == "fp8" and device.peak_flops_per_s.fp4 is not None)
    base, base_peak = (GROUPED_BF16, PEAK_BF16) if plain else (GROUPED_FP8, PEAK_FP8)
    compute, memory, sms = peak / base_peak, device.memory_bandwidth_bytes_per_s / BANDWIDTH, device.n_sm / N_SM
    pairs = device.peak("bf16") / PEAK_BF16 if plain else compute
    assert base.pair_bytes_per_s is not None and base.token_bytes_per_s is not None
    return base.model_copy(
        update={
            "flops_per_s": base.flops_per_s * compute,
            "bandwidth_bytes_per_s": base.bandwidth_bytes_per_s * memory,
            "pair_bytes_per_s": base.pair_bytes_per_s * pairs,
            "token_bytes_per_s": base.token_bytes_per_s * sms,
            "source": _source(base.source, compute, memory, sms),
        }
    )


def gemm(device: Device, dtype: Dtype) -> DenseGemm:
    """Return the dense GEMM constants for ``device``; ValueError for a format that it lacks. fp4 is as fp8, of its
    own peak."""
    peak = device.peak(dtype)
    measured: DenseGemm | None = getattr(device.kernels, f"gemm_{dtype}")
    if measured is not None:
        return measured
    base, base_peak = (GEMM_BF16, PEAK_BF16) if dtype == "bf16" else (GEMM_FP8, PEAK_FP8)
    memory = device.memory_bandwidth_bytes_per_s / BANDWIDTH
    quantise = base.quantise_bytes_per_s
    return base.model_copy(
        update={
            "flops_per_s": base.flops_per_s * peak / base_peak,
            "bandwidth_bytes_per_s": base.bandwidth_bytes_per_s * memory,
            "quantise_bytes_per_s": None if quantise is None else quantise * memory,
            "source": _source(base.source, peak / base_peak, memory),
        }
    )


def attention(device: Device, family: Literal["mla", "gqa"], phase: Phase) -> AttentionKernel:
    """Return the constants of an attention kernel for ``device``; decodes beside prompts are timed as decodes alone
    where nothing else is measured."""
    if phase == "mixed":
        mixed = device.kernels.gqa_mixed if family == "gqa" else None
        return mixed or attention(device, family, "decode")
    name = f"{family}_{phase}"
    measured: AttentionKernel | None = getattr(device.kernels, name)
    if measured is not None:
        return measured
    return _transferred(device, ATTENTION[name])


def _transferred(device: Device, base: AttentionKernel) -> AttentionKernel:
    compute, memory = device.peak("bf16") / PEAK_BF16, device.memory_bandwidth_bytes_per_s / BANDWIDTH
    return base.model_copy(
        update={
            "flops_per_s": base.flops_per_s * compute,
            "bandwidth_bytes_per_s": base.bandwidth_bytes_per_s * memory,
            "source": _source(base.source, compute, memory),
        }
    )


def training_attention(device: Device) -> TrainingAttention:
    """Return the shares of the peak that training attention reaches on ``device``."""
    ratios = device.peak("bf16") / PEAK_BF16, device.memory_bandwidth_bytes_per_s / BANDWIDTH
    source = _source(TRAINING_ATTENTION.source, *ratios)
    return device.kernels.training_attention or TRAINING_ATTENTION.model_copy(update={"source": source})


def elementwise(device: Device) -> Elementwise:
    """Return the constants of memory-bound kernels for ``device``."""
    if device.kernels.elementwise is not None:
        return device.kernels.elementwise
    memory = device.memory_bandwidth_bytes_per_s / BANDWIDTH
    return ELEMENTWISE.model_copy(
        update={
            "bandwidth_bytes_per_s": ELEMENTWISE.bandwidth_bytes_per_s * memory,
            "source": _source(ELEMENTWISE.source, device.peak("bf16") / PEAK_BF16, memory),
        }
    )


def sources(device: Device, formats: Iterable[Dtype]) -> dict[str, str]:
    """Return where the constants of every kernel here come from for ``device``, by the kernel's name."""
    found = {f"dense GEMM {dtype}": gemm(device, dtype).source for dtype in formats}
    for name in ATTENTION:
        measured: AttentionKernel | None = getattr(device.kernels, name)
        family, phase = name.split("_")
        found[f"{family} {phase}"] = (measured or _transferred(device, ATTENTION[name])).source
    found["training attention"] = training_attention(device).source
    return found | {"elementwise": elementwise(device).source}


def _source(measured: str, *ratios: float) -> str:
    """A device with H100's data sheet (H100 itself, H800) has H100's constants; others have transferred ones."""
    return measured if all(ratio == 1 for ratio in ratios) else TRANSFERRED
