"""One NVLink domain over all nodes: GB200 NVL72, or any single server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from sim.cluster import Cable, Cluster, Topology


class SingleSwitch(Topology):
    """Every device has one port on one ideal switch; trays (``nodes``) matter to nobody, NICs are not used."""

    kind: Literal["single_switch"] = "single_switch"

    def cables(self, cluster: Cluster) -> Iterator[Cable]:
        inner = cluster.intra_node
        for rank in range(cluster.n_devices):
            yield Cable(f"gpu:{rank}", "nvswitch:0", inner.rate_bytes_per_s, inner.latency_s / 2, inner.kind)

    def domain(self, cluster: Cluster) -> int:
        return cluster.n_devices

    def route(self, cluster: Cluster, source: int, target: int) -> list[str]:
        return [f"gpu:{source}", "nvswitch:0", f"gpu:{target}"]
