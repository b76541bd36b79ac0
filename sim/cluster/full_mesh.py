"""Devices of a node joined pairwise, as MI300X by Infinity Fabric, and rails between nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from sim.cluster import Cable, Cluster, Topology, rail_cables, rail_route


class FullMesh(Topology):
    """A device's ``intra_node`` bandwidth is split evenly over its cables to the other devices of the node.

    oversubscription: as in ``rail_optimized``.
    """

    kind: Literal["full_mesh"] = "full_mesh"
    oversubscription: Annotated[float, Field(ge=1)] = 1.0

    def cables(self, cluster: Cluster) -> Iterator[Cable]:
        inner, size = cluster.intra_node, cluster.devices_per_node
        for a in range(cluster.n_devices):
            for b in range(a + 1, (a // size + 1) * size):
                yield Cable(f"gpu:{a}", f"gpu:{b}", inner.rate_bytes_per_s / (size - 1), inner.latency_s, inner.kind)
        yield from rail_cables(cluster, self.oversubscription)

    def route(self, cluster: Cluster, source: int, target: int) -> list[str]:
        if source // cluster.devices_per_node == target // cluster.devices_per_node:
            return [f"gpu:{source}", f"gpu:{target}"]
        return rail_route(cluster, source, target)
