"""Devices and links as data sheets describe them, plus the constants measured on them.

Only numbers and their checks: how links form a network is ``sim.cluster``'s business, how numbers become seconds is
``sim.cost``'s. Rates are nominal (data sheet) unless a field says ``achievable``; every file states its sources.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sim.units import Bytes, BytesPerSecond, FlopsPerSecond, Seconds, human

Dtype = Literal["bf16", "fp8", "fp4"]

BYTES_PER_ELEMENT: dict[Dtype, float] = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5625}
"""Bytes of one weight; fp4 carries an 8-bit scale per 16 elements (NVFP4), the fp8 128 x 128 block scales are nil."""

Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PeakFlops(_Spec):
    """Dense (not 2:4 sparse) tensor peak per number format; None where the device has no such units."""

    bf16: FlopsPerSecond
    """With fp32 accumulation."""
    fp8: FlopsPerSecond | None = None
    """Null: no such units."""
    fp4: FlopsPerSecond | None = None
    """Null: no such units."""


class GroupedGemm(_Spec):
    """Measured constants of the grouped GEMMs of one MoE layer (see `sim.cost.grouped_gemm`).

    overhead_s: a. flops_per_s: P, forward and dgrad, all SMs. bandwidth_bytes_per_s: B, reading weights.
    pair_bytes_per_s: D, what the pairs move; None for products timed alone: their inputs and outputs then go at B.
    token_bytes_per_s: C, or None for kernels that never walk the tokens of other ranks.
    wgrad_flops_per_s: P of the weight gradient; None uses the ratio measured on H800.
    norm: compute and weights combine as a p-norm; 1 is their sum, larger means better overlap.
    tile_rows: M tile to which an expert's rows are rounded up; 1: not at all.
    """

    overhead_s: Seconds
    flops_per_s: FlopsPerSecond
    bandwidth_bytes_per_s: BytesPerSecond
    pair_bytes_per_s: BytesPerSecond | None = None
    token_bytes_per_s: BytesPerSecond | None = None
    wgrad_flops_per_s: FlopsPerSecond | None = None
    norm: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    tile_rows: Annotated[int, Field(gt=0)] = 1
    source: str

    @property
    def products(self) -> Self:
        """The constants without what surrounds the two products: quantisation, permutation, other ranks' tokens."""
        return self.model_copy(update={"pair_bytes_per_s": None, "token_bytes_per_s": None})


class DenseGemm(_Spec):
    """Measured constants of one dense GEMM: t = a + ((T_c)^norm + (W/B)^norm)^(1/norm) (see `sim.cost.dense_gemm`).

    overhead_s: a. tile_overhead_s, step_s: prologue of an output tile and latency per element of its inner dimension.
    flops_per_s: P, forward and dgrad, all SMs. wgrad_flops_per_s: P of the weight gradient, None: as forward.
    bandwidth_bytes_per_s: B. quantise_bytes_per_s: of the kernel that brings a bf16 input into the format, None: B.
    """

    overhead_s: Seconds
    tile_overhead_s: Seconds
    step_s: Seconds
    flops_per_s: FlopsPerSecond
    wgrad_flops_per_s: FlopsPerSecond | None = None
    bandwidth_bytes_per_s: BytesPerSecond
    quantise_bytes_per_s: BytesPerSecond | None = None
    norm: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """q: 1 is the sum of compute and memory, larger means better overlap."""
    source: str


class AttentionKernel(_Spec):
    """Measured constants of softmax(QK^T)V: t = a + c S + ((F/P)^norm + (W/B)^norm)^(1/norm) + o U / SMs
    (see `sim.cost.attention`).

    overhead_s: a. position_s: c, per position of the longest context S. unit_s: o, per work unit of an SM.
    flops_per_s: P. bandwidth_bytes_per_s: B. padding_tokens: positions that every query (prefill) or request (decode)
    works through besides its own.
    """

    overhead_s: Seconds
    position_s: Seconds
    unit_s: Seconds
    flops_per_s: FlopsPerSecond
    bandwidth_bytes_per_s: BytesPerSecond
    padding_tokens: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    norm: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """q, as in DenseGemm: 1 is the sum of compute and memory, larger means better overlap."""
    source: str


class TrainingAttention(_Spec):
    """Fractions of the data-sheet peak that training attention kernels reach, forward and backward."""

    forward: Fraction
    """Of the forward pass."""
    backward: Fraction
    """Of the backward pass."""
    source: str


class Elementwise(_Spec):
    """Measured constants of memory-bound kernels: launch overhead of each, and the bandwidth they reach."""

    overhead_s: Seconds
    """Launch of one kernel."""
    bandwidth_bytes_per_s: BytesPerSecond
    """At which it reads and writes."""
    source: str


class Kernels(_Spec):
    """Measured constants of one device; what is absent is transferred from H100 by ``sim.cost.calibrated``.

    gqa_mixed: decodes in one kernel with prompts, where that costs them more than a kernel of their own (gqa_decode)."""

    grouped_gemm_bf16: GroupedGemm | None = None
    grouped_gemm_fp8: GroupedGemm | None = None
    grouped_gemm_fp4: GroupedGemm | None = None
    gemm_bf16: DenseGemm | None = None
    gemm_fp8: DenseGemm | None = None
    gemm_fp4: DenseGemm | None = None
    mla_prefill: AttentionKernel | None = None
    mla_decode: AttentionKernel | None = None
    gqa_prefill: AttentionKernel | None = None
    gqa_decode: AttentionKernel | None = None
    gqa_mixed: AttentionKernel | None = None
    training_attention: TrainingAttention | None = None
    elementwise: Elementwise | None = None

    def grouped_gemm(self, dtype: Dtype) -> GroupedGemm | None:
        """Return the constants measured for ``dtype``, or None."""
        found: GroupedGemm | None = getattr(self, f"grouped_gemm_{dtype}")
        return found


class Device(_Spec):
    """One accelerator.

    memory_bytes: capacity. memory_bandwidth_bytes_per_s: HBM data sheet. n_sm: SMs or compute units. power_w: board
    power limit, W. price_per_hour: USD, optional; its source belongs in ``price_source``.
    """

    name: str
    """As on the data sheet."""
    peak_flops_per_s: PeakFlops
    memory_bytes: Bytes
    memory_bandwidth_bytes_per_s: BytesPerSecond
    n_sm: Annotated[int, Field(gt=0)]
    power_w: Annotated[float, Field(gt=0)]
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    price_source: str = ""
    """Where the price comes from; required with one."""
    kernels: Kernels = Kernels()
    source: str

    @model_validator(mode="after")
    def _priced_with_source(self) -> Self:
        if self.price_per_hour is not None and not self.price_source:
            raise ValueError("price_per_hour needs a price_source")
        return self

    def peak(self, dtype: Dtype) -> float:
        """Return the peak in FLOP/s for ``dtype``; ValueError names the formats the device has."""
        peak: float | None = getattr(self.peak_flops_per_s, dtype)
        if peak is None:
            known = [name for name in BYTES_PER_ELEMENT if getattr(self.peak_flops_per_s, name) is not None]
            raise ValueError(f"{self.name} has no {dtype} tensor peak; it has {', '.join(known)}")
        return peak


SUSTAINED: dict[str, float] = {"nvlink": 0.68, "infiniband": 0.92, "roce": 0.92}
"""Share of the nominal rate that DeepEP's kernels sustain on the wire. NVLink: H800 EP8 134-138 of 200 GB/s
(docs/legacy.md, the own rank's eighth taken off), H100 with 24 SMs 308 (dispatch) and 327 (combine) of 450
(aiconfigurator-core). NIC: of 50 GB/s, H800 EP32 and EP64 43.5-44.6, H100 on 2-8 nodes 46.5-48."""


class LinkSpec(_Spec):
    """A link class, per device and per direction.

    bandwidth_bytes_per_s: nominal. achievable_bytes_per_s: what all-to-all kernels sustain; None means the share of
    nominal that is measured on links of this kind (`SUSTAINED`), nominal where none is.
    latency_s: device to device, one way, through one switch. multicast: the switches add up and multicast, which
    halves what an all-reduce puts on a link (NVLink SHARP, NVLS in NCCL; from the third NVSwitch generation on).
    """

    kind: Literal["nvlink", "xgmi", "pcie", "ub", "ici", "infiniband", "roce"]
    """What it is; `SUSTAINED` knows what some kinds reach."""
    bandwidth_bytes_per_s: BytesPerSecond
    achievable_bytes_per_s: BytesPerSecond | None = None
    latency_s: Seconds
    multicast: bool = False

    @model_validator(mode="after")
    def _not_above_nominal(self) -> Self:
        if self.rate_bytes_per_s > self.bandwidth_bytes_per_s:
            raise ValueError(
                f"achievable {human(self.rate_bytes_per_s, 'B/s')} exceeds the nominal "
                f"{human(self.bandwidth_bytes_per_s, 'B/s')}"
            )
        return self

    @property
    def rate_bytes_per_s(self) -> float:
        """The achievable rate: the one given, else `SUSTAINED` of nominal."""
        if self.achievable_bytes_per_s is None:
            return self.bandwidth_bytes_per_s * SUSTAINED.get(self.kind, 1.0)
        return self.achievable_bytes_per_s


class NicSpec(LinkSpec):
    """A network card; ``cross_leaf_latency_s`` is device to device through leaf, spine and leaf."""

    kind: Literal["infiniband", "roce", "ub"]
    """What it is."""
    cross_leaf_latency_s: Seconds
    """Device to device through leaf, spine and leaf."""

    @model_validator(mode="after")
    def _spine_is_farther(self) -> Self:
        if self.cross_leaf_latency_s < self.latency_s:
            raise ValueError("cross_leaf_latency_s is below latency_s: the spine cannot be nearer than the leaf")
        return self
