"""The NIC side that several topologies share: device, NIC, the leaf of its rail, one spine. Not a topology itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from sim.cluster import Cable, Cluster, Topology
from sim.hardware import NicSpec


class Rails(Topology):
    """Nodes joined by rails: the NICs of equal position in every node share a leaf, all leaves a spine.

    The spine stands for all spine switches; each leaf's uplink is the sum of its NICs over ``oversubscription``, as
    ideal multipath routing would give. Latencies add up to the NIC's stated device-to-device figures.

    oversubscription: NIC bandwidth below a leaf over its uplink bandwidth; 1 does not block.
    devices_per_nic: neighbouring devices that share one NIC, and its bandwidth.
    """

    oversubscription: Annotated[float, Field(ge=1)] = 1.0
    devices_per_nic: Annotated[int, Field(gt=0)] = 1

    def rails(self, cluster: Cluster) -> int:
        """Return the NICs of a node; ValueError if its devices do not divide among them."""
        if cluster.devices_per_node % self.devices_per_nic:
            raise ValueError(
                f"devices_per_nic {self.devices_per_nic} does not divide the {cluster.devices_per_node} devices of a "
                f"node of cluster {cluster.name}"
            )
        return cluster.devices_per_node // self.devices_per_nic

    def rail_cables(self, cluster: Cluster) -> Iterator[Cable]:
        """Yield everything from the device to the spine; nothing for a single node without ``inter_node``."""
        rails = self.rails(cluster)
        if cluster.inter_node is None and cluster.nodes == 1:
            return
        nic = nic_of(cluster)
        for rank in range(cluster.n_devices):
            card = rank // self.devices_per_nic
            yield Cable(f"gpu:{rank}", f"nic:{card}", nic.rate_bytes_per_s, nic.latency_s / 8, "pcie")
        for card in range(cluster.nodes * rails):
            yield Cable(f"nic:{card}", f"leaf:{card % rails}", nic.rate_bytes_per_s, nic.latency_s * 3 / 8, "nic")
        uplink = cluster.nodes * nic.rate_bytes_per_s / self.oversubscription
        for rail in range(rails):
            yield Cable(f"leaf:{rail}", "spine:0", uplink, (nic.cross_leaf_latency_s - nic.latency_s) / 2, "fabric")

    def rail_route(self, cluster: Cluster, source: int, target: int) -> list[str]:
        """Return the route over NICs between devices of two nodes; on one rail it stays below the leaf."""
        rails = cluster.devices_per_node // self.devices_per_nic
        out, back = source // self.devices_per_nic, target // self.devices_per_nic
        up, down = out % rails, back % rails
        middle = [f"leaf:{up}"] if up == down else [f"leaf:{up}", "spine:0", f"leaf:{down}"]
        return [f"gpu:{source}", f"nic:{out}", *middle, f"nic:{back}", f"gpu:{target}"]


def nic_of(cluster: Cluster) -> NicSpec:
    """Return the cluster's NIC; ValueError where it has several nodes and none."""
    if cluster.inter_node is None:
        raise ValueError(f"cluster {cluster.name}: {cluster.nodes} nodes need an inter_node link")
    return cluster.inter_node
