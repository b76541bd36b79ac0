"""Time of softmax(QK^T)V of a batch of requests, prefill or decode, for latent (MLA) and grouped-query attention.

    t = a + c S + ((F/P)^q + (W/B)^q)^(1/q) + o U / SMs

F: FLOPs of the positions each query attends to, plus a fixed number of padding positions for tiles that the mask cuts.
W: bytes: the cache that decode reads (with its padding), queries, new keys and values, output. S: the longest context,
whose blocks one SM works through in turn. U: units of work: 128 queries of one head (prefill), one key-value head of
one request (decode). Requests of one batch differ in length: F, W and U are sums over them, S the maximum.

MLA's prefill computes with the expanded heads; its decode is the absorbed form of DeepSeek-V2 (arXiv 2405.04434,
section 2.1.2): every head attends to the latent cache itself, which is read once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sim.cost.dense_gemm import power_sum
from sim.hardware import AttentionKernel
from sim.model import Model
from sim.tokens import F64

Phase = Literal["prefill", "decode", "mixed"]
"""``mixed``: decodes in one kernel with prompts; the prompts' own time is that of ``prefill``."""

QUERY_TILE = 128
# Rows of a Hopper or Blackwell matrix instruction: MLA's decode takes fewer heads no faster.
INSTRUCTION_ROWS = 64


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of one layer's attention on one device, in the form that a phase computes.

    num_key_value_heads: 1 in MLA's decode, whose heads share the latent. qk_dim, v_dim: widths of the two products per
    head. cache_elements: per token.
    """

    family: Literal["mla", "gqa"]
    num_heads: int
    num_key_value_heads: int
    qk_dim: int
    v_dim: int
    cache_elements: int


def attention_shape(model: Model, phase: Phase, tp_size: int = 1) -> AttentionShape:
    """Return the shape of ``model`` in ``phase``, its heads split over ``tp_size`` devices, at least one on each."""
    heads = max(1, model.num_attention_heads // tp_size)
    if model.kv_lora_rank:
        latent, rope = model.kv_lora_rank, model.qk_rope_head_dim or 0
        if phase != "prefill":
            return AttentionShape("mla", heads, 1, latent + rope, latent, latent + rope)
        nope = model.qk_nope_head_dim or 0
        return AttentionShape("mla", heads, heads, nope + rope, model.v_head_dim or nope, latent + rope)
    qk = model.head_dim or model.hidden_size // model.num_attention_heads
    v = model.v_head_dim or qk
    kv_heads = max(1, (model.num_key_value_heads or model.num_attention_heads) // tp_size)
    return AttentionShape("gqa", heads, kv_heads, qk, v, kv_heads * (qk if model.attention_k_eq_v else qk + v))


def attended_positions(query_tokens: npt.ArrayLike, kv_tokens: npt.ArrayLike, window: int | None = None) -> F64:
    """Return the (query, position) pairs of a causal mask, the sum over the last ``query_tokens`` of ``kv_tokens``.

    Query i of q sees kv - q + i positions (i = 1..q), at most ``window``.
    """
    q, kv = np.asarray(query_tokens, np.float64), np.asarray(kv_tokens, np.float64)
    if window is None:
        return q * (kv - (q - 1) / 2)
    first = kv - q
    # Queries that still see everything: those up to position ``window``.
    whole = np.clip(window - first, 0, q)
    return whole * first + whole * (whole + 1) / 2 + (q - whole) * window


def attention_work(
    shape: AttentionShape,
    phase: Phase,
    query_tokens: npt.ArrayLike,
    kv_tokens: npt.ArrayLike,
    *,
    cache_bytes_per_element: float = 2.0,
    window: int | None = None,
    padding_tokens: float = 0.0,
) -> tuple[F64, F64]:
    """Return ``(FLOPs, HBM bytes)`` [...] of requests [..., r], activations in bf16; ``padding_tokens`` see above."""
    q, kv = np.broadcast_arrays(np.asarray(query_tokens, np.float64), np.asarray(kv_tokens, np.float64))
    held = kv if window is None else np.minimum(kv, window + q - 1)
    heads = shape.num_heads
    if phase != "prefill":
        if shape.family == "mla":
            heads = max(heads, INSTRUCTION_ROWS)
        cache = np.where(q > 0, held + padding_tokens, 0.0) * shape.cache_elements * cache_bytes_per_element
    else:
        cache = held * shape.num_key_value_heads * (shape.qk_dim + shape.v_dim) * 2.0 * (q > 0)
    pairs = attended_positions(q, kv, window) + q * padding_tokens
    flops = 2.0 * heads * (shape.qk_dim + shape.v_dim) * pairs
    moved = cache + q * 2.0 * shape.num_heads * (shape.qk_dim + shape.v_dim)
    return flops.sum(axis=-1), moved.sum(axis=-1)


def attention_s(
    fit: AttentionKernel,
    *,
    n_sm: int,
    sm_fraction: npt.ArrayLike,
    shape: AttentionShape,
    phase: Phase,
    query_tokens: npt.ArrayLike,
    kv_tokens: npt.ArrayLike,
    cache_bytes_per_element: float = 2.0,
    window: int | None = None,
) -> F64:
    """Return seconds [...] of one kernel over requests [..., r]; 0 where no request has queries."""
    q, kv = np.broadcast_arrays(np.asarray(query_tokens, np.float64), np.asarray(kv_tokens, np.float64))
    flops, moved = attention_work(
        shape,
        phase,
        q,
        kv,
        cache_bytes_per_element=cache_bytes_per_element,
        window=window,
        padding_tokens=fit.padding_tokens,
    )
    share = np.asarray(sm_fraction, np.float64)
    tiles = np.ceil(q / QUERY_TILE).sum(axis=-1)
    units = tiles * (shape.num_heads if phase == "prefill" else shape.num_key_value_heads)
    seen = np.where(q > 0, kv if window is None else np.minimum(kv, window + q - 1), 0.0)
    longest = seen.max(axis=-1, initial=0.0)
    seconds = (
        fit.overhead_s
        + fit.position_s * longest
        + power_sum(flops / (fit.flops_per_s * share), moved / fit.bandwidth_bytes_per_s, fit.norm)
        + fit.unit_s * units / (n_sm * share)
    )
    return np.where(units > 0, seconds, 0.0)
