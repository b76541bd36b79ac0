"""Tuned fused-MoE tables of ROCm/aiter: ``us`` in all, experts and inter_dim per rank, one kernel set per cu_num.

Rows whose time repeats that of a smaller token count are the tuner's reuse, not a measurement, and are left out.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from sim.calibration.loads import balanced
from sim.calibration.moe import Rows
from sim.hardware import Dtype

NAME = "aiter"
COLUMNS = {"cu_num", "token", "model_dim", "inter_dim", "expert", "topk", "q_dtype_w", "us"}


def _dtype(weights: str) -> Dtype | None:
    if "float4" in weights or "fp4" in weights:
        return "fp4"
    if "float8" in weights:
        return "fp8"
    return "bf16" if "bfloat16" in weights else None


def read(table: pd.DataFrame) -> list[Rows]:
    """Return the rows by number of compute units and weights' format."""
    found = []
    for (units, weights), group in table.groupby(["cu_num", "q_dtype_w"], sort=True):
        dtype, kernel = _dtype(str(weights)), f"aiter cu{units} {str(weights).removeprefix('torch.')}"
        group = group[group.us > 0].sort_values(["model_dim", "inter_dim", "expert", "topk", "token"])
        repeats = group.duplicated(["model_dim", "inter_dim", "expert", "topk", "us"])
        dropped = [("time repeats that of fewer tokens", int(repeats.sum()))] if repeats.any() else []
        rows = group[~repeats] if dtype else group.head(0)
        if dtype is None:
            dropped.append((f"number format {weights}", len(group)))
        frame = pd.DataFrame(
            {
                "hidden_size": rows.model_dim,
                "moe_intermediate_size": rows.inter_dim,
                "n_routed_experts": rows.expert,
                "num_experts_per_tok": rows.topk,
                "ep_size": 1,
                "num_tokens": rows.token,
                "seconds": rows.us / 1e6,
            }
        )
        loads = np.zeros((len(rows), int(rows.expert.max()) if len(rows) else 1))
        for row, (tokens, experts, topk) in zip(
            loads, rows[["token", "expert", "topk"]].itertuples(index=False), strict=True
        ):
            row[: int(experts)] = balanced(int(tokens), int(experts), int(topk), 1)
        found.append(Rows(kernel, dtype or "bf16", frame, loads, True, tuple(dropped), n_sm=int(str(units))))
    return found
