"""LLMServingSim's layer profiles of vLLM (profiler/perf): experts by activated count, dense products, attention batches.

The tables hold no sizes; those published are of Qwen3-30B-A3B, whose sizes stand below. A profile repeats one kernel, so
whatever fits in the L2 cache (`CACHE_BYTES`) is read from there, unlike in a model, where the other layers come between:
`read` and `gemm_rows` leave such weights out where reading them is what takes the time. Times in us.

Attention batches hold decodes, one prompt's chunk, or both. Both together are one kernel, which gives every decoding query
of every head a tile of its own: up to four times the time of the decode kernel (`mixed_rows`).

Constants are fitted to two rows of three (`held_out`) in the range that serving visits: `SERVED` in decode, where fewer
requests or shorter contexts run other kernels.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from sim.calibration.moe import Rows
from sim.cost.attention import Phase
from sim.hardware import AttentionKernel, Device, Elementwise
from sim.tokens import F64, Bool

NAME = "llmservingsim"
COLUMNS = {"tokens", "activated_experts", "time_us"}
HIDDEN, WIDTH, EXPERTS, CHOICES = 2048, 768, 128, 8
HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 32, 4, 128, 151_936
CACHE_BYTES = 128 * 2**20  # L2 of an RTX PRO 6000, NVIDIA's data sheet
# From these tokens on a projection of 17 or 21 MB is limited by its products, wherever its weights come from.
COMPUTE_BOUND_TOKENS = 256
SERVED = (8, 128, 4096)  # fewest decoding requests, shortest and longest context
SERVED_CHUNK = 128
PRODUCTS = {"qkv_proj": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM), "o_proj": (HEADS * HEAD_DIM, HIDDEN)}
_ROPE = (HEADS + KV_HEADS) * HEAD_DIM
# Elements that one token reads and writes: norms (the last one adds the residual stream), queries and keys in place.
ELEMENTWISE = {"layernorm": 2 * HIDDEN, "final_layernorm": 4 * HIDDEN, "qk_norm": 2 * _ROPE, "rotary_emb": 2 * _ROPE}


def read(table: pd.DataFrame) -> list[Rows]:
    """Return the experts' rows, pairs spread evenly over the activated ones; ValueError for another model's counts."""
    if not table.activated_experts.between(CHOICES, EXPERTS).all():
        raise ValueError(f"not Qwen3-30B-A3B: its tokens activate {CHOICES} to {EXPERTS} experts")
    weights = table.activated_experts * (3 * HIDDEN * WIDTH * 2.0)
    cold = weights > CACHE_BYTES
    rows = table[cold]
    frame = pd.DataFrame(
        {
            "hidden_size": HIDDEN,
            "moe_intermediate_size": WIDTH,
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": CHOICES,
            "ep_size": 1,
            "num_tokens": rows.tokens,
            "seconds": rows.time_us / 1e6,
        }
    )
    active = rows.activated_experts.to_numpy(np.float64)[:, None]
    loads: F64 = np.where(
        np.arange(EXPERTS) < active, rows.tokens.to_numpy(np.float64)[:, None] * CHOICES / active, 0.0
    )
    dropped = (("weights stay in the L2 cache", int((~cold).sum())),) if not cold.all() else ()
    return [Rows("vLLM fused experts", "bf16", frame, loads, True, dropped)]


def gemm_rows(dense: pd.DataFrame, per_sequence: pd.DataFrame) -> pd.DataFrame:
    """Return m, n, k and seconds of the dense products: the output head, whose weights no cache holds, at all sizes, the
    projections where they are limited by compute."""
    head = per_sequence[per_sequence.layer == "lm_head"]
    parts = [pd.DataFrame({"m": head.sequences, "n": VOCABULARY, "k": HIDDEN, "seconds": head.time_us / 1e6})]
    for layer, (k, n) in PRODUCTS.items():
        rows = dense[(dense.layer == layer) & (dense.tokens >= COMPUTE_BOUND_TOKENS)]
        parts.append(pd.DataFrame({"m": rows.tokens, "n": n, "k": k, "seconds": rows.time_us / 1e6}))
    return pd.concat(parts, ignore_index=True).sort_values(["n", "k", "m"], ignore_index=True)


def elementwise_rows(dense: pd.DataFrame) -> pd.DataFrame:
    """Return bytes and seconds of the kernels that move activations only."""
    rows = dense[dense.layer.isin(list(ELEMENTWISE))]
    moved = rows.tokens * rows.layer.map(ELEMENTWISE) * 2.0
    return pd.DataFrame({"layer": rows.layer, "tokens": rows.tokens, "bytes": moved, "seconds": rows.time_us / 1e6})


def attention_rows(table: pd.DataFrame, phase: Phase) -> pd.DataFrame:
    """Return rows as `sim.calibration.attention.attention_rows` does, of batches of one ``phase`` only: all prompts, the
    decodes in `SERVED`."""
    decode = phase == "decode"
    rows = table[(table.prefill_chunk == 0) & _served(table) if decode else (table.n_decode == 0)]
    queries = 1 if decode else rows.prefill_chunk
    return _shaped(
        batch=rows.n_decode if decode else 1,
        queries=queries,
        context=rows.kv_decode if decode else rows.kv_prefill + rows.prefill_chunk,
        seconds=rows.time_us / 1e6,
    )


def mixed_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return the decodes of batches that hold a chunk too, seconds being what the kernel takes beyond the chunk alone.

    Also chunk, kv_prefill and whole_s, the time of the whole batch. Only in `SERVED`, on chunks from `SERVED_CHUNK` on.
    """
    keys = ["prefill_chunk", "kv_prefill"]
    alone = table[table.n_decode == 0].set_index(keys).time_us
    rows = table[(table.prefill_chunk >= SERVED_CHUNK) & _served(table)]
    without = alone.reindex(pd.MultiIndex.from_frame(rows[keys])).to_numpy()
    shaped = _shaped(
        batch=rows.n_decode, queries=1, context=rows.kv_decode, seconds=(rows.time_us - without) / 1e6
    ).assign(chunk=rows.prefill_chunk, kv_prefill=rows.kv_prefill, whole_s=rows.time_us / 1e6)
    return shaped[shaped.seconds.notna()].reset_index(drop=True)


def held_out(values: pd.Series) -> Bool:
    """Return which rows are not calibrated on: those with every third of the distinct ``values``."""
    chosen: Bool = np.unique(values, return_inverse=True)[1] % 3 == 1
    return chosen


def fit_mixed(rows: pd.DataFrame, device: Device, source: str) -> AttentionKernel:
    """Return the constants of decodes beside prompts, with the least robust squared log error of whole batches.

    A tile takes as long for one query as for all it could hold, whichever head it belongs to: padded positions at a low
    rate, and no term of key-value heads. The bandwidth is that of ``device``.
    """
    flops = 2.0 * rows.heads * (rows.qk_dim + rows.v_dim) * rows.batch
    alone = rows.whole_s - rows.seconds

    def misses(x: F64) -> F64:
        rate, padding = np.exp(x)
        gap: F64 = np.log((alone + flops * (rows.kv_tokens + padding) / (rate * 1e12)) / rows.whole_s).to_numpy()
        return gap

    found = least_squares(misses, np.log([4.0, 250.0]), loss="soft_l1", f_scale=0.1)
    rate, padding = np.exp(found.x)
    return AttentionKernel(
        overhead_s=0.0,
        position_s=0.0,
        unit_s=0.0,
        flops_per_s=rate * 1e12,
        bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s,
        padding_tokens=padding,
        norm=20.0,
        source=source,
    )


def fit_elementwise(rows: pd.DataFrame, device: Device, source: str) -> Elementwise:
    """Return overhead and bandwidth with the least robust squared log error, the bandwidth that of ``device`` at most:
    a profile finds its activations in the L2 cache up to some thousand tokens, wider models and steps do not."""
    most = np.log(device.memory_bandwidth_bytes_per_s / 1e12)

    def misses(x: F64) -> F64:
        overhead, rate = np.exp(x)
        gap: F64 = np.log((overhead * 1e-6 + rows.bytes / (rate * 1e12)) / rows.seconds).to_numpy()
        return gap

    start, bounds = np.array([0.7, most - 0.1]), ([-5.0, most - 5], [5.0, most])
    found = least_squares(misses, start, bounds=bounds, loss="soft_l1", f_scale=0.1)
    overhead, rate = np.exp(found.x)
    return Elementwise(overhead_s=overhead * 1e-6, bandwidth_bytes_per_s=rate * 1e12, source=source)


def _served(table: pd.DataFrame) -> Bool:
    requests, shortest, longest = SERVED
    served: Bool = ((table.n_decode >= requests) & table.kv_decode.between(shortest, longest)).to_numpy()
    return served


def _shaped(*, batch: object, queries: object, context: pd.Series, seconds: pd.Series) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "batch": batch,
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "qk_dim": HEAD_DIM,
            "v_dim": HEAD_DIM,
            "cache_elements": 2 * KV_HEADS * HEAD_DIM,
            "query_tokens": queries,
            "kv_tokens": context,
            "cache_bytes": 2.0,
            "seconds": seconds,
        }
    )
