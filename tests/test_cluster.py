"""Clusters: data files, graphs and routes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sim.cluster import Cable, Cluster, Topology, build_network
from sim.hardware import Device, LinkSpec, NicSpec, PeakFlops
from sim.network import Network
from sim.plugin import members
from sim.yamlfile import read

CLUSTERS = Path(__file__).resolve().parents[1] / "scenarios" / "clusters"
NAMES = sorted(path.stem for path in CLUSTERS.glob("*.yaml"))


def load(name: str) -> Cluster:
    return Cluster.model_validate(read(CLUSTERS / f"{name}.yaml").data)


def small(topology: object, nodes: int = 2, per_node: int = 4, **changes: object) -> Cluster:
    """A cluster of round numbers: 100 B/s inside a node, 10 B/s between nodes."""
    fields: dict[str, object] = {
        "name": "small",
        "device": Device(
            name="unit",
            peak_flops_per_s=PeakFlops(bf16=1.0),
            memory_bytes=1,
            memory_bandwidth_bytes_per_s=1,
            n_sm=1,
            power_w=1,
            source="test",
        ),
        "nodes": nodes,
        "devices_per_node": per_node,
        "intra_node": LinkSpec(kind="nvlink", bandwidth_bytes_per_s=100.0, latency_s=1.0),
        "inter_node": NicSpec(kind="infiniband", bandwidth_bytes_per_s=10.0, latency_s=8.0, cross_leaf_latency_s=12.0),
        "topology": topology,
        "source": "test",
    }
    return Cluster.model_validate(fields | changes)


def hops(network: Network, source: int, target: int) -> list[str]:
    return [network.link_names[link] for link in network.paths[source, target] if link >= 0]


class Ring(Topology):
    """A topology without a rule for routes: what a user writes first."""

    kind: Literal["test_ring"] = "test_ring"

    def cables(self, cluster: Cluster) -> Iterator[Cable]:
        for rank in range(cluster.n_devices):
            yield Cable(f"gpu:{rank}", f"gpu:{(rank + 1) % cluster.n_devices}", 1.0, 1.0, "ring")


topologies = st.sampled_from(["rail_optimized", "single_switch", "full_mesh", "test_ring"])


def test_members_join_by_file() -> None:
    assert {"rail_optimized", "single_switch", "full_mesh"} <= set(members(Topology))


@pytest.mark.parametrize("name", NAMES)
def test_every_cluster_file_builds(name: str) -> None:
    cluster = load(name)
    assert cluster.name == name
    network = build_network(cluster, cluster.n_devices)
    assert network.n_ranks == cluster.n_devices
    assert (network.link_bandwidth_bytes_per_s > 1e9).all() and (network.link_latency_s < 1e-4).all()
    text = (CLUSTERS / f"{name}.yaml").read_text()
    for line in text.splitlines():
        if "achievable" in line:
            index = text.index(line)
            assert "#" in line or "#" in text[:index].splitlines()[-1], f"no source for: {line}"


@settings(max_examples=25, deadline=None)
@given(kind=topologies, nodes=st.integers(1, 3), per_node=st.integers(2, 5))
def test_routes_are_shortest_symmetric_walks(kind: str, nodes: int, per_node: int) -> None:
    cluster = small(kind, nodes, per_node)
    network = build_network(cluster, cluster.n_devices)
    graph = cluster.topology.graph(cluster)
    links = {name: i for i, name in enumerate(network.link_names)}
    assert len(links) == len(network.link_names)
    for source in range(network.n_ranks):
        for target in range(network.n_ranks):
            walk = [hop.split("->") for hop in hops(network, source, target)]
            if source == target:
                assert not walk
                continue
            ends = f"gpu:{source}", f"gpu:{target}"
            # No third device relays, unless devices are wired through each other as in the ring.
            relays = [] if kind == "test_ring" else [n for n in graph if n.startswith("gpu:") and n not in ends]
            assert len(walk) == nx.shortest_path_length(nx.restricted_view(graph, relays, []), *ends)
            assert walk[0][0] == f"gpu:{source}" and walk[-1][1] == f"gpu:{target}"
            assert all(a[1] == b[0] for a, b in itertools.pairwise(walk))
            assert [hop[::-1] for hop in walk[::-1]] == [hop.split("->") for hop in hops(network, target, source)]
            for a, b in walk:
                edge, link = graph.edges[a, b], links[f"{a}->{b}"]
                assert edge["bandwidth_bytes_per_s"] == network.link_bandwidth_bytes_per_s[link]
                assert edge["latency_s"] == network.link_latency_s[link]
                assert edge["kind"] == network.link_kind[link]
    assert set(network.paths[network.paths >= 0]) == set(range(len(network.link_names)))


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(["rail_optimized", "full_mesh"]), nodes=st.integers(2, 3), per_node=st.integers(2, 4))
def test_nodes_rails_and_latencies(kind: str, nodes: int, per_node: int) -> None:
    cluster = small(kind, nodes, per_node)
    network = build_network(cluster, cluster.n_devices)
    for source in range(network.n_ranks):
        for target in range(network.n_ranks):
            links = network.paths[source, target][network.paths[source, target] >= 0]
            kinds = {network.link_kind[link] for link in links}
            if source == target:
                assert not kinds
            elif source // per_node == target // per_node:
                assert kinds == {"nvlink"}
                assert network.link_latency_s[links].sum() == 1.0
            elif source % per_node == target % per_node:
                assert kinds == {"pcie", "nic"}
                assert network.link_latency_s[links].sum() == 8.0
            else:
                assert kinds == {"pcie", "nic", "fabric"}
                assert network.link_latency_s[links].sum() == 12.0


def test_spine_carries_what_its_leaves_offer() -> None:
    network = build_network(small({"kind": "rail_optimized", "oversubscription": 2.0}), 8)
    fabric = [
        b for b, kind in zip(network.link_bandwidth_bytes_per_s, network.link_kind, strict=True) if kind == "fabric"
    ]
    assert fabric and set(fabric) == {2 * 10.0 / 2}


def test_mesh_splits_the_device_bandwidth() -> None:
    network = build_network(small("full_mesh", nodes=1, per_node=5), 5)
    assert network.link_names[0] == "gpu:0->gpu:1"
    assert set(network.link_bandwidth_bytes_per_s) == {25.0}


def test_single_switch_is_one_domain() -> None:
    cluster = small("single_switch", inter_node=None)
    assert build_network(cluster, 8).n_nodes == 1
    assert build_network(small("rail_optimized"), 8).n_nodes == 2


def test_part_of_a_cluster_has_the_routes_of_the_whole() -> None:
    cluster = small("rail_optimized", nodes=3)
    whole, part = build_network(cluster, 12), build_network(cluster, 8)
    assert all(hops(whole, s, t) == hops(part, s, t) for s in range(8) for t in range(8))
    assert build_network(cluster, 1).paths.shape == (1, 1, 0)
    assert build_network(cluster, 3).n_nodes == 1


@pytest.mark.parametrize(("ep_size", "says"), [(0, "does not fit"), (9, "does not fit"), (6, "multiple of it")])
def test_groups_that_do_not_fit(ep_size: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build_network(small("rail_optimized"), ep_size)


def test_refusals_name_the_reason() -> None:
    with pytest.raises(ValueError, match="need an inter_node link"):
        build_network(small("rail_optimized", inter_node=None), 8)
    with pytest.raises(ValidationError, match="did you mean rail_optimized"):
        small("rail_optimised")
    with pytest.raises(ValidationError, match="exceeds the nominal 1 B/s"):
        LinkSpec(kind="nvlink", bandwidth_bytes_per_s=1, achievable_bytes_per_s=2, latency_s=0)
    with pytest.raises(ValidationError, match="nearer than the leaf"):
        NicSpec(kind="roce", bandwidth_bytes_per_s=1, latency_s=2, cross_leaf_latency_s=1)
    with pytest.raises(ValueError, match="no fp8 tensor peak; it has bf16"):
        load("a100").device.peak("fp8")
    with pytest.raises(ValidationError, match="price_source"):
        Device.model_validate(load("h800").device.model_dump() | {"price_source": ""})
    assert hash(load("h800").device) == hash(load("h800").device)


def test_links_are_the_same_every_time() -> None:
    first, second = (build_network(load("mi300x"), 16) for _ in range(2))
    assert first.link_names == second.link_names
    np.testing.assert_array_equal(first.paths, second.paths)
