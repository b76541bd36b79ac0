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
    fp8: FlopsPerSecond | None = None
    fp4: FlopsPerSecond | None = None


class GroupedGemm(_Spec):
    """Measured constants of the grouped GEMMs of one MoE layer: t = a + F/P + W/B + T*h*2/C (see `sim.cost`).

    overhead_s: a. flops_per_s: P, forward and dgrad, all SMs. bandwidth_bytes_per_s: B.
    token_bytes_per_s: C, or None for kernels that never walk the tokens of other ranks.
    wgrad_flops_per_s: P of the weight gradient; None uses the ratio measured on H800.
    norm: F/P and W/B combine as a p-norm; 1 is their sum, larger means better overlap.
    """

    overhead_s: Seconds
    flops_per_s: FlopsPerSecond
    bandwidth_bytes_per_s: BytesPerSecond
    token_bytes_per_s: BytesPerSecond | None = None
    wgrad_flops_per_s: FlopsPerSecond | None = None
    norm: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    source: str


class Efficiencies(_Spec):
    """Fractions of the data-sheet peak or bandwidth that dense GEMM, attention and elementwise kernels reach."""

    gemm: Fraction
    gemm_wgrad: Fraction
    attention_forward: Fraction
    attention_backward: Fraction
    memory: Fraction
    source: str


class Kernels(_Spec):
    """Measured constants of one device; what is absent is transferred from H100 by ``sim.cost.calibrated``."""

    grouped_gemm_bf16: GroupedGemm | None = None
    grouped_gemm_fp8: GroupedGemm | None = None
    grouped_gemm_fp4: GroupedGemm | None = None
    efficiencies: Efficiencies | None = None

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
    peak_flops_per_s: PeakFlops
    memory_bytes: Bytes
    memory_bandwidth_bytes_per_s: BytesPerSecond
    n_sm: Annotated[int, Field(gt=0)]
    power_w: Annotated[float, Field(gt=0)]
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    price_source: str = ""
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


class LinkSpec(_Spec):
    """A link class, per device and per direction.

    bandwidth_bytes_per_s: nominal. achievable_bytes_per_s: what all-to-all kernels sustain; None means nominal.
    latency_s: device to device, one way, through one switch.
    """

    kind: Literal["nvlink", "xgmi", "pcie", "infiniband", "roce"]
    bandwidth_bytes_per_s: BytesPerSecond
    achievable_bytes_per_s: BytesPerSecond | None = None
    latency_s: Seconds

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
        """The achievable rate, or the nominal one where none is given."""
        return self.bandwidth_bytes_per_s if self.achievable_bytes_per_s is None else self.achievable_bytes_per_s


class NicSpec(LinkSpec):
    """One network card per device; ``cross_leaf_latency_s`` is device to device through leaf, spine and leaf."""

    kind: Literal["infiniband", "roce"]
    cross_leaf_latency_s: Seconds

    @model_validator(mode="after")
    def _spine_is_farther(self) -> Self:
        if self.cross_leaf_latency_s < self.latency_s:
            raise ValueError("cross_leaf_latency_s is below latency_s: the spine cannot be nearer than the leaf")
        return self
