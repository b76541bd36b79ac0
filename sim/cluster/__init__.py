"""Devices and links as a networkx graph, and the routes of one expert-parallel group over them.

A topology is one file of this package: it lists cables and, if it knows a rule, the route between two devices. Graph
and `Network` both come from that list, so they cannot disagree. Nodes are named ``gpu:R``, ``nvswitch:N``, ``nic:R``,
``leaf:I``, ``spine:J``; R is the global rank, node after node.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from sim.hardware import Device, LinkSpec, NicSpec
from sim.network import Network
from sim.plugin import Choice, Plugin

if TYPE_CHECKING:
    import networkx as nx


class Cable(NamedTuple):
    """A full-duplex cable: two links with the same rate, one each way."""

    a: str
    b: str
    bandwidth_bytes_per_s: float
    latency_s: float
    kind: str


class Topology(Plugin):
    """How devices are wired."""

    @abstractmethod
    def cables(self, cluster: Cluster) -> Iterator[Cable]:
        """Yield every cable of ``cluster``, achievable one-direction rates, in an order that never changes."""

    def domain(self, cluster: Cluster) -> int:
        """Return how many consecutive ranks share NVLink or xGMI: a "node" in DeepEP's sense."""
        return cluster.devices_per_node

    def route(self, cluster: Cluster, source: int, target: int) -> list[str] | None:
        """Return the node names from device ``source`` to ``target``; None asks for a shortest path of the graph.

        A rule gives the shortest path that no third device relays. `build_network` asks for source < target only and
        reverses it for the mirrored pair.
        """
        return None

    def graph(self, cluster: Cluster) -> nx.DiGraph[str]:
        """Return the directed graph; edges carry ``bandwidth_bytes_per_s``, ``latency_s`` and ``kind``."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph()
        for a, b, bandwidth, latency, kind in self.cables(cluster):
            for edge in ((a, b), (b, a)):
                graph.add_edge(*edge, bandwidth_bytes_per_s=bandwidth, latency_s=latency, kind=kind)
        return graph


class Cluster(BaseModel):
    """Identical devices in identical nodes; the file in ``scenarios/clusters`` carries the device inline.

    intra_node, inter_node: per device and direction; one NIC per device. ``inter_node`` may be absent where one switch
    joins everything.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    device: Device
    nodes: Annotated[int, Field(gt=0)]
    devices_per_node: Annotated[int, Field(gt=0)]
    intra_node: LinkSpec
    inter_node: NicSpec | None = None
    topology: Annotated[Topology, Choice(Topology)]
    source: str

    @property
    def n_devices(self) -> int:
        return self.nodes * self.devices_per_node


def rail_cables(cluster: Cluster, oversubscription: float) -> Iterator[Cable]:
    """Yield the NIC side of a rail-optimised cluster: device, NIC, the leaf of its rail, one spine.

    The spine stands for all spine switches; each leaf's uplink is the sum of its NICs over ``oversubscription``, as
    ideal multipath routing would give. Latencies add up to the NIC's stated device-to-device figures. Raises
    ValueError for several nodes without ``inter_node``.
    """
    nic = cluster.inter_node
    if nic is None:
        if cluster.nodes > 1:
            raise ValueError(f"cluster {cluster.name}: {cluster.nodes} nodes need an inter_node link")
        return
    rails = cluster.devices_per_node
    for rank in range(cluster.n_devices):
        yield Cable(f"gpu:{rank}", f"nic:{rank}", nic.rate_bytes_per_s, nic.latency_s / 8, "pcie")
        yield Cable(f"nic:{rank}", f"leaf:{rank % rails}", nic.rate_bytes_per_s, nic.latency_s * 3 / 8, "nic")
    uplink = cluster.nodes * nic.rate_bytes_per_s / oversubscription
    for rail in range(rails):
        yield Cable(f"leaf:{rail}", "spine:0", uplink, (nic.cross_leaf_latency_s - nic.latency_s) / 2, "fabric")


def rail_route(cluster: Cluster, source: int, target: int) -> list[str]:
    """Return the route over NICs between devices of two nodes; on one rail it stays below the leaf."""
    rails = cluster.devices_per_node
    up, down = source % rails, target % rails
    middle = [f"leaf:{up}"] if up == down else [f"leaf:{up}", "spine:0", f"leaf:{down}"]
    return [f"gpu:{source}", f"nic:{source}", *middle, f"nic:{target}", f"gpu:{target}"]


def build_network(cluster: Cluster, ep_size: int) -> Network:
    """Return the links and routes of an EP group on the first ``ep_size`` devices of ``cluster``.

    Links that no route uses are left out. Raises ValueError when the group does not fit, or fills its last NVLink
    domain only in part (the peer ranks of DeepEP's two-hop dispatch would not exist).
    """
    topology = cluster.topology
    domain = topology.domain(cluster)
    if not 1 <= ep_size <= cluster.n_devices:
        raise ValueError(
            f"ep_size {ep_size} does not fit cluster {cluster.name}: {cluster.nodes} nodes x "
            f"{cluster.devices_per_node} devices = {cluster.n_devices}"
        )
    if ep_size > domain and ep_size % domain:
        raise ValueError(f"ep_size {ep_size} must be at most {domain} or a multiple of it (devices per NVLink domain)")

    cables: dict[tuple[str, str], Cable] = {}
    for cable in topology.cables(cluster):
        cables[cable.a, cable.b] = cables[cable.b, cable.a] = cable
    graph: Any = None
    used: dict[tuple[str, str], int] = {}
    routes: list[list[int]] = []
    for source in range(ep_size):
        for target in range(ep_size):
            if source == target:
                routes.append([])
                continue
            # A pair's route is the reverse of its mirror's, also where the graph has several shortest paths.
            nodes = topology.route(cluster, min(source, target), max(source, target))
            if nodes is None:
                import networkx as nx

                graph = topology.graph(cluster) if graph is None else graph
                nodes = nx.shortest_path(graph, f"gpu:{min(source, target)}", f"gpu:{max(source, target)}")
            if source > target:
                nodes = nodes[::-1]
            routes.append([used.setdefault(hop, len(used)) for hop in itertools.pairwise(nodes)])
    paths = np.full((ep_size * ep_size, max(map(len, routes), default=0)), -1, dtype=np.int32)
    for row, route in zip(paths, routes, strict=True):
        row[: len(route)] = route
    links = [cables[hop] for hop in used]
    return Network(
        n_ranks=ep_size,
        ranks_per_node=domain,
        link_names=tuple(f"{a}->{b}" for a, b in used),
        link_kind=tuple(link.kind for link in links),
        link_bandwidth_bytes_per_s=np.array([link.bandwidth_bytes_per_s for link in links], dtype=np.float64),
        link_latency_s=np.array([link.latency_s for link in links], dtype=np.float64),
        paths=paths.reshape(ep_size, ep_size, -1),
    )
