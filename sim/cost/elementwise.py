"""Bytes of everything that is neither a matrix product nor attention: norms, residuals, rotary, SwiGLU, quantisation,
permutation. A lumped count: the trace it is fitted to names one total only."""

from __future__ import annotations

from sim.cost import Pass

# Times each activation element crosses HBM as bf16. In the DeepSeek-V3 training trace these kernels take 8.53 ms per
# MoE layer, forward and backward, for 4,096 tokens: at 3.21 TB/s 6.69 MB per token, 17.1 crossings of the 195,584
# elements counted below. The trace does not split the passes; a third forward is assumed, as for matrix products.
CROSSINGS = {"forward": 5.7, "backward": 11.4}


def elementwise_bytes_per_token(
    *,
    hidden_size: int,
    moe_intermediate_size: int,
    num_experts_per_tok: int,
    attention_width: int,
    direction: Pass = "forward",
) -> float:
    """Return HBM bytes per token of one layer's elementwise kernels.

    Elements counted: the residual stream h, per chosen expert its input h and its gate, up and product 3m, and
    ``attention_width``, the summed widths of the per-head tensors q, k, v and output of all heads (DeepSeek-V3:
    128 x (192 + 192 + 128 + 128) = 81,920). A dense layer is the same with one expert of its own width.
    """
    elements = hidden_size + num_experts_per_tok * (hidden_size + 3 * moe_intermediate_size) + attention_width
    return 2.0 * CROSSINGS[direction] * elements
