"""Servers without NVLink: devices on PCIe switches under one or two root complexes, a NIC on each switch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from sim.cluster import Cable, Cluster, Topology
from sim.cluster.rails import nic_of
from sim.units import BytesPerSecond


class PcieBox(Topology):
    """``intra_node`` is a device's PCIe link; each switch has one link up to its root, roots share a socket link.

    devices_per_switch: they also share the switch's NIC (``inter_node``, one per switch). switches_per_root: how many
    switches hang below one root complex. uplink_bandwidth_bytes_per_s: from a switch to its root, per direction; None
    is one more link of ``intra_node``. socket_bandwidth_bytes_per_s: between neighbouring roots, per direction; read
    where a node has several. oversubscription: as in ``rail_optimized``, a rail being one switch position.
    A PCIe hop takes half of ``intra_node.latency_s``, also on the way to the NIC, on top of the NIC's own figures.
    """

    kind: Literal["pcie_box"] = "pcie_box"
    devices_per_switch: Annotated[int, Field(gt=0)] = 2
    switches_per_root: Annotated[int, Field(gt=0)] = 2
    uplink_bandwidth_bytes_per_s: BytesPerSecond | None = None
    socket_bandwidth_bytes_per_s: BytesPerSecond
    oversubscription: Annotated[float, Field(ge=1)] = 1.0

    def _sizes(self, cluster: Cluster) -> tuple[int, int]:
        switches = cluster.devices_per_node // self.devices_per_switch
        roots = switches // self.switches_per_root
        if roots * self.switches_per_root * self.devices_per_switch != cluster.devices_per_node:
            raise ValueError(
                f"cluster {cluster.name}: {cluster.devices_per_node} devices of a node do not fill roots of "
                f"{self.switches_per_root} switches with {self.devices_per_switch} devices each"
            )
        return switches, roots

    def cables(self, cluster: Cluster) -> Iterator[Cable]:
        switches, roots = self._sizes(cluster)
        inner = cluster.intra_node
        rate, hop = inner.rate_bytes_per_s, inner.latency_s / 2
        for rank in range(cluster.n_devices):
            yield Cable(f"gpu:{rank}", f"pcie:{rank // self.devices_per_switch}", rate, hop, inner.kind)
        uplink = self.uplink_bandwidth_bytes_per_s or rate
        for switch in range(cluster.nodes * switches):
            yield Cable(f"pcie:{switch}", f"root:{switch // self.switches_per_root}", uplink, hop, inner.kind)
        for node in range(cluster.nodes):
            for root in range(node * roots, (node + 1) * roots - 1):
                yield Cable(f"root:{root}", f"root:{root + 1}", self.socket_bandwidth_bytes_per_s, hop, "socket")
        if cluster.inter_node is None and cluster.nodes == 1:
            return
        nic = nic_of(cluster)
        for switch in range(cluster.nodes * switches):
            yield Cable(f"pcie:{switch}", f"nic:{switch}", nic.rate_bytes_per_s, nic.latency_s / 8, inner.kind)
            leaf = f"leaf:{switch % switches}"
            yield Cable(f"nic:{switch}", leaf, nic.rate_bytes_per_s, nic.latency_s * 3 / 8, "nic")
        rail_rate = cluster.nodes * nic.rate_bytes_per_s / self.oversubscription
        for rail in range(switches):
            yield Cable(f"leaf:{rail}", "spine:0", rail_rate, (nic.cross_leaf_latency_s - nic.latency_s) / 2, "fabric")

    def route(self, cluster: Cluster, source: int, target: int) -> list[str]:
        out, back = source // self.devices_per_switch, target // self.devices_per_switch
        if source // cluster.devices_per_node != target // cluster.devices_per_node:
            switches = cluster.devices_per_node // self.devices_per_switch
            up, down = out % switches, back % switches
            middle = [f"leaf:{up}"] if up == down else [f"leaf:{up}", "spine:0", f"leaf:{down}"]
            middle = [f"nic:{out}", *middle, f"nic:{back}"]
        elif out == back:
            return [f"gpu:{source}", f"pcie:{out}", f"gpu:{target}"]
        else:
            first, last = out // self.switches_per_root, back // self.switches_per_root
            step = 1 if first <= last else -1
            middle = [f"root:{root}" for root in range(first, last + step, step)]
        return [f"gpu:{source}", f"pcie:{out}", *middle, f"pcie:{back}", f"gpu:{target}"]
