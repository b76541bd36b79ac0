"""Clusters: data files, graphs and routes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sim.cluster import Cable, Cluster, Topology, build_network
from sim.cluster.faults import LinkFault
from sim.cost.flow import Flow
from sim.cost.flows import link_bytes
from sim.cost.port import Kernels, Port
from sim.hardware import Device, LinkSpec, NicSpec, PeakFlops
from sim.network import Network
from sim.plugin import members
from sim.yamlfile import read

CLUSTERS = Path(__file__).resolve().parents[1] / "scenarios" / "clusters"
ZERO = Kernels(dispatch_s=0, combine_s=0, low_latency_s=0, low_latency_nic_s=0, low_latency_share=1)
PORT, FLOW = Port(kernels=ZERO, num_sms=0), Flow(kernels=ZERO, num_sms=0)
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
        "intra_node": LinkSpec(kind="nvlink", bandwidth_bytes_per_s=100.0, achievable_bytes_per_s=100.0, latency_s=1.0),
        "inter_node": NicSpec(
            kind="infiniband",
            bandwidth_bytes_per_s=10.0,
            achievable_bytes_per_s=10.0,
            latency_s=8.0,
            cross_leaf_latency_s=12.0,
        ),
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


def wirings(nodes: int, per_node: int) -> list[dict[str, object]]:
    """Settings of every topology, in several shapes, that suit ``nodes`` x ``per_node`` devices."""
    pair = 2 if per_node % 2 == 0 else 1
    box = {"kind": "pcie_box", "devices_per_switch": pair, "socket_bandwidth_bytes_per_s": 20.0}
    return [
        {"kind": "rail_optimized"},
        {"kind": "rail_optimized", "devices_per_nic": pair, "oversubscription": 2.0},
        {"kind": "single_switch"},
        {"kind": "full_mesh", "devices_per_nic": per_node},
        {"kind": "nested_mesh"},
        {"kind": "two_layer", "nodes_per_leaf": 2},
        {"kind": "two_layer", "nodes_per_leaf": 1, "planes": 1, "oversubscription": 3.0},
        {"kind": "two_layer", "devices_per_nic": pair},
        {"kind": "torus", "shape": (nodes, per_node)},
        {"kind": "torus", "shape": (per_node, nodes, 1)},
        {"kind": "supernode", "nodes_per_supernode": 1},
        {"kind": "supernode", "nodes_per_supernode": nodes, "node_switches": True, "cross_node_latency_s": 0.5},
        {"kind": "supernode", "nodes_per_supernode": 1, "node_switches": True, "devices_per_nic": pair},
        box | {"switches_per_root": per_node // pair},
        box | {"switches_per_root": 1},
        {"kind": "test_ring"},
    ]


WIRINGS = len(wirings(1, 1))
# Wirings where devices pass on what others send, also while all links are well.
RELAYED = {"test_ring", "torus", "nested_mesh", "two_layer"}


def test_members_join_by_file() -> None:
    assert {"rail_optimized", "single_switch", "full_mesh"} <= set(members(Topology))
    assert {str(wiring["kind"]) for wiring in wirings(2, 4)} == set(members(Topology))


@pytest.mark.parametrize("name", NAMES)
def test_every_cluster_file_builds(name: str) -> None:
    cluster = load(name)
    assert cluster.name == name
    domain = cluster.topology.domain(cluster)
    size = max(domain, min(cluster.n_devices, 128) // domain * domain)
    network = build_network(cluster, size)
    assert network.n_ranks == size and network.ranks_per_node == domain
    assert (network.link_bandwidth_bytes_per_s > 1e9).all() and (network.link_latency_s < 1e-4).all()
    text = (CLUSTERS / f"{name}.yaml").read_text()
    for line in text.splitlines():
        if "achievable" in line:
            index = text.index(line)
            assert "#" in line or "#" in text[:index].splitlines()[-1], f"no source for: {line}"


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (1, 4), (2, 3), (3, 4), (4, 2), (2, 5)])
@pytest.mark.parametrize("which", range(WIRINGS))
def test_routes_are_shortest_symmetric_walks(which: int, nodes: int, per_node: int) -> None:
    wiring = wirings(nodes, per_node)[which]
    cluster = small(wiring, nodes, per_node)
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
            relays = [] if wiring["kind"] in RELAYED else [n for n in graph if n.startswith("gpu:") and n not in ends]
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


def test_two_layers_meet_in_leaf_spine_or_node() -> None:
    cluster = small({"kind": "two_layer", "nodes_per_leaf": 2}, nodes=4)
    network = build_network(cluster, 16)
    assert hops(network, 0, 4) == ["gpu:0->nic:0", "nic:0->leaf:0", "leaf:0->nic:4", "nic:4->gpu:4"]
    assert hops(network, 0, 8)[1:4] == ["nic:0->leaf:0", "leaf:0->spine:0", "spine:0->leaf:4"]
    # Planes share no switch: what crosses them goes over the source's node, and comes back the same way.
    assert hops(network, 0, 9)[:3] == ["gpu:0->nvswitch:0", "nvswitch:0->gpu:1", "gpu:1->nic:1"]
    assert hops(network, 9, 0)[-2:] == ["gpu:1->nvswitch:0", "nvswitch:0->gpu:0"]
    assert {name.partition("->")[0] for name in network.link_names if name.startswith("spine")} == {
        f"spine:{plane}" for plane in range(4)
    }
    rates = dict(zip(network.link_names, network.link_bandwidth_bytes_per_s, strict=True))
    assert rates["leaf:0->spine:0"] == 2 * 10.0
    tree = build_network(small({"kind": "two_layer", "nodes_per_leaf": 2, "planes": 1}, nodes=4), 16)
    assert hops(tree, 0, 5)[1:3] == ["nic:0->leaf:0", "leaf:0->nic:5"]
    assert hops(tree, 0, 9)[2:4] == ["leaf:0->spine:0", "spine:0->leaf:1"]


def test_planes_and_rails_take_deepep_equally_long() -> None:
    """ISCA 2025, Table 4: V3 trains at 19.93 s per step on planes and 19.95 s on rails; DeepEP stays on a rail."""
    tokens = {"rank_tokens": np.full((64, 64), 700.0), "node_tokens": np.full((64, 8), 2048.0), "bytes_per_token": 7392}
    times = [
        cost.pair_times_s(build_network(load(name), 64), mode="normal", **tokens)[0].max()
        for cost in (Port(), Flow())
        for name in ("h800", "h800_2048")
    ]
    assert times[0] == times[1] and times[2] == pytest.approx(times[3], rel=1e-12)


def test_torus_goes_the_shorter_way_round() -> None:
    cluster = small({"kind": "torus", "shape": (4, 5)}, nodes=4, per_node=5)
    network = build_network(cluster, 20)
    assert hops(network, 0, 4) == ["gpu:0->gpu:4"]
    assert hops(network, 0, 6) == ["gpu:0->gpu:5", "gpu:5->gpu:6"]
    assert hops(network, 0, 10)[0] == "gpu:0->gpu:5" and hops(network, 5, 15)[0] == "gpu:5->gpu:0"
    assert network.n_nodes == 1 and set(network.link_bandwidth_bytes_per_s) == {25.0}
    narrow = build_network(small({"kind": "torus", "shape": (2, 4)}, nodes=2), 8)
    rates = dict(zip(narrow.link_names, narrow.link_bandwidth_bytes_per_s, strict=True))
    assert rates["gpu:0->gpu:4"] == 50.0 and rates["gpu:0->gpu:1"] == 25.0
    # A group on a part of the torus keeps the whole one's wires.
    assert hops(build_network(cluster, 16), 0, 15) == hops(network, 0, 15) == ["gpu:0->gpu:15"]


def test_supernodes_are_domains() -> None:
    tiers = {"kind": "supernode", "nodes_per_supernode": 2, "node_switches": True, "cross_node_latency_s": 0.5}
    network = build_network(small(tiers | {"node_oversubscription": 4.0}, nodes=4), 16)
    assert (network.ranks_per_node, network.n_nodes) == (8, 2)
    inside = network.paths[0, 7][network.paths[0, 7] >= 0]
    assert hops(network, 0, 7)[1] == "switch:0->superswitch:0" and network.link_latency_s[inside].sum() == 1.5
    assert network.link_bandwidth_bytes_per_s[inside].tolist() == [100.0, 100.0, 100.0, 100.0]
    assert hops(network, 0, 8)[1] == "nic:0->leaf:0" and len(hops(network, 0, 9)) == 6
    rack = build_network(load("gb200_4racks"), 144)
    assert (rack.ranks_per_node, rack.n_nodes) == (72, 2)


def test_pcie_box_shares_uplinks_sockets_and_nics() -> None:
    wiring = {"kind": "pcie_box", "devices_per_switch": 2, "switches_per_root": 1, "socket_bandwidth_bytes_per_s": 20.0}
    network = build_network(small(wiring | {"uplink_bandwidth_bytes_per_s": 50.0}), 8)
    assert len(hops(network, 0, 1)) == 2
    assert hops(network, 0, 3)[1:4] == ["pcie:0->root:0", "root:0->root:1", "root:1->pcie:1"]
    assert hops(network, 0, 4) == [
        "gpu:0->pcie:0",
        "pcie:0->nic:0",
        "nic:0->leaf:0",
        "leaf:0->nic:2",
        "nic:2->pcie:2",
        "pcie:2->gpu:4",
    ]
    assert hops(network, 1, 5)[1:3] == hops(network, 0, 4)[1:3]
    rates = dict(zip(network.link_names, network.link_bandwidth_bytes_per_s, strict=True))
    assert (rates["pcie:0->root:0"], rates["root:0->root:1"], rates["gpu:0->pcie:0"]) == (50.0, 20.0, 100.0)


# NCCL all-to-all of 536.9 MB per rank on 2, 4 and 8 GPUs of a node, ms (aiconfigurator-core 0.12.0): the rates of both
# files were fitted to these, so this checks the wiring's arithmetic and no more.
NCCL = {"l40s": (12.04, 88.6, 238.1), "rtx_pro_6000": (10.45, 16.6, 25.5)}


@pytest.mark.parametrize("name", NCCL)
def test_pcie_boxes_take_the_measured_times(name: str) -> None:
    for size, measured in zip((2, 4, 8), NCCL[name], strict=True):
        network = build_network(load(name), size)
        tokens = np.full((size, size), 2.0**29 / size)
        for cost in (PORT, FLOW):
            seconds, _ = cost.pair_times_s(
                network, rank_tokens=tokens, node_tokens=np.zeros((size, 1)), bytes_per_token=1, mode="low_latency"
            )
            assert seconds.max() * 1e3 == pytest.approx(measured, rel=0.02)


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


def test_a_group_builds_its_own_part_of_a_large_cluster() -> None:
    cluster = load("h800_2048")
    seen: list[int] = []

    class Watched(type(cluster.topology)):  # type: ignore[misc]
        def cables(self, cluster: Cluster) -> Iterator[Cable]:
            seen.append(cluster.n_devices)
            yield from super().cables(cluster)

    watched = Watched.model_validate(cluster.topology.model_dump())
    network = build_network(cluster.model_copy(update={"topology": watched}), 64)
    assert seen == [64] and network.n_ranks == 64
    # The whole is there for those who ask.
    assert sum(1 for _ in cluster.topology.cables(cluster)) == 3 * 2048 + 8 * 8


# Faults ---------------------------------------------------------------------------------------------------------------


def wounded(*faults: tuple[str, float], topology: object = "rail_optimized", **changes: object) -> Cluster:
    fields = [{"link": link, "factor": factor} for link, factor in faults]
    return small(topology, **changes, faults=fields)  # type: ignore[arg-type]


def between_nodes(cluster: Cluster, cost: Port | Flow) -> np.ndarray:
    """Seconds of an exchange where everyone sends 100 bytes to every device of the other node."""
    network = build_network(cluster, 8)
    quiet = replace(network, link_latency_s=np.zeros_like(network.link_latency_s))
    node = np.arange(8) // 4
    tokens = np.where(node[:, None] != node, 100.0, 0.0)
    return cost.pair_times_s(
        quiet, rank_tokens=tokens, node_tokens=np.zeros((8, 2)), bytes_per_token=1.0, mode="low_latency"
    )[0]


@pytest.mark.parametrize("cost", [PORT, FLOW], ids=["port", "flow"])
@pytest.mark.parametrize("link", ["nic:3", "nic:3->leaf:3", "leaf:3->nic:3", "gpu:3->nic:[3]"])
def test_a_nic_at_half_speed_doubles_the_times_of_its_device(cost: Port | Flow, link: str) -> None:
    well, slow = between_nodes(small("rail_optimized"), cost), between_nodes(wounded((link, 0.5)), cost)
    touched = np.zeros((8, 8), dtype=bool)
    touched[3, :] = touched[:, 3] = True
    assert (well[:4, 4:] == 40.0).all()
    np.testing.assert_allclose(slow, np.where(touched, 2, 1) * well, rtol=1e-12)


def test_factors_multiply_and_reach_the_graph() -> None:
    cluster = wounded(("nic:*", 0.5), ("nic:3", 0.5), ("leaf:1", 0.0))
    network, graph = build_network(cluster, 8), cluster.topology.graph(cluster)
    rates = dict(zip(network.link_names, network.link_bandwidth_bytes_per_s, strict=True))
    assert (rates["nic:0->leaf:0"], rates["nic:3->leaf:3"], rates["gpu:3->nic:3"]) == (5.0, 2.5, 2.5)
    assert graph.edges["leaf:3", "nic:3"]["bandwidth_bytes_per_s"] == 2.5
    assert "leaf:1" not in graph and not any("leaf:1" in name for name in network.link_names)


def test_a_failed_nic_sends_its_traffic_through_a_neighbour() -> None:
    network = build_network(wounded(("nic:3", 0)), 8)
    names = hops(network, 3, 7)
    assert names[:2] == ["gpu:3->nvswitch:0", "nvswitch:0->gpu:0"] and names[2] == "gpu:0->nic:0"
    assert not any("nic:3" in name for name in network.link_names)
    assert [name.split("->")[::-1] for name in names[::-1]] == [name.split("->") for name in hops(network, 7, 3)]
    well = build_network(small("rail_optimized"), 8)
    assert all(hops(network, s, t) == hops(well, s, t) for s in range(8) for t in range(8) if 3 not in (s, t))
    # Targets on a rail of their own are reached over the neighbour on that rail, device 7 over the first neighbour.
    assert hops(network, 3, 5)[2:4] == ["gpu:1->nic:1", "nic:1->leaf:1"]
    for cost in (PORT, FLOW):
        np.testing.assert_allclose(between_nodes(wounded(("nic:3", 0)), cost)[3, 4:], [60, 50, 50, 60], rtol=1e-12)


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
@pytest.mark.parametrize(
    "faults", [(), (("gpu:1->*", 0.25), ("spine:*", 0.5)), "first"], ids=["well", "slow", "failed"]
)
@pytest.mark.parametrize("which", range(WIRINGS))
def test_bytes_are_conserved_in_every_wiring(
    which: int, faults: object, mode: Literal["normal", "low_latency"]
) -> None:
    """A switch hands on what it gets; a device keeps what is meant for it. Rates of links do not enter."""
    cluster = small(wirings(2, 4)[which])
    if faults == "first":
        # The failure of one cable at a time; those that cut a device off are another test's.
        cables = list(cluster.topology.cables(cluster))
        spare = [c for c in cables if not cut_off(cluster, c)][::5]
        clusters = [cluster.model_copy(update={"faults": fault(c)}) for c in spare]
    else:
        known = {name for a, b, *_ in cluster.topology.cables(cluster) for name in (a, b)}
        slow = [{"link": link, "factor": f} for link, f in faults if "spine" not in link or "spine:0" in known]  # type: ignore[attr-defined]
        clusters = [small(wirings(2, 4)[which], faults=slow)]
    rng = np.random.default_rng(which)
    ranks = rng.integers(0, 50, (8, 8)) * 1.0
    np.fill_diagonal(ranks, 0)
    for broken in clusters:
        network = build_network(broken, 8)
        nodes = ranks.reshape(8, network.n_nodes, -1).max(axis=2)
        load = link_bytes(network, rank_tokens=ranks, node_tokens=nodes, bytes_per_token=2.0, mode=mode)
        net: dict[str, float] = {}
        for name, moved in zip(network.link_names, load, strict=True):
            start, end = name.split("->")
            net[start], net[end] = net.get(start, 0) - moved, net.get(end, 0) + moved
        assert all(balance == 0 for name, balance in net.items() if not name.startswith("gpu:"))
        if mode == "low_latency" or network.n_nodes == 1:
            expected = 2 * (ranks.sum(axis=0) - ranks.sum(axis=1))
            np.testing.assert_array_equal([net[f"gpu:{rank}"] for rank in range(8)], expected)


def fault(cable: Cable) -> tuple[LinkFault, ...]:
    return (LinkFault(link=f"{cable.a}->{cable.b}", factor=0),)


def cut_off(cluster: Cluster, cable: Cable) -> bool:
    graph = cluster.topology.graph(cluster.model_copy(update={"faults": fault(cable)}))
    return not all(f"gpu:{rank}" in graph and nx.has_path(graph, "gpu:0", f"gpu:{rank}") for rank in range(8))


def test_reroutes_are_shortest_paths_of_what_is_left() -> None:
    for which in range(WIRINGS):
        cluster = small(wirings(2, 4)[which])
        for cable in list(cluster.topology.cables(cluster))[::3]:
            broken = cluster.model_copy(update={"faults": fault(cable)})
            if cut_off(cluster, cable):
                with pytest.raises(ValueError, match=r"no way is left from gpu:\d to gpu:\d; failed: "):
                    build_network(broken, 8)
                continue
            network, graph = build_network(broken, 8), broken.topology.graph(broken)
            well = build_network(cluster, 8)
            for source, target in itertools.permutations(range(8), 2):
                walk = hops(network, source, target)
                assert all(graph.has_edge(*name.split("->")) for name in walk)
                if walk != hops(well, source, target):
                    assert len(walk) == nx.shortest_path_length(graph, f"gpu:{source}", f"gpu:{target}")


def test_bad_faults_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"has no link 'nci:3' \(did you mean nic:3\?\)"):
        wounded(("nci:3", 0.5))
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        wounded(("nic:3", 2))
    with pytest.raises(ValueError, match=r"cluster small: no way is left from gpu:0 to gpu:1; failed: nvswitch:0"):
        build_network(wounded(("nvswitch:0->gpu:3", 1.0), ("nvswitch:0", 0), nodes=1, inter_node=None), 4)


@pytest.mark.parametrize(
    ("wiring", "nodes", "says"),
    [
        ({"kind": "torus", "shape": (3, 4)}, 2, "torus 3 x 4 has 12 devices, cluster small 8"),
        ({"kind": "rail_optimized", "devices_per_nic": 3}, 2, "devices_per_nic 3 does not divide the 4 devices"),
        ({"kind": "two_layer", "planes": 3}, 2, "planes 3 does not divide the 4 NICs"),
        ({"kind": "supernode", "nodes_per_supernode": 2}, 3, "3 nodes do not fill supernodes of 2"),
        ({"kind": "pcie_box", "devices_per_switch": 3, "socket_bandwidth_bytes_per_s": 1}, 2, "do not fill roots of 2"),
        ({"kind": "nested_mesh"}, 2, "need an inter_node link"),
    ],
)
def test_sizes_that_do_not_suit_a_topology(wiring: dict[str, object], nodes: int, says: str) -> None:
    changes = {"inter_node": None} if "inter_node" in says else {}
    cluster = small(wiring, nodes, **changes)
    with pytest.raises(ValueError, match=says):
        list(cluster.topology.cables(cluster))
    # A group of them all says so too, unless its size is wrong already.
    with pytest.raises(ValueError):
        build_network(cluster, cluster.n_devices)
