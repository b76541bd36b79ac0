"""Arithmetic of papers, recomputed by the simulator's own cost classes and model geometry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from sim.cluster import Cluster, build_network
from sim.cost import Direction
from sim.cost.port import Kernels, Port
from sim.model import Model
from sim.network import Network
from sim.validation import Figure, Inputs
from sim.yamlfile import read

ISCA = "arXiv 2505.09343, section 2.3.2"
TABLE_4 = "arXiv 2505.09343, Table 4"
V3_REPORT = "arXiv 2412.19437, Table 1"
_RANKS, _SENT, _TOKENS = 16, 9, 32
_BARE = Port(
    num_sms=0, kernels=Kernels(dispatch_s=0, combine_s=0, low_latency_s=0, low_latency_nic_s=0, low_latency_share=1)
)


def figures(inputs: Inputs) -> Iterator[Figure]:
    """Yield the decode bound of ISCA 2025, ideal and with real latencies, and the cost of training DeepSeek-V3."""
    yield from _decode(inputs.scenarios)
    yield from _training(inputs.scenarios)


def one_device_per_node(scenarios: Path) -> Network:
    """Return 16 H800 nodes of one device, so that every expert is behind the NIC, as the paper counts."""
    fields = dict(read(scenarios / "clusters" / "h800.yaml").data) | {"nodes": _RANKS, "devices_per_node": 1}
    return build_network(Cluster.model_validate(fields), _RANKS)


def exchange_s(cost: Port, network: Network, hidden: int) -> float:
    """Return dispatch (FP8) plus combine (bf16) of 32 tokens per device, each to nine experts on other devices."""
    tokens = sum((_TOKENS * np.roll(np.eye(_RANKS), shift, axis=1) for shift in range(1, _SENT + 1)), np.zeros(()))
    total = 0.0
    ways: tuple[tuple[Direction, int], ...] = (("dispatch", 1), ("combine", 2))
    for way, width in ways:
        times, _ = cost.pair_times_s(
            network,
            rank_tokens=tokens,
            node_tokens=np.zeros((_RANKS, network.n_nodes)),
            bytes_per_token=float(width * hidden),
            mode="low_latency",
            direction=way,
        )
        total += float(times.max())
    return total


def _decode(scenarios: Path) -> Iterator[Figure]:
    real = one_device_per_node(scenarios)
    for rate, exchange_us, tpot_ms, tokens_per_s in ((50e9, 120.96, 14.76, 67.0), (900e9, 6.72, 0.82, 1200.0)):
        flat = np.full(len(real.link_names), rate)
        ideal = replace(real, link_bandwidth_bytes_per_s=flat, link_latency_s=np.zeros_like(flat))
        one = exchange_s(_BARE, ideal, 7000)
        step = 2 * one * 61
        at = f"at {rate / 1e9:.0f} GB/s"
        yield Figure(f"decode: dispatch + combine {at}", ISCA, exchange_us, one * 1e6, 1e-9, "us")
        yield Figure(f"decode: time per token {at}", ISCA, tpot_ms, step * 1e3, 0.005, "ms")
        yield Figure(f"decode: tokens per second {at}", ISCA, tokens_per_s, 1 / step, 0.02)
    wide = replace(real, link_bandwidth_bytes_per_s=np.full(len(real.link_names), 50e9))
    wide = replace(wide, link_latency_s=np.zeros(len(real.link_names)))
    yield Figure(
        "decode: the same with h = 7168", ISCA, 120.96, exchange_s(_BARE, wide, 7168) * 1e6, 0, "us",
        relation="at_least", reason="the paper's figure follows from 7,000 only",
    )  # fmt: skip
    sizes = {"h = 7000": 7000, "h = 7168": 7168}
    for name, hidden in sizes.items():
        ours = exchange_s(Port(), real, hidden) * 1e6
        yield Figure(
            f"decode: with DeepEP's overheads, NIC share and latencies, {name}", f"{ISCA}, a lower bound", 120.96, ours, 0,
            "us", relation="at_least", reason="2.8 us same leaf (Table 5), 46 of 50 GB/s, 23 us of kernel per direction",
        )  # fmt: skip
    nic = real.link_latency_s[real.paths[0, 1][real.paths[0, 1] >= 0]].sum()
    yield Figure(
        "InfiniBand, same leaf: latency of a route",
        "arXiv 2505.09343, Table 5",
        2.8,
        float(nic) * 1e6,
        1e-9,
        "us",
        kind="calibration",
    )


def _training(scenarios: Path) -> Iterator[Figure]:
    step_s, batch, sequence, devices, price = 19.926, 15_360, 4_096, 2_048, 2.0
    tokens_per_s = batch * sequence / step_s
    yield Figure("V3: tokens per day", TABLE_4, 272.80, tokens_per_s * 86_400 / 1e9, 0.001, "1e9", kind="derived")
    hours = devices * 1e12 / tokens_per_s / 3_600
    yield Figure("V3: GPU hours per trillion tokens", V3_REPORT, 180e3, hours, 0.005, kind="derived")
    yield Figure("V3: days per trillion tokens", V3_REPORT, 3.7, hours / devices / 24, 0.02, kind="derived")
    total = 14.8 * hours + 119e3 + 5e3
    yield Figure("V3: GPU hours in all", V3_REPORT, 2_788e3, total, 0.005, kind="derived")
    yield Figure("V3: cost", V3_REPORT, 5.576, total * price / 1e6, 0.005, "1e6 USD", kind="derived")
    model = Model.model_validate(read(scenarios / "models" / "deepseek_v3.yaml").data)
    rate = tokens_per_s / devices / 1e12
    for name, causal, published in (("causal", True, 385.0), ("non-causal", False, 432.0)):
        ours = model.training_flops_per_token(sequence, causal=causal) * rate
        yield Figure(f"V3: achieved, {name}", TABLE_4, published, ours, 0.01, "TFLOP/s")
    mfu = model.training_flops_per_token(sequence) * rate / 989.5
    yield Figure("V3: MFU, causal", TABLE_4, 0.3894, mfu, 0.01)
