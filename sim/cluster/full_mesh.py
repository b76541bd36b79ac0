"""Devices of a node joined pairwise, as MI300X by Infinity Fabric, and rails between nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from sim.cluster import Cable, Cluster
from sim.cluster.rails import Rails


def mesh_cables(cluster: Cluster) -> Iterator[Cable]:
    """Yield the cables inside nodes: each device's ``intra_node`` bandwidth split evenly over its node's others."""
    inner, size = cluster.intra_node, cluster.devices_per_node
    for a in range(cluster.n_devices):
        for b in range(a + 1, (a // size + 1) * size):
            yield Cable(f"gpu:{a}", f"gpu:{b}", inner.rate_bytes_per_s / (size - 1), inner.latency_s, inner.kind)


class FullMesh(Rails):
    """A device's ``intra_node`` bandwidth is split evenly over its cables to the other devices of the node."""

    kind: Literal["full_mesh"] = "full_mesh"

    def cables(self, cluster: Cluster) -> Iterator[Cable]:
        yield from mesh_cables(cluster)
        yield from self.rail_cables(cluster)

    def route(self, cluster: Cluster, source: int, target: int) -> list[str]:
        if source // cluster.devices_per_node == target // cluster.devices_per_node:
            return [f"gpu:{source}", f"gpu:{target}"]
        return self.rail_route(cluster, source, target)
