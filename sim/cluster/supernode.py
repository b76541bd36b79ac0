"""Scale-up domains of several nodes, joined by NICs: GB200 NVL72 racks, CloudMatrix384 (arXiv 2506.12708)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from sim.cluster import Cable, Cluster
from sim.cluster.rails import Rails
from sim.units import Seconds


class Supernode(Rails):
    """All devices of ``nodes_per_supernode`` nodes share one switched network; supernodes meet over rails of NICs.

    Parallel switch planes (18 NVSwitch chips of a rack, 7 UB planes) stripe every transfer evenly and act as one.
    A plane that fails is therefore a fault on ``switch:*`` with the factor (planes - 1) / planes.

    node_switches: False puts every device on its supernode's switch; True puts a switch into each node first.
    node_oversubscription: device bandwidth below a node's switch over its uplink. cross_node_latency_s: what a pair
    across node switches takes longer than ``intra_node.latency_s``. A supernode is one "node" in DeepEP's sense.
    """

    kind: Literal["supernode"] = "supernode"
    nodes_per_supernode: Annotated[int, Field(gt=0)]
    """Nodes that share one switched network."""
    node_switches: bool = False
    node_oversubscription: Annotated[float, Field(ge=1)] = 1.0
    cross_node_latency_s: Seconds = 0.0

    def cables(self, cluster: Cluster) -> Iterator[Cable]:
        if cluster.nodes > self.nodes_per_supernode and cluster.nodes % self.nodes_per_supernode:
            raise ValueError(
                f"cluster {cluster.name}: {cluster.nodes} nodes do not fill supernodes of {self.nodes_per_supernode}"
            )
        inner, size = cluster.intra_node, cluster.devices_per_node
        for rank in range(cluster.n_devices):
            switch = self._switch(rank // size)
            yield Cable(f"gpu:{rank}", switch, inner.rate_bytes_per_s, inner.latency_s / 2, inner.kind)
        if self.node_switches:
            uplink = size * inner.rate_bytes_per_s / self.node_oversubscription
            for node in range(cluster.nodes):
                top = f"superswitch:{node // self.nodes_per_supernode}"
                yield Cable(f"switch:{node}", top, uplink, self.cross_node_latency_s / 2, inner.kind)
        if cluster.inter_node is not None or cluster.nodes > self.nodes_per_supernode:
            yield from self.rail_cables(cluster)

    def _switch(self, node: int) -> str:
        return f"switch:{node if self.node_switches else node // self.nodes_per_supernode}"

    def domain(self, cluster: Cluster) -> int:
        return min(cluster.nodes, self.nodes_per_supernode) * cluster.devices_per_node

    def route(self, cluster: Cluster, source: int, target: int) -> list[str]:
        here, there = source // cluster.devices_per_node, target // cluster.devices_per_node
        above = here // self.nodes_per_supernode
        if above != there // self.nodes_per_supernode:
            return self.rail_route(cluster, source, target)
        up, down = self._switch(here), self._switch(there)
        return [f"gpu:{source}", *([up] if up == down else [up, f"superswitch:{above}", down]), f"gpu:{target}"]
