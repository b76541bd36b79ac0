"""Cost models against measured tables, published figures, closed forms and scaling laws."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sim.cluster import Cluster, build_network
from sim.cost import CommunicationCost, ComputeCost, Mode, dense_gemm, grouped_gemm, h100
from sim.cost.alpha_beta import AlphaBeta
from sim.cost.calibrated import Calibrated
from sim.cost.elementwise import expert_pair_bytes, trunk_bytes
from sim.cost.flows import link_bytes
from sim.cost.memory import refusal, serving_memory_bytes, training_memory_bytes
from sim.cost.port import Kernels, Port
from sim.cost.roofline import Roofline
from sim.hardware import Device
from sim.network import Network
from sim.plugin import members
from sim.tokens import F64
from sim.yamlfile import read

CLUSTERS = Path(__file__).resolve().parents[1] / "scenarios" / "clusters"
FP8, BF16 = 7168 + 7168 / 128 * 4, 14336.0
V3 = {"hidden_size": 7168, "moe_intermediate_size": 2048}
TRACE = 112 / 132
ZERO = Kernels(dispatch_s=0, combine_s=0, low_latency_s=0, low_latency_nic_s=0, low_latency_share=1)
BARE = Port(kernels=ZERO, num_sms=0)


def cluster(name: str = "h800", nodes: int = 8) -> Cluster:
    return Cluster.model_validate(read(CLUSTERS / f"{name}.yaml").data | {"nodes": nodes})


def device(name: str) -> Device:
    return cluster(name).device


def evenly(pairs: npt.ArrayLike, experts: npt.ArrayLike) -> F64:
    """Return [..., e]: ``pairs`` spread over ``experts`` local experts, whole tokens as evenly as they go."""
    pairs, experts = np.broadcast_arrays(np.asarray(pairs, np.float64), np.asarray(experts, np.float64))
    place = np.arange(int(experts.max()))
    each = np.floor(pairs / experts)
    spread = each[..., None] + (place < (pairs - each * experts)[..., None])
    return np.where(place < experts[..., None], spread, 0.0)


def ms(seconds: F64) -> float:
    return float(seconds) * 1e3


# Compute ------------------------------------------------------------------------------------------------------------


def test_families() -> None:
    assert {"calibrated", "roofline"} <= set(members(ComputeCost))
    assert {"port", "alpha_beta"} <= set(members(CommunicationCost))


def test_h100_grouped_gemm_against_the_measured_table(shared: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = pandas.read_parquet(shared / "data" / "aiconfigurator" / "moe_h100_sxm_trtllm.parquet")
    rows = rows[(rows.hidden_size == 7168) & (rows.inter_size == 2048) & (rows.num_experts == 256) & (rows.topk == 8)]
    rows = rows[(rows.moe_dtype == "fp8_block") & (rows.distribution == "balanced") & (rows.moe_tp_size == 1)]
    assert len(rows) == 243
    tokens, ep = rows.num_tokens.to_numpy(np.float64), rows.moe_ep_size.to_numpy(np.float64)
    work = {"expert_tokens": evenly(tokens * 8 / ep, 256 / ep), "ep_tokens": tokens}
    seconds = Calibrated().grouped_gemm_s(device("h100"), dtype="fp8", **work, **V3)
    measured = rows.latency_ms.to_numpy() / 1e3
    assert np.abs(seconds / measured - 1).mean() <= 0.06
    bound = Roofline().grouped_gemm_s(device("h100"), dtype="fp8", **work, **V3)
    assert (bound <= measured * 1.05).all()
    # Negative control: constants that are off by a fifth do not pass.
    slow = device("h100").model_copy(update={"kernels": device("h20").kernels})
    assert np.abs(Calibrated().grouped_gemm_s(slow, dtype="fp8", **work, **V3) / measured - 1).mean() > 0.2


def test_v3_training_trace_on_h800() -> None:
    """Per MoE layer, 4,096 tokens a rank, balanced, EP64, 112 of 132 SMs: the classes of published trace times."""
    cost, h800 = Calibrated(), device("h800")
    routed = {"expert_tokens": np.full(4, 8192), "ep_tokens": 32768, "dtype": "fp8", "sm_fraction": TRACE}
    forward = ms(cost.grouped_gemm_s(h800, **routed, **V3))
    dgrad, wgrad = (ms(cost.grouped_gemm_s(h800, **routed, **V3, part=part)) for part in ("dgrad", "wgrad"))
    dense = {"tokens": 4096, "in_features": 7168, "out_features": 233e6 / 7168}
    dense |= {"dtype": "fp8", "sm_fraction": TRACE}
    dense_ms, dense_dgrad, dense_wgrad = (
        ms(cost.gemm_s(h800, **dense, part=part)) for part in ("forward", "dgrad", "wgrad")
    )
    again = ms(cost.gemm_s(h800, **dense | {"out_features": 54.5e6 / 7168}))  # up-projections, recomputed
    core = {"tokens": 4096, "flops_per_token": 128 * 2048.5 * 320 * 2, "dtype": "bf16", "sm_fraction": TRACE}
    back = ms(cost.attention_core_s(h800, **core, direction="backward"))
    # Balanced: each rank computes as many pairs, k times its tokens, as it routes.
    other = sum(
        ms(cost.elementwise_s(h800, bytes=4096 * per_token))
        for way in ("forward", "backward")
        for per_token in (
            trunk_bytes(hidden_size=7168, attention_width=81_920, direction=way),
            8 * expert_pair_bytes(**V3, direction=way),
        )
    )
    assert forward + dgrad == pytest.approx(5.73, rel=0.02)
    assert wgrad + dense_wgrad == pytest.approx(8.19, rel=0.02)
    assert dense_ms + dense_dgrad + again == pytest.approx(4.71, rel=0.02)
    assert ms(cost.attention_core_s(h800, **core)) == pytest.approx(1.24, rel=0.02)
    assert back == pytest.approx(4.25, rel=0.02)
    assert other == pytest.approx(8.53, rel=0.02)


def test_decode_time_follows_active_experts() -> None:
    """Qwen3-30B, 64 tokens, on 8..128 experts: 71, 135, 236, 433, 828 us on RTX PRO 6000; the same shape on H100."""
    active = np.array([8, 16, 32, 64, 128])
    seconds = Calibrated().grouped_gemm_s(
        device("h100"),
        expert_tokens=evenly(512, active),
        ep_tokens=64,
        hidden_size=2048,
        moe_intermediate_size=768,
        dtype="bf16",
    )
    assert seconds.shape == (5,)
    # Reading one more expert costs the same, but for the few rows that computing it hides behind.
    per_expert = np.diff(seconds) / np.diff(active)
    np.testing.assert_allclose(per_expert, per_expert[-1], rtol=0.1)
    assert seconds[-1] / seconds[0] > 5


def test_constants_transfer_by_the_data_sheet_ratio() -> None:
    sheet, other = device("h100"), device("l40s")
    for dtype in ("bf16", "fp8"):
        base, moved = (h100.grouped_gemm(d, dtype) for d in (sheet, other))
        compute = other.peak(dtype) / sheet.peak(dtype)
        assert moved.flops_per_s == pytest.approx(base.flops_per_s * compute)
        assert moved.pair_bytes_per_s == pytest.approx(base.pair_bytes_per_s * compute)
        memory = other.memory_bandwidth_bytes_per_s / sheet.memory_bandwidth_bytes_per_s
        assert moved.bandwidth_bytes_per_s == pytest.approx(base.bandwidth_bytes_per_s * memory)
        assert moved.token_bytes_per_s == pytest.approx(base.token_bytes_per_s * other.n_sm / sheet.n_sm)
        assert moved.overhead_s == base.overhead_s
    assert h100.grouped_gemm(device("b200"), "fp8") != h100.grouped_gemm(device("b200"), "fp8", measured=False)
    assert "grouped GEMM fp8 transferred from H100" in Calibrated().provenance(other)
    assert "grouped GEMM fp8 measured" in Calibrated().provenance(sheet)
    assert "grouped GEMM fp8 measured" in Calibrated().provenance(device("b200"))


@pytest.mark.parametrize("cost", [Calibrated(), Roofline(), Roofline(efficiency=0.5)], ids=str)
@pytest.mark.parametrize("name", ["h100", "b200", "a100", "mi300x"])
def test_compute_laws(cost: ComputeCost, name: str) -> None:
    dev = device(name)
    tokens = evenly(np.array([[0.0, 1.0], [100.0, 1e6]]), 4)
    work = {"expert_tokens": tokens, "ep_tokens": 0, "dtype": "bf16"} | V3
    for part in ("forward", "dgrad", "wgrad"):
        full = cost.grouped_gemm_s(dev, **work, part=part)
        assert full.shape == (2, 2) and full.dtype == np.float64
        assert (np.diff(full.ravel()) > 0).all()
        assert (full >= Roofline().grouped_gemm_s(dev, **work, part=part)).all()
        lent = cost.grouped_gemm_s(dev, **work, part=part, sm_fraction=0.5)
        assert (lent >= full).all() and lent[1, 1] > full[1, 1] * 1.5
    one = {"flops_per_token": 1e12, "dtype": "bf16"}
    core = cost.attention_core_s(dev, tokens=[1, 2], **one)
    assert core[1] == 2 * core[0] > 0
    assert cost.attention_core_s(dev, tokens=1, direction="backward", **one) >= 2.5 * core[0] * (1 - 1e-12)
    for bad in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="sm_fraction"):
            cost.grouped_gemm_s(dev, **work, sm_fraction=bad)


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_impossible_expert_tokens_are_refused(bad: float) -> None:
    for cost in (Calibrated(), Roofline()):
        with pytest.raises(ValueError, match="expert_tokens must not be negative or NaN"):
            cost.grouped_gemm_s(device("h100"), expert_tokens=[3.0, bad], ep_tokens=3, dtype="fp8", **V3)


def test_provenance_tells_measured_from_derived() -> None:
    says = Calibrated().provenance(device("h800"))
    assert "grouped GEMM bf16 derived (as grouped_gemm_fp8, at the bf16 peak)" in says
    assert "grouped GEMM fp8 measured (DeepSeek-V3 training trace" in says


def test_weight_gradients_of_other_gpus_run_at_h800_s_ratio() -> None:
    kernels = device("h800").kernels
    for fit, ratio in ((kernels.grouped_gemm_fp8, grouped_gemm.WGRAD_RATIO), (kernels.gemm_fp8, dense_gemm.WGRAD_RATIO)):
        assert fit is not None and fit.wgrad_flops_per_s is not None
        assert ratio == pytest.approx(fit.wgrad_flops_per_s / fit.flops_per_s, rel=1e-3)


def test_unknown_format_is_refused() -> None:
    for cost in (Calibrated(), Roofline()):
        with pytest.raises(ValueError, match="A100 SXM has no fp8"):
            cost.grouped_gemm_s(device("a100"), expert_tokens=[1], ep_tokens=1, dtype="fp8", **V3)


def test_roofline_ridge_is_exact() -> None:
    h100 = device("h100")
    ridge = h100.peak("bf16") / h100.memory_bandwidth_bytes_per_s
    # A wide square product is bound by its weights, two bytes per two FLOPs of a token, up to ``ridge`` tokens.
    side = 1e9
    work = {"in_features": side, "out_features": side, "dtype": "bf16"}
    below, above = Roofline().gemm_s(h100, tokens=[ridge * 0.5, ridge * 2], **work)
    assert below == pytest.approx(2 * side**2 / h100.memory_bandwidth_bytes_per_s, rel=1e-5)
    assert above == ridge * 4 * side**2 / h100.peak("bf16")


# Communication --------------------------------------------------------------------------------------------------------


def even(n_ranks: int, nodes_touched: int, tokens: float = 4096, k: int = 8, experts: int = 256) -> tuple[F64, F64]:
    """Mean token matrices when each token picks ``nodes_touched`` nodes and k experts on them, uniformly."""
    n_nodes = max(1, n_ranks // 8)
    pool = experts * nodes_touched // n_nodes
    hit = 1 - comb(pool - experts // n_ranks, k) / comb(pool, k)
    share = tokens * nodes_touched / n_nodes
    return np.full((n_ranks, n_ranks), share * hit), np.full((n_ranks, n_nodes), share)


# DeepEP docs/legacy.md, H800, 4096 tokens: EP degree, nodes per token, logical GB/s of dispatch and combine.
NORMAL = [(8, 1, 153, 158), (16, 2, 43, 43), (32, 4, 58, 57), (64, 4, 51, 50)]
# Low latency, 128 tokens: EP degree, dispatch and combine us.
LOW_LATENCY = [(8, 77, 114), (16, 118, 195), (32, 155, 273), (64, 173, 314), (128, 192, 369), (256, 194, 360)]


@pytest.mark.parametrize(("cost", "worst"), [(Port(), 0.15), (AlphaBeta(), 0.06)], ids=["port", "alpha_beta"])
@pytest.mark.parametrize(("n_ranks", "nodes", "dispatch", "combine"), NORMAL)
def test_deepep_normal(
    cost: CommunicationCost, worst: float, n_ranks: int, nodes: int, dispatch: float, combine: float
) -> None:
    rank_tokens, node_tokens = even(n_ranks, nodes)
    logical = (rank_tokens if n_ranks == 8 else node_tokens)[0].sum()
    network = build_network(cluster(), n_ranks)
    for size, published, way in ((FP8, dispatch, "dispatch"), (BF16, combine, "combine")):
        seconds, _ = cost.pair_times_s(
            network,
            rank_tokens=rank_tokens,
            node_tokens=node_tokens,
            bytes_per_token=size,
            mode="normal",
            direction=way,
        )
        assert logical * size / seconds.max() / 1e9 == pytest.approx(published, rel=worst)
        if n_ranks == 64:
            assert seconds.max() == pytest.approx(2.37e-3 if way == "dispatch" else 4.70e-3, rel=0.05)


@pytest.mark.parametrize(("cost", "worst"), [(Port(), 0.2), (AlphaBeta(), 0.01)], ids=["port", "alpha_beta"])
@pytest.mark.parametrize(("n_ranks", "dispatch", "combine"), LOW_LATENCY)
def test_deepep_low_latency(
    cost: CommunicationCost, worst: float, n_ranks: int, dispatch: float, combine: float
) -> None:
    network = build_network(cluster(nodes=32), n_ranks)
    tokens = np.full((n_ranks, n_ranks), 128 * 8 / n_ranks)
    nodes = np.zeros((n_ranks, network.n_nodes))
    for size, published, way in ((FP8 + 16, dispatch, "dispatch"), (BF16, combine, "combine")):
        seconds, _ = cost.pair_times_s(
            network, rank_tokens=tokens, node_tokens=nodes, bytes_per_token=size, mode="low_latency", direction=way
        )
        assert seconds.max() * 1e6 == pytest.approx(published, rel=worst)


def isca(bandwidth: float) -> float:
    """Dispatch plus combine of 32 tokens to 9 remote experts each, one device per node, h = 7000, no latency."""
    size = 16
    network = quiet(build_network(cluster(nodes=size).model_copy(update={"devices_per_node": 1}), size))
    network = replace(network, link_bandwidth_bytes_per_s=np.full(len(network.link_names), bandwidth))
    tokens = sum(32.0 * np.roll(np.eye(size), shift, axis=1) for shift in range(1, 10))
    nodes = np.zeros((size, size))
    return sum(
        float(
            BARE.pair_times_s(
                network, rank_tokens=tokens, node_tokens=nodes, bytes_per_token=width * 7000, mode="low_latency"
            )[0].max()
        )
        for width in (1, 2)
    )


def quiet(network: Network) -> Network:
    return replace(network, link_latency_s=np.zeros(len(network.link_names)))


def test_isca_decode_bound() -> None:
    assert isca(50e9) == pytest.approx(120.96e-6, rel=1e-12)
    assert isca(900e9) == pytest.approx(6.72e-6, rel=1e-12)
    assert isca(51e9) != pytest.approx(120.96e-6, rel=0.01)


counts = st.integers(0, 50).map(float)
modes = st.sampled_from(["normal", "low_latency"])
NETWORK = build_network(cluster(nodes=3).model_copy(update={"devices_per_node": 4}), 12)


@st.composite
def routings(draw: st.DrawFn) -> tuple[F64, F64]:
    """Token matrices that belong to each other: a node gets at most its ranks' tokens and at least the largest."""
    ranks = draw(arrays(np.float64, (12, 12), elements=counts))
    low, high = ranks.reshape(12, 3, 4).max(axis=2), ranks.reshape(12, 3, 4).sum(axis=2)
    return ranks, low + np.floor((high - low) * draw(st.floats(0, 1)))


def times(cost: CommunicationCost, network: Network, tokens: tuple[F64, F64], mode: Mode, size: float = FP8) -> F64:
    return cost.pair_times_s(network, rank_tokens=tokens[0], node_tokens=tokens[1], bytes_per_token=size, mode=mode)[0]


@settings(max_examples=60, deadline=None)
@given(tokens=routings(), mode=modes)
def test_bytes_are_conserved(tokens: tuple[F64, F64], mode: Mode) -> None:
    ranks, nodes = tokens
    load = link_bytes(NETWORK, rank_tokens=ranks, node_tokens=nodes, bytes_per_token=1.0, mode=mode)
    by_name = dict(zip(NETWORK.link_names, load, strict=True))
    node = np.arange(12) // 4
    remote = node[:, None] != node[None, :]
    for rank in range(12):
        away, out_of_node = node[rank] != np.arange(3), remote[rank]
        sent = nodes[rank, away].sum() if mode == "normal" else ranks[rank, out_of_node].sum()
        assert by_name[f"gpu:{rank}->nic:{rank}"] == sent
        peers = [r for r in range(12) if r % 4 == rank % 4 and node[r] != node[rank]]
        got = nodes[peers, node[rank]].sum() if mode == "normal" else ranks[out_of_node, rank].sum()
        assert by_name[f"nic:{rank}->gpu:{rank}"] == got
        # What a device receives over NVLink: all that is meant for it but did not come by its own NIC.
        via_peer = ranks[np.arange(12) % 4 != rank % 4, rank].sum()
        own_node = ranks[(node == node[rank]) & (np.arange(12) != rank), rank].sum()
        assert by_name[f"nvswitch:{node[rank]}->gpu:{rank}"] == (via_peer if mode == "normal" else own_node)
    if mode == "normal":
        assert not any("spine" in name and amount for name, amount in by_name.items())


@settings(max_examples=60, deadline=None)
@given(tokens=routings(), mode=modes)
def test_port_laws(tokens: tuple[F64, F64], mode: Mode) -> None:
    cost = Port()
    base = times(cost, NETWORK, tokens, mode)
    now = Kernels()
    twice = {name: getattr(now, name) / 2 for name in Kernels.model_fields if name.endswith("_s")}
    half = Port(kernels=now.model_copy(update=twice | {"bytes_per_s_and_sm": 2 * now.bytes_per_s_and_sm}))
    bandwidth, latency = NETWORK.link_bandwidth_bytes_per_s, NETWORK.link_latency_s
    fast = replace(NETWORK, link_bandwidth_bytes_per_s=2 * bandwidth, link_latency_s=latency / 2)
    np.testing.assert_array_equal(times(half, fast, tokens, mode), base / 2)
    endless = replace(quiet(NETWORK), link_bandwidth_bytes_per_s=np.full_like(bandwidth, np.inf))
    assert not times(BARE, endless, tokens, mode).any()
    idle = replace(
        NETWORK,
        link_names=(*NETWORK.link_names, "idle"),
        link_kind=(*NETWORK.link_kind, "nic"),
        link_bandwidth_bytes_per_s=np.append(bandwidth, 1.0),
        link_latency_s=np.append(latency, 9.0),
    )
    np.testing.assert_array_equal(times(cost, idle, tokens, mode), base)
    # More bytes never arrive sooner; no pair beats its own bytes on an empty network.
    assert (times(cost, NETWORK, tokens, mode, 2 * FP8) >= base).all()
    alone = tokens[0] * FP8 / bandwidth.max()
    assert (base[~np.eye(12, dtype=bool)] >= alone[~np.eye(12, dtype=bool)]).all()


@settings(max_examples=40, deadline=None)
@given(tokens=routings(), mode=modes, order=st.permutations(range(4)), nodes=st.permutations(range(3)))
def test_relabelling_ranks_permutes_times(
    tokens: tuple[F64, F64], mode: Mode, order: list[int], nodes: list[int]
) -> None:
    moved = np.add.outer(4 * np.array(nodes), np.array(order)).ravel()
    swapped = (tokens[0][np.ix_(moved, moved)], tokens[1][np.ix_(moved, nodes)])
    for cost in (Port(), AlphaBeta()):
        expected = times(cost, NETWORK, tokens, mode)[np.ix_(moved, moved)]
        np.testing.assert_allclose(times(cost, NETWORK, swapped, mode), expected, rtol=1e-14)


@settings(max_examples=40, deadline=None)
@given(tokens=routings(), mode=modes)
def test_contract(tokens: tuple[F64, F64], mode: Mode) -> None:
    for cost in (Port(), AlphaBeta()):
        before = tokens[0].copy()
        seconds, reaches = cost.pair_times_s(
            NETWORK, rank_tokens=tokens[0], node_tokens=tokens[1], bytes_per_token=FP8, mode=mode
        )
        assert seconds.shape == reaches.shape == (12, 12)
        assert seconds.dtype == np.float64 and reaches.dtype == np.bool_
        off_diagonal = ~np.eye(12, dtype=bool)
        np.testing.assert_array_equal(reaches, (tokens[0] > 0) & off_diagonal)
        assert (seconds[reaches] > 0).all() and not seconds[~reaches].any()
        np.testing.assert_array_equal(before, tokens[0])


def test_normal_mode_by_hand() -> None:
    """One token batch 0 -> node 1, for rank 6: over the rail to rank 4, then NVLink; the slower hop sets the time."""
    network = build_network(cluster(nodes=2).model_copy(update={"devices_per_node": 4}), 8)
    ranks, nodes = np.zeros((8, 8)), np.zeros((8, 2))
    ranks[0, 6] = nodes[0, 1] = 1000
    seconds, reaches = Port().pair_times_s(
        network, rank_tokens=ranks, node_tokens=nodes, bytes_per_token=FP8, mode="normal"
    )
    assert np.argwhere(reaches).tolist() == [[0, 6]]
    assert seconds[0, 6] == pytest.approx(1000 * FP8 / 46e9 + 2.8e-6 + 3.33e-6 + 25e-6, rel=1e-12)
    ranks[0, 4] = 1000
    seconds, _ = Port().pair_times_s(network, rank_tokens=ranks, node_tokens=nodes, bytes_per_token=FP8, mode="normal")
    assert seconds[0, 4] == pytest.approx(1000 * FP8 / 46e9 + 2.8e-6 + 25e-6, rel=1e-12)


def test_spine_slows_traffic_between_rails() -> None:
    tokens = np.zeros((16, 16))
    tokens[np.arange(8), 8 + (np.arange(8) + 1) % 8] = 1000.0
    results = []
    for topology in ("rail_optimized", {"kind": "rail_optimized", "oversubscription": 4.0}):
        fields = read(CLUSTERS / "h800.yaml").data | {"nodes": 2, "topology": topology}
        network = build_network(Cluster.model_validate(fields), 16)
        results.append(times(BARE, quiet(network), (tokens, np.zeros((16, 2))), "low_latency").max())
    assert results[0] == pytest.approx(1000 * FP8 / 46e9)
    assert results[1] == pytest.approx(2 * results[0])


def test_bad_matrices_are_refused() -> None:
    good, nodes = np.ones((12, 12)), np.ones((12, 3))
    for cost in (Port(), AlphaBeta()):
        for ranks, at_nodes, says in (
            (np.ones((11, 12)), nodes, r"rank_tokens has shape \(11, 12\)"),
            (good, np.ones((12, 2)), r"node_tokens has shape \(12, 2\)"),
            (-good, nodes, "rank_tokens has a negative"),
            (good, nodes * np.nan, "node_tokens has a negative or not finite"),
        ):
            with pytest.raises(ValueError, match=says):
                times(cost, NETWORK, (ranks, at_nodes), "normal")
    assert (Port().sms("normal"), Port().sms("low_latency"), Port(num_sms=24).sms("normal")) == (20, 0, 24)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_memory_sums_and_refuses() -> None:
    training = training_memory_bytes(
        dense_parameters=1e9,
        expert_parameters=2e9,
        dense_optimizer_shards=10,
        expert_optimizer_shards=2,
        tokens_in_flight=4096,
        layers=4,
        hidden_size=7168,
        expert_pairs_per_token=9,
        moe_intermediate_size=2048,
    )
    assert training["weights"] == 6e9 and training["gradients"] == 12e9
    assert training["optimizer"] == 8 * (0.1e9 + 1e9)
    assert training["activations"] == 4096 * 4 * 15 * 7168
    assert training["expert_activations"] == 4096 * 4 * 9 * 2 * (7168 + 3 * 2048)
    serving = serving_memory_bytes(
        dense_parameters=17e9, expert_parameters=58 * 9 * 44.04e6, kv_tokens=1000, kv_bytes_per_token=70_272
    )
    assert serving["kv_cache"] == 70_272_000
    for items in (training, serving):
        assert items["total"] == sum(value for name, value in items.items() if name != "total")
        assert refusal(items, items["total"]) is None
        text = refusal(items, items["total"] / 2)
        assert text is not None and all(name in text for name, value in items.items() if value and name != "total")
    with pytest.raises(ValueError, match="kv_tokens must not be negative"):
        serving_memory_bytes(dense_parameters=1, expert_parameters=1, kv_tokens=-1)
    with pytest.raises(ValueError, match="shards start at 1"):
        training_memory_bytes(dense_parameters=1, expert_parameters=1, dense_optimizer_shards=0)
