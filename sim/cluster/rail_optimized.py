"""Rail-optimised fat tree: the usual NVIDIA H100/H800 cluster and DeepSeek-V3's (arXiv 2412.19437, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from sim.cluster import Cable, Cluster, Topology, rail_cables, rail_route


class RailOptimized(Topology):
    """Devices meet on their node's NVSwitch; the NICs of equal position in every node share a leaf, leaves a spine.

    oversubscription: NIC bandwidth below a leaf over its uplink bandwidth; 1 does not block.
    """

    kind: Literal["rail_optimized"] = "rail_optimized"
    oversubscription: Annotated[float, Field(ge=1)] = 1.0

    def cables(self, cluster: Cluster) -> Iterator[Cable]:
        inner = cluster.intra_node
        for rank in range(cluster.n_devices):
            switch = f"nvswitch:{rank // cluster.devices_per_node}"
            yield Cable(f"gpu:{rank}", switch, inner.rate_bytes_per_s, inner.latency_s / 2, inner.kind)
        yield from rail_cables(cluster, self.oversubscription)

    def route(self, cluster: Cluster, source: int, target: int) -> list[str]:
        node = source // cluster.devices_per_node
        if node == target // cluster.devices_per_node:
            return [f"gpu:{source}", f"nvswitch:{node}", f"gpu:{target}"]
        return rail_route(cluster, source, target)
