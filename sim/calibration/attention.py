"""Attention: rows of measured prefill and decode tables, and the constants of `sim.cost.attention` that fit them.

A table has batch_size, num_heads, isl, step and latency (ms), one row per batch of equal requests: ``isl`` queries each
in prefill, one in decode, after ``step`` cached tokens. Grouped-query tables add num_key_value_heads, head_dim and
window_size (0: none); latent ones are DeepSeek's 128 + 64 and 128 (512 + 64 and 512 absorbed).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from sim.cost.attention import INSTRUCTION_ROWS, QUERY_TILE, Phase
from sim.cost.dense_gemm import power_sum
from sim.hardware import AttentionKernel, Device
from sim.tokens import F64, Bool

Family = Literal["mla", "gqa"]
LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128
CACHE_BYTES = {"bfloat16": 2.0, "fp8": 1.0}
_NEEDED = {
    "mla": {"batch_size", "num_heads", "isl", "step", "kv_cache_dtype", "latency"},
    "gqa": {"batch_size", "num_heads", "num_key_value_heads", "head_dim", "isl", "step", "kv_cache_dtype", "latency"},
}


def attention_rows(
    table: pd.DataFrame, family: Family, phase: Phase, cache_dtype: Literal["bfloat16", "fp8"] = "bfloat16"
) -> pd.DataFrame:
    """Return one row per measured batch: batch, heads, kv_heads, qk_dim, v_dim, cache_elements, query_tokens,
    kv_tokens, cache_bytes (per element) and seconds, the median where a batch was measured more than once.

    Activations in bf16, no sliding window. ValueError says what the table lacks.
    """
    missing = _NEEDED[family] - set(table.columns)
    if missing:
        raise ValueError(f"a {family} {phase} table needs the columns {', '.join(sorted(missing))}")
    rows = table[(table.latency > 0) & (table.kv_cache_dtype == cache_dtype)]
    for column, wanted in (("attn_dtype", "bfloat16"), ("mla_dtype", "bfloat16"), ("window_size", 0)):
        if column in rows:
            rows = rows[rows[column] == wanted]
    if rows.empty:
        raise ValueError(f"no {family} {phase} rows with bfloat16 activations and a {cache_dtype} cache")
    heads = rows.num_heads
    kv_heads: Any
    qk: Any
    v: Any
    cache: Any
    if family == "gqa":
        kv_heads, qk, v = rows.num_key_value_heads, rows.head_dim, rows.head_dim
        cache = kv_heads * (qk + v)
    elif phase == "prefill":
        kv_heads, qk, v, cache = heads, NOPE + ROPE, VALUE, LATENT + ROPE
    else:
        kv_heads, qk, v, cache = 1, LATENT + ROPE, LATENT, LATENT + ROPE
    queries: Any = rows.isl if phase == "prefill" else 1
    shaped = pd.DataFrame(
        {
            "batch": rows.batch_size,
            "heads": heads,
            "kv_heads": kv_heads,
            "qk_dim": qk,
            "v_dim": v,
            "cache_elements": cache,
            "query_tokens": queries,
            "kv_tokens": rows.isl + rows.step,
            "cache_bytes": CACHE_BYTES[cache_dtype],
            "seconds": rows.latency / 1e3,
        }
    )
    keys = [column for column in shaped.columns if column != "seconds"]
    return shaped.groupby(keys, sort=True)[["seconds"]].median().reset_index()


def held_out(rows: pd.DataFrame) -> Bool:
    """Return which rows are not calibrated on: a third of the shapes and batch sizes, spread evenly, at all lengths."""
    groups = rows.groupby(["heads", "kv_heads", "qk_dim", "batch"], sort=True).ngroup().to_numpy()
    chosen: Bool = groups % 3 == 1
    return chosen


def predict_s(fit: AttentionKernel, rows: pd.DataFrame, family: Family, phase: Phase, n_sm: int) -> F64:
    """Return `sim.cost.attention.attention_s` of every row at once; a test holds the two equal."""
    names = ("batch", "heads", "kv_heads", "qk_dim", "v_dim", "cache_elements", "query_tokens", "kv_tokens")
    b, h, kv_heads, qk, v, cache, q, kv = (rows[name].to_numpy(np.float64) for name in names)
    cut = np.maximum(h, INSTRUCTION_ROWS) if family == "mla" and phase == "decode" else h
    flops = 2 * b * cut * (qk + v) * (q * (kv - (q - 1) / 2) + q * fit.padding_tokens)
    if phase == "prefill":
        read = b * kv * kv_heads * (qk + v) * 2
    else:
        read = b * (kv + fit.padding_tokens) * cache * rows.cache_bytes.to_numpy()
    moved = read + b * q * 2 * h * (qk + v)
    units = b * np.ceil(q / QUERY_TILE) * (h if phase == "prefill" else kv_heads)
    busy = power_sum(flops / fit.flops_per_s, moved / fit.bandwidth_bytes_per_s, fit.norm)
    seconds: F64 = fit.overhead_s + fit.position_s * kv + busy + fit.unit_s * units / n_sm
    return seconds


def fit_attention(rows: pd.DataFrame, family: Family, phase: Phase, device: Device, source: str) -> AttentionKernel:
    """Return the constants with the least robust squared log error; the peaks of ``device`` bound the rates."""
    peak, bandwidth = device.peak("bf16"), device.memory_bandwidth_bytes_per_s

    def constants(x: F64) -> AttentionKernel:
        return AttentionKernel(
            overhead_s=float(x[0]) * 1e-6,
            position_s=float(x[1]) * 1e-9 if phase == "prefill" else 0.0,
            unit_s=float(x[2]) * 1e-6,
            flops_per_s=float(x[3]) * peak,
            bandwidth_bytes_per_s=float(x[4]) * bandwidth,
            padding_tokens=float(x[6]) * 100,
            norm=1 + float(np.exp(x[5])),
            source=source,
        )

    def misses(x: F64) -> F64:
        miss: F64 = np.log(predict_s(constants(x), rows, family, phase, device.n_sm) / rows.seconds.to_numpy())
        return miss

    start = np.array([8.0, 5.0, 0.5, 0.6, 0.85, 0.5, 1.0])
    bounds = ([0, 0, 0, 0.05, 0.05, -3, 0], [60, 50, 50, 1.0, 1.0, 3, 10])
    found = least_squares(misses, start, bounds=bounds, loss="soft_l1", f_scale=0.1, x_scale=np.maximum(start, 0.1))
    return constants(found.x)
