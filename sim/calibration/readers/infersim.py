"""InferSim's grouped GEMM tables (bench_data/grouped_gemm): up and down projection alone, DeepGEMM fp8, us."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sim.calibration.moe import Rows

NAME = "infersim"
COLUMNS = {
    "num_local_experts",
    "topk",
    "hidden_size",
    "intermediate_size",
    "tokens_per_expert",
    "up_proj_us",
    "down_proj_us",
}


def read(table: pd.DataFrame) -> list[Rows]:
    """Return one set of rows; ``tokens_per_expert`` on each local expert."""
    rows = table[(table.tokens_per_expert > 0) & (table.up_proj_us > 0) & (table.down_proj_us > 0)]
    frame = pd.DataFrame(
        {
            "hidden_size": rows.hidden_size,
            "moe_intermediate_size": rows.intermediate_size,
            "n_routed_experts": rows.num_experts if "num_experts" in rows else rows.num_local_experts,
            "num_experts_per_tok": rows.topk,
            "ep_size": rows.num_gpus if "num_gpus" in rows else 1,
            "num_tokens": rows.tokens_per_expert * rows.num_local_experts / rows.topk,
            "seconds": (rows.up_proj_us + rows.down_proj_us) / 1e6,
        }
    )
    place = np.arange(int(rows.num_local_experts.max()) if len(rows) else 1)
    held = rows.num_local_experts.to_numpy()[:, None]
    loads = np.where(place < held, rows.tokens_per_expert.to_numpy(np.float64)[:, None], 0.0)
    dropped = (("no tokens or no time", len(table) - len(rows)),) if len(table) > len(rows) else ()
    return [Rows("deepgemm", "fp8", frame, loads, False, dropped)]
