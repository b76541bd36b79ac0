"""Dispatch, combine and collectives beside DeepEP's published tables and measured ones.

Routing is DeepEP's test: random scores, the best ``topk_group`` nodes by their best expert, the best 8 of 256 there. Rows
of DeepEP's own tables are calibration (`sim.cost.port`); V2, ISCA 2025, other node counts and devices are predictions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sim.cluster import Cluster, build_network
from sim.cost import CommunicationCost, Direction, Mode, collectives
from sim.cost.port import Kernels, Port, Release
from sim.exchange import is_token_in_rank
from sim.gating.select import Candidates
from sim.gating.select.group_limited import GroupLimited
from sim.gating.select.topk import TopK
from sim.kernels.choose import choose
from sim.network import Network
from sim.rng import stream
from sim.validation import Figure, Inputs
from sim.yamlfile import read

HIDDEN, EXPERTS, TOPK = 7168, 256, 8
BYTES: dict[Direction, float] = {"dispatch": HIDDEN + HIDDEN / 32, "combine": 2.0 * HIDDEN}
# A low-latency message carries 16 bytes more; its printed bandwidths follow from latencies that way.
MESSAGE: dict[Direction, float] = {"dispatch": BYTES["dispatch"] + 16, "combine": BYTES["combine"]}
_SAMPLE = 16_384
# Rows: EP size, dispatch and combine.
_NORMAL: dict[Release, tuple[tuple[int, float, float], ...]] = {
    "v1": ((8, 153, 158), (16, 43, 43), (32, 58, 57), (64, 51, 50)),
    "v1_first": ((8, 153, 158), (16, 43, 43), (32, 44, 47), (64, 46, 45)),
}
_LOW_LATENCY: dict[Release, tuple[tuple[int, float, float], ...]] = {
    "v1": ((8, 77, 114), (16, 118, 195), (32, 155, 273), (64, 173, 314), (128, 192, 369), (256, 194, 360)),
    "v1_first": ((8, 163, 318), (16, 173, 329), (32, 182, 350), (64, 186, 353)),
}
_FIGURE_7: tuple[tuple[int, float, float], ...] = (
    (16, 43.05, 42.47),
    (32, 58.02, 56.96),
    (64, 50.58, 48.54),
    (128, 45.34, 41.6),
)
# Cluster, EP size, SMs, dispatch and combine; "b200 CX7" is B200 with 400 Gb/s cards.
_V2: tuple[tuple[str, int, int, float, float], ...] = (
    ("h100", 16, 12, 90, 81),
    ("h100", 32, 6, 61, 61),
    ("b200 CX7", 16, 12, 90, 91),
    ("b200", 8, 64, 726, 740),
    ("b200", 8, 24, 643, 675),
)
_COLLECTIVES = {
    "all_gather": collectives.all_gather_s,
    "reduce_scatter": collectives.reduce_scatter_s,
    "all_reduce": collectives.all_reduce_s,
    "alltoall": collectives.all_to_all_s,
}


def figures(inputs: Inputs) -> Iterator[Figure]:
    """Yield published rows, then medians over measured tables where these are at hand."""
    yield from _published(inputs.scenarios)
    yield from _v2(inputs.scenarios)
    if inputs.data is not None:
        folder = inputs.data / "aiconfigurator"
        low, normal = (folder / f"deepep_{name}_h100_nodes1-2.parquet" for name in ("ll", "normal"))
        if low.is_file() and normal.is_file():
            yield from _deepep(inputs.scenarios, "h100", pd.read_parquet(low), pd.read_parquet(normal), "excerpt")
        if (folder / "alltoall_gb200_ep2-16.parquet").is_file():
            yield from _nvlink(inputs.scenarios, pd.read_parquet(folder / "alltoall_gb200_ep2-16.parquet"))
        for name in ("h100", "a100"):
            if (folder / f"nccl_{name}.parquet").is_file():
                yield from _nccl(inputs.scenarios, name, pd.read_parquet(folder / f"nccl_{name}.parquet"))
    found = find_spec("aiconfigurator_core")
    if found is not None and found.submodule_search_locations:
        yield from _package(inputs.scenarios, Path(next(iter(found.submodule_search_locations))) / "systems" / "data")


def network(scenarios: Path, name: str, n_ranks: int) -> Network:
    """Return the first ``n_ranks`` devices of a shipped cluster, made as large as they need."""
    fields: dict[str, Any] = dict(read(scenarios / "clusters" / f"{name.split()[0]}.yaml").data)
    if name.endswith("CX7"):
        fields["inter_node"] = read(scenarios / "clusters" / "h100.yaml").data["inter_node"]
    fields["nodes"] = max(1, -(-n_ranks // fields["devices_per_node"]))
    return build_network(Cluster.model_validate(fields), n_ranks)


@lru_cache(maxsize=64)
def copies(n_ranks: int, ranks_per_node: int, topk_group: int) -> tuple[float, float]:
    """Return copies per token for one rank and for one node, on average over ranks and tokens."""
    nodes = max(1, n_ranks // ranks_per_node)
    scores = np.abs(stream(0, "validate", "deepep").standard_normal((_SAMPLE, EXPERTS), dtype=np.float32)) + 1
    limited = topk_group < nodes
    rule = GroupLimited(n_group=nodes, topk_group=topk_group, group_score="max") if limited else TopK()
    one, kernels = np.ones(EXPERTS, np.float32), choose(10**9)
    ids = rule.select(Candidates(scores, one, 0 * one, TOPK, kernels, lambda: stream(0, "validate", "gate")))
    expert = np.arange(EXPERTS, dtype=np.int32)
    per_rank = is_token_in_rank(ids, expert // (EXPERTS // n_ranks), n_ranks).sum()
    per_node = is_token_in_rank(ids, expert // (EXPERTS // nodes), nodes).sum()
    return float(per_rank) / _SAMPLE / n_ranks, float(per_node) / _SAMPLE / nodes


def seconds(
    cost: CommunicationCost, net: Network, tokens: float, way: Direction, mode: Mode, size: float, topk: int = TOPK
) -> float:
    """Return the time of an even exchange, ``tokens`` per rank."""
    if mode == "low_latency":
        rank, node = topk / net.n_ranks, 0.0
    else:
        rank, node = copies(net.n_ranks, min(net.ranks_per_node, net.n_ranks), 4)
    times, _ = cost.pair_times_s(
        net,
        rank_tokens=np.full((net.n_ranks, net.n_ranks), tokens * rank),
        node_tokens=np.full((net.n_ranks, net.n_nodes), tokens * node),
        bytes_per_token=size,
        mode=mode,
        direction=way,
    )
    return float(times.max())


def _logical(cost: CommunicationCost, net: Network, tokens: float, way: Direction) -> float:
    """Return GB/s as DeepEP's tests print it: copies per node (per rank within one node), the own one included."""
    rank, node = copies(net.n_ranks, min(net.ranks_per_node, net.n_ranks), 4)
    per_token = rank * net.n_ranks if net.n_nodes == 1 else node * net.n_nodes
    return tokens * per_token * BYTES[way] / seconds(cost, net, tokens, way, "normal", BYTES[way]) / 1e9


def _published(scenarios: Path) -> Iterator[Figure]:
    where, errors = "DeepEP docs/legacy.md, H800", list[float]()
    for release, rows in _NORMAL.items():
        for size, dispatch, combine in rows:
            net = network(scenarios, "h800", size)
            for way, value in zip(BYTES, (dispatch, combine), strict=True):
                ours = _logical(Port(release=release), net, 4096, way)
                errors.append(ours / value - 1)
                yield Figure(f"{release} normal {way}, EP{size}", where, value, ours, 0.2, "GB/s", kind="calibration")
    for release, rows in _LOW_LATENCY.items():
        for size, dispatch, combine in rows:
            net, cost = network(scenarios, "h800", size), Port(release=release)
            for way, value in zip(BYTES, (dispatch, combine), strict=True):
                us = seconds(cost, net, 128, way, "low_latency", MESSAGE[way]) * 1e6
                errors.append(us / value - 1)
                yield Figure(f"{release} low latency {way}, EP{size}", where, value, us, 0.2, "us", kind="calibration")
    yield _median("all rows of docs/legacy.md, both releases", where, errors, 0.1, kind="calibration")
    for size, dispatch, combine in _FIGURE_7:
        net = network(scenarios, "h800", size)
        for way, value in zip(BYTES, (dispatch, combine), strict=True):
            ours = _logical(Port(), net, 4096, way)
            yield Figure(f"{way} on {size} GPUs", "arXiv 2505.09343, Figure 7", value, ours, 0.2, "GB/s")


def _v2(scenarios: Path) -> Iterator[Figure]:
    for name, size, sms, dispatch, combine in _V2:
        net, cost = network(scenarios, name, size), Port(release="v2", num_sms=sms)
        for way, value in zip(BYTES, (dispatch, combine), strict=True):
            ours = _logical(cost, net, 8192, way)
            yield Figure(
                f"v2 {way}, {name}, EP{size}, {sms} SMs", "DeepEP README.md (V2)", value, ours, 0.2, "GB/s",
                kind="calibration" if sms in (6, 12) else "prediction",
            )  # fmt: skip


def _median(name: str, source: str, errors: list[float], bar: float, **more: Any) -> Figure:
    return Figure(f"{name}: median error", source, 0, float(np.median(np.abs(errors))), bar, absolute=True, **more)


def _deepep(
    scenarios: Path, name: str, low: pd.DataFrame, normal: pd.DataFrame, version: str, per_node: int = 8
) -> Iterator[Figure]:
    source = f"aiconfigurator-core 0.12.0, DeepEP tables, {version}"
    for nodes in sorted(set(low.node_num)):
        net, rows = network(scenarios, name, per_node * int(nodes)), low[low.node_num == nodes]
        calibration: Any = {"kind": "calibration"} if name == "h100" and nodes <= 2 else {}
        for way in BYTES:
            errors = []
            for row in rows.to_dict("records"):
                h, k = float(row.get("hidden_size", HIDDEN)), int(row.get("num_topk", TOPK))
                size = h + h / 32 + 16 if way == "dispatch" else 2 * h
                ours = seconds(Port(), net, row["num_token"], way, "low_latency", size, k)
                errors.append(ours * 1e6 / row[f"{way}_avg_t_us"] - 1)
            yield _median(f"{name}, {nodes} nodes, low latency {way} ({version})", source, errors, 0.2, **calibration)
    for nodes in sorted(set(normal.node_num)):
        net, rows = network(scenarios, name, per_node * int(nodes)), normal[normal.node_num == nodes]
        calibration = {"kind": "calibration"} if name == "h100" and nodes <= 2 else {}
        if nodes == 8:
            calibration = {"reason": "measured at a third of DeepEP's published bandwidth, whatever the SMs: suspect"}
        for way in BYTES:
            errors = []
            for row in rows.to_dict("records"):
                cost = Port(num_sms=int(row[f"{way}_sms"]))
                ours = seconds(cost, net, row["num_token"], way, "normal", BYTES[way])
                errors.append(ours * 1e6 / row[f"{way}_transmit_us"] - 1)
            yield _median(f"{name}, {nodes} nodes, normal {way} ({version})", source, errors, 0.2, **calibration)


def _nvlink(scenarios: Path, table: pd.DataFrame) -> Iterator[Figure]:
    """TensorRT-LLM's one-sided kernels on GB200: a copy per rank, as normal mode, by all SMs, at low-latency overheads."""
    low = Port().constants.low_latency_s
    cost = Port(num_sms=0, kernels=Kernels(dispatch_s=low, combine_s=low))
    # NVFP4 with a scale per 16 elements goes out, bf16 comes back.
    sizes: dict[Direction, float] = {"dispatch": HIDDEN * 0.5625, "combine": 2.0 * HIDDEN}
    rows = table[table.kernel_source == "NVLinkOneSided"]
    for size in sorted(set(rows.moe_ep_size)):
        net = network(scenarios, "gb200_nvl72", int(size))
        for way, bytes_per_token in sizes.items():
            part = rows[(rows.moe_ep_size == size) & (rows.op_name == f"alltoall_{way}")]
            ours = [seconds(cost, net, t, way, "normal", bytes_per_token) for t in part.num_tokens]
            errors = list(np.array(ours) * 1e3 / part.latency.to_numpy() - 1)
            source = "aiconfigurator-core 0.12.0, trtllm_alltoall, NVLinkOneSided"
            yield _median(f"gb200_nvl72, EP{size}, one-sided {way}", source, errors, 0.25)


def _nccl(scenarios: Path, name: str, table: pd.DataFrame) -> Iterator[Figure]:
    cluster = Cluster.model_validate(read(scenarios / "clusters" / f"{name}.yaml").data)
    half = table[table.nccl_dtype == "half"]
    for op, n in sorted(set(zip(half.op_name, half.num_gpus, strict=True))):
        rows = half[(half.op_name == op) & (half.num_gpus == n)]
        latency_ms = rows.groupby("message_size").latency.median()
        size = latency_ms.index.to_numpy(np.float64) * 2
        domain = cluster.topology.domain(cluster)
        ours = _COLLECTIVES[str(op)](cluster, int(n), size, domain)
        errors = list(ours * 1e3 / latency_ms.to_numpy() - 1)
        kind: Any = "calibration" if name in ("h100", "a100") and n != 4 else "prediction"
        yield _median(
            f"{name}, NCCL {op}, {n} devices", "aiconfigurator-core 0.12.0, nccl table", errors, 0.25, kind=kind
        )


def _package(scenarios: Path, root: Path) -> Iterator[Figure]:
    clusters = (("h100", "h100_sxm", 8), ("h200", "h200_sxm", 8), ("b200", "b200_sxm", 8), ("gb200_nvl72", "gb200", 4))
    for name, folder, per_node in clusters:
        # The H200 tables of 0.5.6.post2 are H100's.
        for version in ("0.5.6.post2", "0.5.12") if name == "h100" else ("0.5.12",):
            at = root / folder / "comm" / "sglang" / version
            if not (at / "wideep_deepep_ll_perf.parquet").is_file():
                continue
            low, normal = (pd.read_parquet(at / f"wideep_deepep_{part}_perf.parquet") for part in ("ll", "normal"))
            normal = normal[
                (normal.hidden_size == HIDDEN) & (normal.num_experts == EXPERTS) & (normal.num_topk == TOPK)
            ]
            # Fewer experts than a token asks for ranks: the collector's load is uneven there.
            low = low[low.num_experts > 16]
            yield from _deepep(scenarios, name, low, normal, version, per_node)
        if name != "h100" and (nccl := root / folder / "comm" / "nccl" / "2.29.2" / "nccl_perf.parquet").is_file():
            yield from _nccl(scenarios, name, pd.read_parquet(nccl))
