"""Devices and links as a networkx graph, and the routes of one expert-parallel group over them.

A topology is one file of this package: it lists cables and, if it knows a rule, the route between two devices. Graph
and `Network` both come from that list, so they cannot disagree. Nodes are named ``gpu:R``, ``nvswitch:N``, ``nic:I``,
``leaf:I``, ``spine:J``; R is the global rank, node after node. Failed and slow links are a list in the cluster.
"""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sim.cluster.faults import LinkFault, remaining
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
        """Yield every cable of ``cluster``, achievable one-direction rates, in an order that never changes.

        Raises ValueError where the cluster's sizes do not suit the topology.
        """

    def domain(self, cluster: Cluster) -> int:
        """Return how many consecutive ranks share NVLink or xGMI: a "node" in DeepEP's sense."""
        return cluster.devices_per_node

    def part(self, cluster: Cluster, n_devices: int) -> Cluster:
        """Return the cluster that traffic among the first ``n_devices`` can see: their nodes only, unless overridden.

        Shared uplinks shrink with it: the rest of the cluster is taken to be as busy as this group.
        """
        return cluster.model_copy(update={"nodes": -(-n_devices // cluster.devices_per_node)})

    def route(self, cluster: Cluster, source: int, target: int) -> list[str] | None:
        """Return the node names from device ``source`` to ``target``; None asks for a shortest path of the graph.

        A rule gives the way that healthy traffic takes. `build_network` asks for source < target only and reverses it
        for the mirrored pair; a route over a failed cable gives way to a shortest path of what is left.
        """
        return None

    def wired(self, cluster: Cluster) -> Iterator[Cable]:
        """Yield the cables of ``cluster`` as its faults leave them: failed ones missing, slow ones slower."""
        for cable in self.cables(cluster):
            share = remaining(cluster.faults, cable.a, cable.b) if cluster.faults else 1.0
            if share > 0:
                yield cable._replace(bandwidth_bytes_per_s=cable.bandwidth_bytes_per_s * share)

    def graph(self, cluster: Cluster) -> nx.DiGraph[str]:
        """Return the directed graph; edges carry ``bandwidth_bytes_per_s``, ``latency_s`` and ``kind``."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph()
        for a, b, bandwidth, latency, kind in self.wired(cluster):
            for edge in ((a, b), (b, a)):
                graph.add_edge(*edge, bandwidth_bytes_per_s=bandwidth, latency_s=latency, kind=kind)
        return graph


class Cluster(BaseModel):
    """Identical devices in identical nodes; the file in ``scenarios/clusters`` carries the device inline.

    intra_node: per device and direction. inter_node: per NIC and direction, one NIC per device unless the topology
    says otherwise; may be absent where one switch joins everything. faults: failed and slow links.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    """Shown in reports."""
    device: Device
    nodes: Annotated[int, Field(gt=0)]
    """Nodes of the cluster."""
    devices_per_node: Annotated[int, Field(gt=0)]
    """Devices of a node."""
    intra_node: LinkSpec
    inter_node: NicSpec | None = None
    topology: Annotated[Topology, Choice(Topology)]
    faults: tuple[LinkFault, ...] = ()
    source: str

    @property
    def n_devices(self) -> int:
        return self.nodes * self.devices_per_node

    @model_validator(mode="after")
    def _faults_name_cables(self) -> Self:
        cables = list(self.topology.cables(self)) if self.faults else []
        for fault in self.faults:
            if not any(fault.hits(cable.a, cable.b) for cable in cables):
                known = dict.fromkeys(name for a, b, *_ in cables for name in (a, b, f"{a}->{b}"))
                near = difflib.get_close_matches(fault.link, known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(f"faults: cluster {self.name} has no link {fault.link!r}{hint}")
        return self


def shortest(neighbours: dict[str, list[tuple[str, float]]], source: str) -> dict[str, str]:
    """Return the predecessor of every node that ``source`` reaches, on a path of fewest hops.

    neighbours: (node, latency) in a fixed order. Of several such paths the quickest, then the first in that order.
    """
    before, latency, edge = {source: source}, {source: 0.0}, [source]
    while edge:
        reached: dict[str, float] = {}
        for node in edge:
            for other, hop in neighbours.get(node, []):
                if other not in latency and latency[node] + hop < reached.get(other, np.inf):
                    reached[other], before[other] = latency[node] + hop, node
        latency |= reached
        edge = list(reached)
    return before


def _links_of(cables: dict[tuple[str, str], tuple[int, Cable]], nodes: list[str]) -> list[int] | None:
    """Return link numbers along ``nodes``: twice the cable's number, plus 1 against its direction; None if cut."""
    found = []
    for i in range(len(nodes) - 1):
        at = cables.get((nodes[i], nodes[i + 1]))
        if at is None:
            return None
        found.append(2 * at[0] + (at[1].a != nodes[i]))
    return found


def build_network(cluster: Cluster, ep_size: int) -> Network:
    """Return the links and routes of an EP group on the first ``ep_size`` devices of ``cluster``.

    Only the part of the cluster that the group can see is built, and links that no route uses are left out. Raises
    ValueError when the group does not fit, fills its last NVLink domain only in part (the peer ranks of DeepEP's
    two-hop dispatch would not exist), or when failed links cut a pair off.
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

    part = topology.part(cluster, ep_size)
    wired = list(topology.wired(part))
    cables = {ends: (i, cable) for i, cable in enumerate(wired) for ends in ((cable.a, cable.b), (cable.b, cable.a))}
    neighbours: dict[str, list[tuple[str, float]]] = {}
    for cable in wired:
        neighbours.setdefault(cable.a, []).append((cable.b, cable.latency_s))
        neighbours.setdefault(cable.b, []).append((cable.a, cable.latency_s))
    routes: list[list[int]] = []
    for source in range(ep_size):
        before: dict[str, str] = {}
        for target in range(source + 1, ep_size):
            nodes = topology.route(part, source, target)
            links = None if nodes is None else _links_of(cables, nodes)
            if links is None:
                before = before or shortest(neighbours, f"gpu:{source}")
                nodes = [f"gpu:{target}"]
                while nodes[-1] != f"gpu:{source}":
                    if nodes[-1] not in before:
                        raise ValueError(
                            f"cluster {cluster.name}: no way is left from gpu:{source} to gpu:{target}; "
                            f"failed: {', '.join(fault.link for fault in cluster.faults if not fault.factor) or 'none'}"
                        )
                    nodes.append(before[nodes[-1]])
                links = _links_of(cables, nodes[::-1])
                assert links is not None  # a path of the graph that the cables made
            routes.append(links)

    width = max(map(len, routes), default=0)
    upper = np.full((len(routes), width), -1, dtype=np.int32)
    lower = upper.copy()
    for i, route in enumerate(routes):
        upper[i, : len(route)] = route
        # The way back takes the other direction of the same cables, last one first.
        lower[i, : len(route)] = [link ^ 1 for link in reversed(route)]
    used = sorted({link // 2 for route in routes for link in route})
    number = np.full(2 * len(wired) + 1, -1, dtype=np.int32)
    for i, at in enumerate(used):
        number[2 * at], number[2 * at + 1] = 2 * i, 2 * i + 1
    paths = np.full((ep_size, ep_size, width), -1, dtype=np.int32)
    rows, columns = np.triu_indices(ep_size, 1)
    paths[rows, columns], paths[columns, rows] = number[upper], number[lower]
    kept = [wired[at] for at in used]
    return Network(
        n_ranks=ep_size,
        ranks_per_node=domain,
        link_names=tuple(name for cable in kept for name in (f"{cable.a}->{cable.b}", f"{cable.b}->{cable.a}")),
        link_kind=tuple(cable.kind for cable in kept for _ in range(2)),
        link_bandwidth_bytes_per_s=np.repeat(np.array([cable.bandwidth_bytes_per_s for cable in kept], np.float64), 2),
        link_latency_s=np.repeat(np.array([cable.latency_s for cable in kept], np.float64), 2),
        paths=paths,
        nic_bytes_per_s=None if cluster.inter_node is None else cluster.inter_node.rate_bytes_per_s,
    )
