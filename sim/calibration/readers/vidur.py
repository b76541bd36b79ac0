"""Vidur-style profiles of MoE layers (Frontier): one measured batch per row with the load's statistics.

``moe_grouped_gemm.median`` in ms; with ``moe_shuffling.median`` it would hold the permutation too. Real routing: the
loads of single experts are not in the table, so ours have the row's pairs, its share of experts with tokens and its
largest load, the rest even.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from sim.calibration.moe import Rows
from sim.hardware import Dtype
from sim.tokens import F64

NAME = "vidur"
_TIMES = ("time_stats.moe_grouped_gemm.median", "moe_grouped_gemm.median")
COLUMNS = {"num_tokens", "num_experts", "num_experts_per_device", "router_topk", "hidden_dim", "expert_hidden_dim", "total_routed_tokens"}  # fmt: skip
_DTYPES: dict[str, Dtype] = {"BF16": "bf16", "FP16": "bf16", "FP8": "fp8"}


def read(table: pd.DataFrame) -> list[Rows]:
    """Return the rows by backend and format. ValueError without a grouped GEMM time."""
    column = next((name for name in _TIMES if name in table), None)
    if column is None:
        raise ValueError(f"a vidur-style MoE profile needs one of the columns {', '.join(_TIMES)}")
    table = table.assign(
        backend=table.get("moe_grouped_gemm_backend", "moe"), precision=table.get("profiling_precision", "BF16")
    )
    found = []
    for (backend, precision), group in table.groupby(["backend", "precision"], sort=True):
        rows = group[(group[column] > 0) & (group.total_routed_tokens > 0) & (group.num_experts_per_device > 0)]
        if str(precision) not in _DTYPES:
            rows = rows.head(0)
        tp = rows.get("num_tensor_parallel_workers", 1)
        frame = pd.DataFrame(
            {
                "hidden_size": rows.hidden_dim,
                "moe_intermediate_size": rows.expert_hidden_dim // tp,
                "n_routed_experts": rows.num_experts,
                "num_experts_per_tok": rows.router_topk,
                "ep_size": rows.num_experts // rows.num_experts_per_device,
                "num_tokens": rows.num_tokens,
                "seconds": rows[column] / 1e3,
            }
        )
        left = len(group) - len(rows)
        dropped = (
            (("no tokens or no time" if str(precision) in _DTYPES else f"number format {precision}", left),)
            if left
            else ()
        )
        name = f"{backend} {precision}"
        found.append(Rows(name, _DTYPES.get(str(precision), "bf16"), frame, _loads(rows), True, dropped))
    return found


def _loads(rows: pd.DataFrame) -> F64:
    held = rows.num_experts_per_device.to_numpy(np.int64)
    pairs = rows.total_routed_tokens.to_numpy(np.float64)
    share = rows["expert_utilization"].to_numpy() if "expert_utilization" in rows else np.ones(len(rows))
    active = np.clip(np.round(share * held), 1, np.minimum(held, np.maximum(pairs, 1))).astype(np.int64)
    top = pairs / held * (rows["max_load_ratio"].to_numpy() if "max_load_ratio" in rows else 1.0)
    top = np.clip(top, pairs / active, pairs - active + 1)
    rest = np.divide(pairs - top, active - 1, out=np.zeros(len(rows)), where=active > 1)
    place = np.arange(int(held.max()) if len(rows) else 1)
    loads: F64 = np.where(place < active[:, None], rest[:, None], 0.0)
    loads[:, 0] = np.where(active > 1, top, pairs)
    return loads
