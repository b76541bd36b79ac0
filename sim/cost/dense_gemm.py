"""Time of one dense matrix product, and what it takes on a device without a measured table.

    t = a + ((T_c)^q + (W/B)^q)^(1/q) [+ quantisation]
    T_c = min over tiles of ceil(ceil(M/tm) ceil(N/tn) / SMs) * (K (2 tm tn SMs/P + c) + o)

A product [M, K] x [K, N] is cut into output tiles that the SMs work off in waves; a tile costs its FLOPs, a latency c
per element of the inner dimension and a prologue o. Kernels choose their tile by size, so the quickest counts. W are
the bytes of both inputs and the output. Forward: M tokens, N outputs, K inputs; the gradients swap them.

Tried on H100 and left out: a split inner dimension (bf16 9.1 instead of 9.3 %, one constant more). Without tiles,
t = a + c K + ((F/P)^q + (W/B)^q)^(1/q) is as good for bf16 (8.7 %) but worse for fp8 (12.6 instead of 11.3 %) and, by
spec ratio, for A100 (19 instead of 17 %) and fp4 on B200 (24 instead of 11.5 %).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from sim.hardware import BYTES_PER_ELEMENT, DenseGemm, Dtype
from sim.tokens import F64

TILES = ((64, 32), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256))
# Weight gradients against forward + dgrad, 829 to 1,228 TFLOP/s, in the DeepSeek-V3 training trace on H800 (h800.yaml).
WGRAD_RATIO = 829 / 1228


def power_sum(first: F64, second: F64, norm: float) -> F64:
    """Return (first^norm + second^norm)^(1/norm), relative to the larger one so that no power underflows."""
    high, low = np.maximum(first, second), np.minimum(first, second)
    ratio = np.divide(low, high, out=np.zeros(high.shape), where=high > 0)
    total: F64 = high * (1 + ratio**norm) ** (1 / norm)
    return total


def gemm_s(
    fit: DenseGemm,
    *,
    n_sm: npt.ArrayLike,
    sm_fraction: npt.ArrayLike,
    tokens: npt.ArrayLike,
    in_features: npt.ArrayLike,
    out_features: npt.ArrayLike,
    dtype: Dtype,
    part: Literal["forward", "dgrad", "wgrad"] = "forward",
    quantise: bool = False,
) -> F64:
    """Return seconds, float64 of the arguments' broadcast shape; 0 where there are no tokens or no weights.

    n_sm: of the device, of which ``sm_fraction`` compute. part and quantise as in `sim.cost.ComputeCost.gemm_s`.
    """
    given = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (tokens, in_features, out_features, sm_fraction)))
    m, k, n, share = given
    sms, element = np.asarray(n_sm, np.float64), BYTES_PER_ELEMENT[dtype]
    rate = fit.flops_per_s
    if part == "wgrad":
        rate = fit.wgrad_flops_per_s or WGRAD_RATIO * fit.flops_per_s
    rows, columns, inner = {"forward": (m, n, k), "dgrad": (m, k, n), "wgrad": (n, k, m)}[part]
    # wgrad reads both activations and adds to an fp32 gradient; the others write bf16.
    moved = (rows + columns) * inner * element + rows * columns * (8.0 if part == "wgrad" else 2.0)
    compute = np.full(m.shape, np.inf)
    for tile_rows, tile_columns in TILES:
        waves = np.ceil(np.ceil(rows / tile_rows) * np.ceil(columns / tile_columns) / (sms * share))
        step = 2 * tile_rows * tile_columns * sms / rate + fit.step_s
        compute = np.minimum(compute, waves * (inner * step + fit.tile_overhead_s))
    seconds = fit.overhead_s + power_sum(compute, moved / fit.bandwidth_bytes_per_s, fit.norm)
    if quantise and dtype != "bf16":
        seconds = seconds + m * k * (2 + element) / (fit.quantise_bytes_per_s or fit.bandwidth_bytes_per_s)
    return np.where(m * n * k > 0, seconds, 0.0)
