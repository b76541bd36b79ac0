"""Collectives: measured tables, closed forms on a ring, and laws in size, ranks and nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.cluster import Cluster
from sim.cost import collectives
from sim.cost.collectives import all_gather_s, all_reduce_s, all_to_all_s, point_to_point_s, reduce_scatter_s
from sim.yamlfile import read

CLUSTERS = Path(__file__).resolve().parents[1] / "scenarios" / "clusters"
GROUPS = (all_gather_s, reduce_scatter_s, all_reduce_s, all_to_all_s)
TABLE = dict(zip(("all_gather", "reduce_scatter", "all_reduce", "alltoall"), GROUPS, strict=True))


def cluster(name: str) -> Cluster:
    return Cluster.model_validate(read(CLUSTERS / f"{name}.yaml").data)


H100, A100, NVL72 = cluster("h100"), cluster("a100"), cluster("gb200_nvl72")


@pytest.mark.parametrize("name", ["h100", "a100"])
@pytest.mark.parametrize("op", list(TABLE))
def test_nccl_tables(shared: Path, name: str, op: str) -> None:
    """Half precision, 512 B to 512 MB; four devices are a prediction, and everything above 1 MB is closer."""
    pandas = pytest.importorskip("pandas")
    rows = pandas.read_parquet(shared / "data" / "aiconfigurator" / f"nccl_{name}.parquet")
    rows = rows[(rows.op_name == op) & (rows.nccl_dtype == "half")]
    for n in (2, 4, 8):
        part = rows[rows.num_gpus == n].groupby("message_size").latency.median()
        size = part.index.to_numpy(np.float64) * 2
        errors = np.abs(TABLE[op](cluster(name), n, size, 8) * 1e3 / part.to_numpy() - 1)
        assert np.median(errors) <= 0.25
        assert np.median(errors[size >= 2**20]) <= 0.2
        # Negative control: sizes taken as bytes instead of elements miss.
        wrong = np.abs(TABLE[op](cluster(name), n, size / 2, 8) * 1e3 / part.to_numpy() - 1)
        assert np.median(wrong[size >= 2**20]) > np.median(errors[size >= 2**20])


def test_bulk_is_a_ring_on_the_nominal_link() -> None:
    size = 1e12
    for n in (2, 4, 8):
        ring = (n - 1) / n * size / (0.687 * 300e9)
        assert all_reduce_s(A100, n, size, 8) == pytest.approx(2 * ring, rel=1e-3)
        assert reduce_scatter_s(A100, n, size, 8) == pytest.approx(ring + size / n / (2.59 * 300e9), rel=1e-3)
    # Switches that add up: the message once and its eighth once, instead of 7/4.
    assert all_reduce_s(H100, 8, size, 8) == pytest.approx(9 / 8 * size / (0.57 * 450e9), rel=1e-3)
    assert all_reduce_s(NVL72, 72, size, 72) < all_reduce_s(NVL72, 72, size / 2, 72) * 2.001


def test_across_nodes_the_nics_of_a_node_share_a_ring() -> None:
    size, nic = 1e12, 0.92 * 50e9
    # Eight NICs together outrun H100's NVLink, over which each rank gets what its peers' NICs brought; not A100's.
    assert all_gather_s(H100, 64, size, 8) == pytest.approx(all_gather_s(H100, 8, size, 8), rel=0.01)
    assert all_gather_s(A100, 64, size, 8) == pytest.approx(7 / 8 * size / 8 / (nic / 2), rel=0.01)
    assert all_gather_s(H100, 8, size, 1) == pytest.approx(7 / 8 * size / nic, rel=0.01)
    assert all_to_all_s(H100, 64, size, 8) == pytest.approx(7 / 8 * size / nic, rel=0.01)
    assert all_reduce_s(H100, 64, size, 8) == pytest.approx(2 * 7 / 8 * size / 8 / nic, rel=0.01)
    # Small messages: the start grows with the logarithm of the nodes.
    starts = [float(all_reduce_s(H100, 8 * nodes, 8, 8)) for nodes in (2, 4, 8, 16)]
    np.testing.assert_allclose(np.diff(starts), starts[1] - starts[0])


def test_point_to_point() -> None:
    hidden = 4096 * 7168 * 2.0
    assert point_to_point_s(H100, hidden) == pytest.approx(hidden / 46e9, rel=0.01)
    assert point_to_point_s(H100, hidden, inter_node=False) == pytest.approx(hidden / 306e9, rel=0.06)
    assert point_to_point_s(H100, [0.0, 1.0]).tolist() == [0.0, pytest.approx(5.8e-6, rel=1e-3)]


@settings(max_examples=50, deadline=None)
@given(size=st.floats(1, 1e12), more=st.floats(1, 4), n=st.integers(2, 64), of=st.sampled_from(GROUPS))
def test_laws(size: float, more: float, n: int, of: object) -> None:
    assert callable(of)
    for fabric, per_node in ((H100, 8), (A100, 1), (NVL72, 72)):
        one, two = of(fabric, n, [size, size * more], per_node)
        assert 0 < one <= two <= one * more * (1 + 1e-12)
        assert of(fabric, 1, size, per_node) == 0 and of(fabric, n, 0.0, per_node) == 0
        assert of(fabric, n, np.full((2, 3), size), per_node).shape == (2, 3)
        # Nobody beats his own bytes on the nominal link, an all-reduce with adding switches included.
        fastest = max(fabric.intra_node.bandwidth_bytes_per_s, 1.0) * 8
        assert one >= size * (n - 1) / n / fastest
    assert all_reduce_s(A100, n, size, 1) >= reduce_scatter_s(A100, n, size, 1)


def test_bad_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="no inter_node link"):
        all_reduce_s(NVL72, 144, 1.0, 72)
    with pytest.raises(ValueError, match="no inter_node link"):
        point_to_point_s(NVL72, 1.0)
    with pytest.raises(ValueError, match=r"at least 1 \[got 0 and 8\]"):
        all_gather_s(H100, 0, 1.0, 8)
    with pytest.raises(ValueError, match="negative or not finite"):
        all_gather_s(H100, 8, [1.0, -1.0], 8)
    assert set(TABLE.values()) == set(GROUPS) and collectives.__doc__
