"""Dense GEMM: rows of measured tables, and the constants of `sim.cost.dense_gemm` that fit them.

A table has the columns gemm_dtype, m, n, k and latency (ms), one row per product [m, k] x [k, n]. Block-wise fp8 and
nvfp4 rows of SGLang time the whole linear layer, quantisation of its bf16 input included; so do the fits. Vidur's
mlp.csv holds four products of one model's layer in every row (`from_vidur`).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from sim.cost.dense_gemm import gemm_s
from sim.hardware import DenseGemm, Device, Dtype
from sim.tokens import F64, Bool

DTYPES: dict[str, Dtype] = {"bfloat16": "bf16", "fp8_block": "fp8", "nvfp4": "fp4"}
# Widths of transformer layers. Narrower products are launch-bound, wider ones the tables hold for few m only.
NARROWEST, WIDEST = 128, 20_000
VIDUR = {
    "n_head", "n_kv_head", "n_embd", "n_expanded_embd", "use_gated_mlp", "num_tokens", "num_tensor_parallel_workers",
}  # fmt: skip


def from_vidur(table: pd.DataFrame) -> pd.DataFrame:
    """Return the dense products of a Vidur mlp.csv (data/profiling/compute/<gpu>/<model>) as a gemm table.

    Its projections, split over the tensor-parallel workers: queries, keys and values in one product, output, gate and
    up in one, down. fp16, whose tensor rate is bf16's; ms. ValueError without a time column.
    """
    tp, hidden, wide = table.num_tensor_parallel_workers, table.n_embd, table.n_expanded_embd
    heads = table.n_head + 2 * table.n_kv_head
    gates = np.where(table.use_gated_mlp.astype(str).str.lower() == "true", 2, 1)
    sides = {
        "attn_pre_proj": (heads * (hidden // table.n_head) // tp, hidden),
        "attn_post_proj": (hidden, hidden // tp),
        "mlp_up_proj": (gates * wide // tp, hidden),
        "mlp_down_proj": (hidden, wide // tp),
    }
    parts = [
        pd.DataFrame({"m": table.num_tokens, "n": n, "k": k, "latency": table[f"time_stats.{name}.median"]})
        for name, (n, k) in sides.items()
        if f"time_stats.{name}.median" in table
    ]
    if not parts:
        names = ", ".join(f"time_stats.{name}.median" for name in sides)
        raise ValueError(f"a Vidur mlp profile needs one of the columns {names}")
    return pd.concat(parts, ignore_index=True).assign(gemm_dtype="bfloat16")


def gemm_rows(table: pd.DataFrame, dtype: Dtype) -> pd.DataFrame:
    """Return columns m, n, k and seconds of ``table``'s rows in ``dtype``; ValueError says what the table lacks."""
    missing = {"gemm_dtype", "m", "n", "k", "latency"} - set(table.columns)
    if missing:
        raise ValueError(f"a gemm table needs the columns {', '.join(sorted(missing))}")
    rows = table[table.gemm_dtype.map(DTYPES) == dtype]
    rows = rows[rows.n.between(NARROWEST, WIDEST) & rows.k.between(NARROWEST, WIDEST) & (rows.latency > 0)]
    if rows.empty:
        raise ValueError(f"no {dtype} rows; the table has gemm_dtype {', '.join(sorted(table.gemm_dtype.unique()))}")
    seconds = rows.latency.to_numpy(np.float64) / 1e3
    return rows[["m", "n", "k"]].assign(seconds=seconds).sort_values(["n", "k", "m"], ignore_index=True)


def held_out(rows: pd.DataFrame) -> Bool:
    """Return which rows are not calibrated on: a third of the weight shapes (n, k), spread evenly, with all their m."""
    shapes = rows.groupby(["n", "k"], sort=True).ngroup().to_numpy()
    chosen: Bool = shapes % 3 == 1
    return chosen


def predict_s(fit: DenseGemm, rows: pd.DataFrame, dtype: Dtype, n_sm: int) -> F64:
    """Return the law's seconds for every row, quantisation included."""
    return gemm_s(
        fit,
        n_sm=n_sm,
        sm_fraction=1.0,
        tokens=rows.m,
        in_features=rows.k,
        out_features=rows.n,
        dtype=dtype,
        quantise=True,
    )


def fit_gemm(rows: pd.DataFrame, dtype: Dtype, device: Device, source: str) -> DenseGemm:
    """Return the constants with the least robust squared log error; the peaks of ``device`` bound the rates."""
    peak, bandwidth = device.peak(dtype), device.memory_bandwidth_bytes_per_s

    def constants(x: F64) -> DenseGemm:
        return DenseGemm(
            overhead_s=float(x[0]) * 1e-6,
            tile_overhead_s=float(x[1]) * 1e-6,
            step_s=float(x[2]) * 1e-9,
            flops_per_s=float(x[3]) * peak,
            bandwidth_bytes_per_s=float(x[4]) * bandwidth,
            quantise_bytes_per_s=None if dtype == "bf16" else float(x[6]) * bandwidth,
            norm=1 + float(np.exp(x[5])),
            source=source,
        )

    def misses(x: F64) -> F64:
        miss: F64 = np.log(predict_s(constants(x), rows, dtype, device.n_sm) / rows.seconds.to_numpy())
        return miss

    start = np.array([3.0, 0.3, 0.3, 0.8, 0.85, 0.0, 0.8])
    bounds = ([0, 0, 0, 0.05, 0.05, -3, 0.05], [30, 3, 5, 1.0, 1.0, 3, 1.5])
    found = least_squares(misses, start, bounds=bounds, loss="soft_l1", f_scale=0.1, x_scale=np.maximum(start, 0.1))
    return constants(found.x)
