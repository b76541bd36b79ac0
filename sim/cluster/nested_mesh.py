"""Full meshes in a full mesh: devices of a node joined pairwise, and devices of equal position in all nodes too.

UB-Mesh builds racks this way (arXiv 2503.20377, 2D full mesh of 8 x 8 NPUs); on it DeepEP's two hops, to the peer of
equal position and on inside its node, are both a single cable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from sim.cluster import Cable, Cluster, Topology
from sim.cluster.full_mesh import mesh_cables
from sim.cluster.rails import nic_of


class NestedMesh(Topology):
    """``intra_node`` and ``inter_node`` bandwidth are each split evenly over the cables of their mesh.

    Other pairs are relayed by the device of the target's position in the source's node. No switch and no NIC;
    ``inter_node.latency_s`` is that of one cable.
    """

    kind: Literal["nested_mesh"] = "nested_mesh"

    def cables(self, cluster: Cluster) -> Iterator[Cable]:
        yield from mesh_cables(cluster)
        if cluster.nodes > 1:
            outer, size = nic_of(cluster), cluster.devices_per_node
            rate = outer.rate_bytes_per_s / (cluster.nodes - 1)
            for a in range(cluster.n_devices):
                for b in range(a + size, cluster.n_devices, size):
                    yield Cable(f"gpu:{a}", f"gpu:{b}", rate, outer.latency_s, outer.kind)

    def part(self, cluster: Cluster, n_devices: int) -> Cluster:
        # A smaller mesh would have fewer and faster cables.
        return cluster

    def route(self, cluster: Cluster, source: int, target: int) -> list[str]:
        size = cluster.devices_per_node
        relay = source - source % size + target % size
        return [f"gpu:{source}", *([] if relay in (source, target) else [f"gpu:{relay}"]), f"gpu:{target}"]
