"""MoE tables of aiconfigurator: one rank's time per (tokens of the EP group, shape, EP, TP, distribution).

Fitted to: ``balanced`` rows without tensor parallelism. ``power_law`` rows and those with tensor parallelism are kept
apart, to be predicted. Left out as traps: number formats and kernels without a gate matrix that the law has not, rows of
kernels that walk all pairs (time hardly shrinks with the local load; on A100 triton at EP 64 still takes five times
its share) at EP above 1, rows slower than EP 1's.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd

from sim.calibration.loads import balanced, power_law
from sim.calibration.moe import Rows
from sim.hardware import Dtype
from sim.tokens import F64, Bool

NAME = "aiconfigurator"
COLUMNS = {
    "kernel_source", "moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size",
    "moe_ep_size", "distribution",
}  # fmt: skip
DTYPES: dict[str, Dtype] = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8", "nvfp4": "fp4"}
DRAWS = 4
_SHAPE = ["hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"]
_WALKS, _SLOWER = "EP above 1 of a kernel that walks all pairs", "slower than EP 1 with a larger load"


def read(table: pd.DataFrame) -> list[Rows]:
    """Return the rows by kernel_source and moe_dtype. ValueError without a latency column."""
    for column in ("latency", "latency_ms"):
        if column in table:
            table = table.assign(seconds=table[column].astype(float) / 1e3)
            break
    else:
        raise ValueError("an aiconfigurator moe table needs a latency or latency_ms column")
    found = []
    for (kernel, number), group in table.groupby(["kernel_source", "moe_dtype"], sort=True, observed=True):
        dropped: Counter[str] = Counter()
        if number not in DTYPES or "nongated" in str(kernel):
            reason = f"number format {number}" if number not in DTYPES else "no gate matrix"
            dropped[reason] = len(group)
            empty = group.head(0)
            found.append(Rows(f"{kernel} {number}", "bf16", empty, np.zeros((0, 1)), True, tuple(dropped.items())))
            continue
        frame = _frame(group)
        even, uneven = (
            frame[frame.distribution == "balanced"],
            frame[frame.distribution.str.match(r"power_law_[\d.]+$")],
        )
        keep = _kept(even, dropped)
        if not len(even):
            dropped["no balanced rows"] = len(frame)
        whole, narrow = even[keep & (even.tp == 1)], even[keep & (even.tp > 1)]
        name, dtype = f"{kernel} {number}", DTYPES[str(number)]
        uneven = uneven[(uneven.tp == 1) & ((uneven.ep_size == 1) | (_WALKS not in dropped))]
        found.append(
            Rows(
                name, dtype, whole, _balanced_loads(whole), True, tuple(sorted(dropped.items())),
                Rows(name, dtype, uneven, _drawn_loads(uneven)) if len(uneven) else None,
                Rows(name, dtype, narrow, _balanced_loads(narrow)) if len(narrow) else None,
            )
        )  # fmt: skip
    return found


def _frame(group: pd.DataFrame) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "hidden_size": group.hidden_size,
            "moe_intermediate_size": group.inter_size // group.moe_tp_size,
            "n_routed_experts": group.num_experts,
            "num_experts_per_tok": group.topk,
            "ep_size": group.moe_ep_size,
            "tp": group.moe_tp_size,
            "num_tokens": group.num_tokens,
            "distribution": group.distribution.astype(str),
            "seconds": group.seconds,
        }
    )
    frame = frame[(frame.seconds > 0) & (frame.num_experts_per_tok > 0) & (frame.n_routed_experts % frame.ep_size == 0)]
    keys = [name for name in frame.columns if name != "seconds"]
    return frame.groupby(keys, sort=True)[["seconds"]].median().reset_index()


def _kept(even: pd.DataFrame, dropped: Counter[str]) -> Bool:
    """Return which balanced rows are no traps; counts the others by reason."""
    keep = np.ones(len(even), dtype=bool)
    single = even[even.ep_size == 1].set_index([*_SHAPE, "tp", "num_tokens"]).seconds
    alone = single.reindex(pd.MultiIndex.from_frame(even[[*_SHAPE, "tp", "num_tokens"]])).to_numpy()
    ratio = even.seconds.to_numpy() / alone
    ep, tokens = even.ep_size.to_numpy(), even.num_tokens.to_numpy()
    # A kernel that works on its own tokens needs about an eighth at EP 8.
    large = (ep == 8) & (tokens >= 4096) & ~np.isnan(ratio)
    if large.any() and np.median(ratio[large]) > 0.5:
        walks = ep > 1
        dropped[_WALKS] = int(walks.sum())
        keep &= ~walks
    slower = keep & (ep > 1) & (ratio > 1.3)
    if slower.any():
        dropped[_SLOWER] = int(slower.sum())
        keep &= ~slower
    return keep


def _keys(frame: pd.DataFrame) -> list[tuple[int, int, int, int]]:
    columns = frame[["num_tokens", "n_routed_experts", "num_experts_per_tok", "ep_size"]]
    return [(int(t), int(e), int(k), int(p)) for t, e, k, p in columns.itertuples(index=False)]


def _balanced_loads(frame: pd.DataFrame) -> F64:
    keys = _keys(frame)
    known = {key: balanced(*key) for key in dict.fromkeys(keys)}
    loads = np.zeros((len(keys), max((len(load) for load in known.values()), default=1)))
    for row, key in zip(loads, keys, strict=True):
        row[: len(known[key])] = known[key]
    return loads


def _drawn_loads(frame: pd.DataFrame) -> F64:
    keys = [(*key, float(name.rpartition("_")[2])) for key, name in zip(_keys(frame), frame.distribution, strict=True)]
    # Seeded by the row, so that no row's draws depend on which others are there.
    known = {
        key: power_law(*key[:4], key[4], DRAWS, np.random.default_rng([int(1000 * v) for v in key])) for key in keys
    }
    loads = np.zeros((len(keys), DRAWS, max(load.shape[1] for load in known.values())), dtype=np.float64)
    for row, key in zip(loads, keys, strict=True):
        row[:, : known[key].shape[1]] = known[key]
    return loads
