"""Time of a rank's routed experts in one layer, from the tokens of each expert.

    t = a + sum over experts ((F/P)^q + (W/B)^q)^(1/q) + S/D + T h 2 / C

F: an expert's FLOPs, 6 h m per row, its rows rounded up to the kernel's M tile once they fill one (below it kernels
take smaller tiles). W: its weights, if it has tokens. Compute and memory overlap expert by expert: a hot one computes
while no cold one's weights are read (with both summed first, power-law over balanced at 4,096 tokens, EP1, came out 0.98
instead of 1.15; measured 1.27). S: what the pairs themselves move, input and output of both products and of the
quantisation and permutation around them, h (2b + 4) + m (2b + 8) bytes per pair: its own, slower rate D is what lets
one set of constants serve wide and narrow experts. T h 2: tokens of the EP group that the kernel walks. Rates transfer
to another device by its data sheet (`sim.cost.h100.grouped_gemm`).

On H100, cutlass fp8 block, 17 shapes at EP 1..256: 5.2 % (S at rate B instead: 8.6 %; tile 64 or none: 5.4 %; one more
constant per active expert: 5.1 %, per local expert 4.5 %, but that needs experts that compute nothing; waves were not
tried). What it misses there: kernels above 10 ms run up to 30 % slower than it says (power, most likely).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sim.cost.dense_gemm import power_sum
from sim.hardware import BYTES_PER_ELEMENT, Dtype, GroupedGemm
from sim.tokens import F64

# Weight gradients against forward + dgrad, 802 to 1,327 TFLOP/s, in the DeepSeek-V3 training trace on H800.
WGRAD_RATIO = 802 / 1327


def grouped_gemm_s(
    fit: GroupedGemm,
    *,
    sm_fraction: npt.ArrayLike,
    expert_tokens: npt.ArrayLike,
    ep_tokens: npt.ArrayLike,
    hidden_size: npt.ArrayLike,
    moe_intermediate_size: npt.ArrayLike,
    dtype: Dtype,
    part: str = "forward",
    multiplicity: npt.ArrayLike = 1.0,
) -> F64:
    """Return seconds [...] for ``expert_tokens`` [..., e]; the other arguments broadcast with [...].

    multiplicity: [..., e], how many experts have each of these loads; for callers who have them counted.
    """
    tokens, count = np.asarray(expert_tokens, np.float64), np.asarray(multiplicity, np.float64)
    h, m = np.asarray(hidden_size, np.float64), np.asarray(moe_intermediate_size, np.float64)
    rate = fit.flops_per_s
    if part == "wgrad":
        rate = fit.wgrad_flops_per_s or WGRAD_RATIO * fit.flops_per_s
    element = BYTES_PER_ELEMENT[dtype]
    # Weight gradients read and write fp32 instead of reading weights, as in `sim.cost.roofline.expert_work`.
    weight = 3 * h * m * (8.0 if part == "wgrad" else element) / fit.bandwidth_bytes_per_s
    own = 0.0 if fit.pair_bytes_per_s is not None else h * (element + 2) / fit.bandwidth_bytes_per_s
    compute = padded(tokens, fit.tile_rows) * (6 * h * m / (rate * np.asarray(sm_fraction, np.float64)))[..., None]
    memory = (tokens > 0) * np.asarray(weight)[..., None] + tokens * np.asarray(own)[..., None]
    compute, memory = np.broadcast_arrays(compute, memory)
    seconds: F64 = (count * power_sum(compute, memory, fit.norm)).sum(axis=-1) + fit.overhead_s
    if fit.pair_bytes_per_s is not None:
        seconds = seconds + pair_bytes((count * tokens).sum(axis=-1), h, m, element) / fit.pair_bytes_per_s
    if fit.token_bytes_per_s is not None:
        seconds = seconds + np.asarray(ep_tokens, np.float64) * h * 2 / fit.token_bytes_per_s
    return seconds


def padded(tokens: F64, tile_rows: int) -> F64:
    """Return the rows that are computed for ``tokens``: whole tiles where there is more than one.

    >>> padded(np.array([0.0, 5.0, 128.0, 129.0]), 128).tolist()
    [0.0, 5.0, 128.0, 256.0]
    """
    rows: F64 = np.where(tokens > tile_rows, np.ceil(tokens / tile_rows) * tile_rows, tokens)
    return rows


def pair_bytes(pairs: F64, hidden_size: F64, moe_intermediate_size: F64, element: float) -> F64:
    """Return S: input in ``element`` bytes and output in bf16 of both products, and of what lies around them."""
    return pairs * (hidden_size * (2 * element + 4) + moe_intermediate_size * (2 * element + 8))
