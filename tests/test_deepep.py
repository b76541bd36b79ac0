"""DeepEP's published tables, the withheld measurements, and what a release, an SM or a slowdown changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sim.cost import CommunicationCost, Mode
from sim.cost.alpha_beta import AlphaBeta
from sim.cost.comm_table import CommunicationTable
from sim.cost.flow import Flow
from sim.cost.port import Kernels, Port
from sim.network import Network
from sim.plugin import members
from sim.tokens import F64
from sim.validation import Inputs
from sim.validation.closed_forms import figures as closed_forms
from sim.validation.communication import BYTES, copies, network, seconds
from sim.validation.communication import figures as communication

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"
BOTH: tuple[Mode, ...] = ("normal", "low_latency")


def net(n_ranks: int, name: str = "h800") -> Network:
    return network(SCENARIOS, name, n_ranks)


def exchange(n_ranks: int, *batch: int) -> dict[str, F64]:
    rng = np.random.default_rng(0)
    ranks = rng.poisson(300, (*batch, n_ranks, n_ranks)).astype(np.float64)
    return {"rank_tokens": ranks, "node_tokens": 0.6 * ranks.reshape(*batch, n_ranks, -1, 8).sum(axis=-1)}


def makespan(cost: CommunicationCost, nw: Network, mode: Mode = "normal", **more: object) -> float:
    times, _ = cost.pair_times_s(nw, **exchange(nw.n_ranks), bytes_per_token=7392.0, mode=mode, **more)  # type: ignore[arg-type]
    return float(times.max())


def test_published_rows_within_ten_percent_in_the_median_and_twenty_at_worst() -> None:
    rows = list(communication(Inputs(SCENARIOS)))
    published = [row for row in rows if not row.absolute]
    assert len(published) >= 54
    assert np.median([abs(row.error) for row in published]) <= 0.1
    assert max(abs(row.error) for row in published) <= 0.2
    assert {row.kind for row in published} == {"calibration", "prediction"}


def test_closed_forms_hold() -> None:
    rows = {row.name: row for row in closed_forms(Inputs(SCENARIOS))}
    assert [name for name, row in rows.items() if not row.passed] == []
    assert rows["decode: dispatch + combine at 50 GB/s"].ours == pytest.approx(120.96, rel=1e-12)
    assert rows["decode: dispatch + combine at 900 GB/s"].ours == pytest.approx(6.72, rel=1e-12)


def test_other_node_counts_are_predicted(shared: Path) -> None:
    """The excerpt has the nodes that the constants were set on; small messages are the hard part."""
    pandas = pytest.importorskip("pandas")
    rows = pandas.read_parquet(shared / "data" / "aiconfigurator" / "deepep_ll_h100_nodes1-2.parquet")
    for nodes in (1, 2):
        nw, part = net(8 * nodes, "h100"), rows[rows.node_num == nodes]
        for way, size in BYTES.items():
            ours = np.array([seconds(Port(), nw, t, way, "low_latency", size) for t in part.num_token]) * 1e6
            errors = np.abs(ours / part[f"{way}_avg_t_us"].to_numpy() - 1)
            assert np.median(errors) <= 0.2
            assert errors[part.num_token.to_numpy() >= 64].max() <= 0.2


def test_first_release_keeps_nothing_off_the_nic() -> None:
    first, now = Port(release="v1_first"), Port()
    # Low latency within a node: NVLink now, the NIC then (docs/legacy.md: 77 and 163 us).
    assert seconds(first, net(8), 128, "dispatch", "low_latency", 7408) > 2 * seconds(
        now, net(8), 128, "dispatch", "low_latency", 7408
    )
    # Normal across nodes: the own node's copy goes through the NIC as well; 4 nodes' instead of 3.
    longer = seconds(first, net(32), 1e6, "dispatch", "normal", 7392) / seconds(now, net(32), 1e6, "dispatch", "normal", 7392)
    assert longer == pytest.approx(4 / 3, rel=0.01)
    # Within one node the normal kernels never used it, and a cluster without NICs has none to use.
    assert makespan(first, net(8)) == makespan(now, net(8))
    assert makespan(first, net(8, "gb200_nvl72"), "low_latency") == makespan(now, net(8, "gb200_nvl72"), "low_latency")


def test_sms_bound_normal_kernels_until_links_do() -> None:
    """H100, one node, 64K tokens (aiconfigurator-core 0.5.12): 36.2, 18.6, 9.6, 7.9, 7.5 ms with 4, 8, 16, 20, 24."""
    nw = net(8, "h100")
    times = [seconds(Port(num_sms=n), nw, 65_536, "dispatch", "normal", 7392) * 1e3 for n in (4, 8, 16, 20, 24, 64)]
    np.testing.assert_allclose(times[:5], [36.2, 18.6, 9.6, 7.9, 7.5], rtol=0.1)
    assert times[0] / times[1] == pytest.approx(2, rel=0.01) and times[4] == times[5]
    rank, _ = copies(8, 8, 4)
    assert times[5] == pytest.approx(65_536 * 7 * rank * 7392 / (0.68 * 450e9) * 1e3, rel=0.01)
    assert seconds(Port(num_sms=0), nw, 65_536, "dispatch", "normal", 7392) * 1e3 == times[5]


@pytest.mark.parametrize("cost", [Port(), Port(release="v1_first"), Port(release="v2"), AlphaBeta(), Flow()], ids=str)
@pytest.mark.parametrize("mode", BOTH)
def test_leading_axes_and_slowdown(cost: CommunicationCost, mode: Mode) -> None:
    nw, tokens = net(16), exchange(16, 2, 3)
    how = {"bytes_per_token": 7392.0, "mode": mode}
    many, reaches = cost.pair_times_s(nw, **tokens, **how)  # type: ignore[arg-type]
    assert many.shape == reaches.shape == (2, 3, 16, 16)
    one, _ = cost.pair_times_s(nw, rank_tokens=tokens["rank_tokens"][1, 2], node_tokens=tokens["node_tokens"][1, 2], **how)  # type: ignore[arg-type]
    np.testing.assert_array_equal(many[1, 2], one)
    with pytest.raises(ValueError, match="different batch axes"):
        cost.pair_times_s(nw, rank_tokens=tokens["rank_tokens"], node_tokens=tokens["node_tokens"][0], **how)  # type: ignore[arg-type]
    # A slowdown stretches the transfer and nothing else: it is linear, and no transfer has nothing to stretch.
    steps = [makespan(cost, nw, mode, slowdown=factor) for factor in (1.0, 1.5, 2.0)]
    assert steps[2] - steps[1] == pytest.approx(steps[1] - steps[0], rel=1e-9) and steps[1] > steps[0]
    assert steps[1] < 1.5 * steps[0]


def test_overlap_slowdown_is_that_of_the_training_trace() -> None:
    """profile-data train.json, EP64: medians 3.88 ms (dispatch) and 6.06 ms (combine), the first release beside GEMMs."""
    cost, nw = Port(release="v1_first"), net(64)
    ranks, nodes = np.full((64, 64), 4096 * 8 / 64), np.full((64, 8), 4096 * 4 / 8)
    for way, published in (("dispatch", 3.88e-3), ("combine", 6.06e-3)):
        times, _ = cost.pair_times_s(
            nw,
            rank_tokens=ranks,
            node_tokens=nodes,
            bytes_per_token=BYTES[way],  # type: ignore[index]
            mode="normal",
            direction=way,  # type: ignore[arg-type]
            slowdown=cost.overlap_slowdown(way),  # type: ignore[arg-type]
        )
        assert times.max() == pytest.approx(published, rel=0.03)
        assert cost.overlap_slowdown(way, "low_latency") == 1.0  # type: ignore[arg-type]


def test_a_slow_link_slows_the_pairs_that_use_it() -> None:
    nw = net(16)
    name = nw.link_names.index("gpu:3->nic:3")
    rates = nw.link_bandwidth_bytes_per_s.copy()
    rates[name] /= 10
    slow = replace(nw, link_bandwidth_bytes_per_s=rates)
    before, after = (
        Port().pair_times_s(each, **exchange(16), bytes_per_token=7392.0, mode="low_latency")[0] for each in (nw, slow)
    )
    changed = after > before * (1 + 1e-9)
    assert changed[3, 8:].all() and changed.sum() == 8


# Tables ---------------------------------------------------------------------------------------------------------------


def write_tables(root: Path, shift: float = 1.0) -> None:
    pandas = pytest.importorskip("pandas")
    at = root / "h100_sxm" / "comm" / "sglang" / "0.1"
    at.mkdir(parents=True)
    tokens = [8, 64, 512]
    shape = {"node_num": 1, "hidden_size": 7168, "num_topk": 8, "num_experts": 256, "num_token": tokens}
    low = shape | {f"{way}_avg_t_us": [20.0 * shift, 40.0, 160.0] for way in BYTES}
    pandas.DataFrame(low).to_parquet(at / "wideep_deepep_ll_perf.parquet")
    normal = shape | {f"{way}_transmit_us": [30.0, 50.0, 150.0] for way in BYTES} | {f"{way}_sms": 20 for way in BYTES}
    pandas.DataFrame(normal).to_parquet(at / "wideep_deepep_normal_perf.parquet")


def test_table_is_exact_where_measured_and_refuses_what_it_lacks(tmp_path: Path) -> None:
    write_tables(tmp_path)
    assert members(CommunicationCost)["table"] is CommunicationTable
    cost, nw = CommunicationTable(path=str(tmp_path)), net(8, "h100")
    hit = cost._hit(8)
    for tokens, low, normal in ((8, 20e-6, 30e-6), (64, 40e-6, 50e-6), (512, 160e-6, 150e-6)):
        for mode, each, wanted in (("low_latency", 1.0, low), ("normal", hit, normal)):
            ranks, nodes = np.full((2, 8, 8), tokens * each), np.full((2, 8, 1), float(tokens))
            times, _ = cost.pair_times_s(nw, rank_tokens=ranks, node_tokens=nodes, bytes_per_token=7392.0, mode=mode)  # type: ignore[arg-type]
            assert times.shape == (2, 8, 8) and times.max() == pytest.approx(wanted, rel=1e-9)
    between = seconds(cost, nw, 200, "dispatch", "low_latency", 7392)
    assert 40e-6 < between < 160e-6
    for fields, n_ranks, says in (
        ({"gpu": "h900"}, 8, "no tables of h900"),
        ({"num_sms": 7}, 8, "with 7 SMs"),
        ({}, 16, "rows of 2 nodes"),
        ({"path": str(tmp_path / "absent")}, 8, "not a folder"),
    ):
        wrong = CommunicationTable.model_validate({"path": str(tmp_path)} | fields)
        with pytest.raises(ValueError, match=says):
            seconds(wrong, net(n_ranks, "h100"), 64, "dispatch", "normal", 7392)


def test_kernels_of_a_release() -> None:
    assert Port().constants == Kernels()
    assert Port(release="v2").constants.bytes_per_s_and_sm > Kernels().bytes_per_s_and_sm
    given = Kernels(dispatch_s=1.0)
    assert Port(release="v2", kernels=given).constants is given


def test_many_senders_to_one_receiver_wait_for_its_port_alone() -> None:
    """Seven ranks send 1,000 tokens each to rank 0, nobody else anything: by hand, and not symmetric."""
    nw, kernels = net(8), Kernels()
    ranks = np.zeros((8, 8))
    ranks[1:, 0] = 1000
    work = {"rank_tokens": ranks, "node_tokens": ranks.sum(axis=1)[:, None], "bytes_per_token": 7392.0}
    few = Port(num_sms=2)  # slower than the links
    times, reaches = few.pair_times_s(nw, **work, mode="normal")  # type: ignore[arg-type]
    assert reaches.sum() == 7 and reaches[1:, 0].all()
    copied = 7000 * 7392 / (2 * kernels.bytes_per_s_and_sm)
    np.testing.assert_allclose(times[1:, 0], copied + 3.33e-6 + kernels.dispatch_s, rtol=1e-9)
    # The same backwards, one sender: it hands on seven thousand, each receiver gets one.
    out, _ = few.pair_times_s(nw, **work | {"rank_tokens": ranks.T, "node_tokens": ranks.T.sum(axis=1)[:, None]}, mode="normal")  # type: ignore[arg-type]
    np.testing.assert_allclose(out[0, 1:], copied + 3.33e-6 + kernels.dispatch_s, rtol=1e-9)
    # First release, low latency: all of it through the receiver's NIC, whoever sends.
    first, _ = Port(release="v1_first").pair_times_s(nw, **work, mode="low_latency")  # type: ignore[arg-type]
    assert nw.nic_bytes_per_s is not None
    assert first[1:, 0].min() > 7000 * 7392 / nw.nic_bytes_per_s
    two = ranks.copy()
    two[1, 2] = 5000  # rank 1 now sends six thousand, still less than what rank 0 gets
    again, _ = Port(release="v1_first").pair_times_s(nw, **work | {"rank_tokens": two}, mode="low_latency")  # type: ignore[arg-type]
    np.testing.assert_allclose(again[1:, 0], first[1:, 0], rtol=1e-12)
    assert again[1, 2] < again[1, 0]
