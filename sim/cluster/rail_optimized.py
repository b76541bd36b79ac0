"""Rail-optimised fat tree: the usual NVIDIA H100/H800 cluster, and MRFT of the DeepSeek-V3 fabric paper (ISCA 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from sim.cluster import Cable, Cluster
from sim.cluster.rails import Rails


def switch_cables(cluster: Cluster) -> Iterator[Cable]:
    """Yield the NVLink side: every device on its node's switch."""
    inner = cluster.intra_node
    for rank in range(cluster.n_devices):
        switch = f"nvswitch:{rank // cluster.devices_per_node}"
        yield Cable(f"gpu:{rank}", switch, inner.rate_bytes_per_s, inner.latency_s / 2, inner.kind)


class RailOptimized(Rails):
    """Devices meet on their node's NVSwitch; the NICs of equal position in every node share a leaf, leaves a spine."""

    kind: Literal["rail_optimized"] = "rail_optimized"

    def cables(self, cluster: Cluster) -> Iterator[Cable]:
        yield from switch_cables(cluster)
        yield from self.rail_cables(cluster)

    def route(self, cluster: Cluster, source: int, target: int) -> list[str]:
        node = source // cluster.devices_per_node
        if node == target // cluster.devices_per_node:
            return [f"gpu:{source}", f"nvswitch:{node}", f"gpu:{target}"]
        return self.rail_route(cluster, source, target)
