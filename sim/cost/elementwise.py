"""Bytes of everything that is neither a matrix product nor attention core: norms, residuals, rotary, SwiGLU,
quantisation, permutation, the gate's top-k. Their time is `ComputeCost.elementwise_s`.

Training counts are lumped, since the trace that they are fitted to names one total: what a token costs on the rank that
owns it (`trunk_bytes`), and what a routed (token, expert) pair costs on the rank that computes it
(`expert_pair_bytes`), which grows with that rank's load and is nothing for dropped pairs. Serving counts its
kernels one by one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sim.cost import ComputeCost, Pass
from sim.hardware import BYTES_PER_ELEMENT, Device, Dtype
from sim.tokens import F64

# Times each activation element crosses HBM as bf16. In the DeepSeek-V3 training trace these kernels take 8.53 ms per
# MoE layer, forward and backward, for 4,096 tokens: at 3.21 TB/s 6.69 MB per token, 17.1 crossings of the 195,584
# elements counted below. The trace does not split the passes; a third forward is assumed, as for matrix products.
CROSSINGS = {"forward": 5.7, "backward": 11.4}


def trunk_bytes(*, hidden_size: int, attention_width: int, direction: Pass = "forward") -> float:
    """Return HBM bytes per token of one layer's elementwise kernels outside the FFN.

    Elements counted: the residual stream h and ``attention_width``, the summed widths of the per-head tensors q, k, v
    and output of all heads (DeepSeek-V3: 128 x (192 + 192 + 128 + 128) = 81,920).
    """
    return 2.0 * CROSSINGS[direction] * (hidden_size + attention_width)


def expert_pair_bytes(*, hidden_size: int, moe_intermediate_size: int, direction: Pass = "forward") -> float:
    """Return HBM bytes per (token, expert) pair: its input h, permuted, and its gate, up and product 3m.

    A dense FFN is one pair per token, of its own width.
    """
    return 2.0 * CROSSINGS[direction] * (hidden_size + 3 * moe_intermediate_size)


def gate_s(
    cost: ComputeCost,
    device: Device,
    *,
    tokens: npt.ArrayLike,
    hidden_size: int,
    n_routed_experts: int,
    num_experts_per_tok: int,
) -> F64:
    """Return seconds of a serving gate: the router's bf16 product, then one kernel that reads fp32 scores, selects and
    writes an id and a weight (8 bytes) per choice."""
    router = cost.gemm_s(device, tokens=tokens, in_features=hidden_size, out_features=n_routed_experts, dtype="bf16")
    per_token = 4.0 * n_routed_experts + 8.0 * num_experts_per_tok
    return router + cost.elementwise_s(device, bytes=_times(tokens, per_token), kernels=1)


def permute_s(cost: ComputeCost, device: Device, *, pairs: npt.ArrayLike, hidden_size: int, dtype: Dtype) -> F64:
    """Return seconds of bringing a rank's received rows in expert order before its grouped GEMMs (read and write in
    ``dtype``) and of their weighted sum back after them (bf16): two kernels. Seconds of ``pairs``' shape."""
    per_pair = hidden_size * (2 * BYTES_PER_ELEMENT[dtype] + 2 * 2.0)
    return cost.elementwise_s(device, bytes=_times(pairs, per_pair), kernels=2)


def swiglu_s(
    cost: ComputeCost, device: Device, *, pairs: npt.ArrayLike, moe_intermediate_size: int, dtype: Dtype
) -> F64:
    """Return seconds of SwiGLU fused with quantisation: gate and up in bf16, their product written in ``dtype``."""
    per_pair = moe_intermediate_size * (2 * 2.0 + BYTES_PER_ELEMENT[dtype])
    return cost.elementwise_s(device, bytes=_times(pairs, per_pair), kernels=1)


def norm_s(cost: ComputeCost, device: Device, *, tokens: npt.ArrayLike, hidden_size: int, kernels: int = 2) -> F64:
    """Return seconds of a layer's norms fused with residual addition: each reads two streams and writes two, bf16."""
    return cost.elementwise_s(device, bytes=_times(tokens, kernels * 4 * 2.0 * hidden_size), kernels=kernels)


def _times(count: npt.ArrayLike, size: float) -> F64:
    return np.asarray(count, dtype=np.float64) * size
