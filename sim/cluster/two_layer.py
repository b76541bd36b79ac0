"""Two-layer fat trees, one per NIC position (multi-plane) or one for all: the fabric of DeepSeek-V3's 2,048 H800.

ISCA 2025 (arXiv 2505.09343), section on the multi-plane fat tree (MPFT): NIC i of every node is on plane i, a leaf and
spine network of its own, and traffic between planes is relayed inside a node. Its alternative MRFT, where rails meet at
the spine, is `rail_optimized`; the paper measures the same training speed on both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from sim.cluster import Cable, Cluster
from sim.cluster.rail_optimized import switch_cables
from sim.cluster.rails import Rails, nic_of


class TwoLayer(Rails):
    """Planes of leaf and spine switches over NVSwitch nodes; the spines of a plane act as one ideal multipath switch.

    nodes_per_leaf: nodes whose NICs of one plane share a leaf (32 on 64-port switches). planes: None gives every NIC
    position its own; 1 is the plain fat tree with a node's NICs all on one leaf. Routes between planes go over NVLink
    to the device of the target's position in the source's node first (what NCCL calls PXN).
    """

    kind: Literal["two_layer"] = "two_layer"
    nodes_per_leaf: Annotated[int, Field(gt=0)] = 32
    planes: Annotated[int, Field(gt=0)] | None = None

    def _planes(self, cluster: Cluster) -> int:
        rails = self.rails(cluster)
        planes = rails if self.planes is None else self.planes
        if rails % planes:
            raise ValueError(f"planes {planes} does not divide the {rails} NICs of a node of cluster {cluster.name}")
        return planes

    def cables(self, cluster: Cluster) -> Iterator[Cable]:
        planes, rails = self._planes(cluster), self.rails(cluster)
        yield from switch_cables(cluster)
        if cluster.inter_node is None and cluster.nodes == 1:
            return
        nic = nic_of(cluster)
        for rank in range(cluster.n_devices):
            card = rank // self.devices_per_nic
            yield Cable(f"gpu:{rank}", f"nic:{card}", nic.rate_bytes_per_s, nic.latency_s / 8, "pcie")
        cards: dict[int, int] = {}
        for card in range(cluster.nodes * rails):
            leaf = self._leaf(card, rails, planes)
            cards[leaf] = cards.get(leaf, 0) + 1
            yield Cable(f"nic:{card}", f"leaf:{leaf}", nic.rate_bytes_per_s, nic.latency_s * 3 / 8, "nic")
        climb = (nic.cross_leaf_latency_s - nic.latency_s) / 2
        for leaf, count in sorted(cards.items()):
            uplink = count * nic.rate_bytes_per_s / self.oversubscription
            yield Cable(f"leaf:{leaf}", f"spine:{leaf % planes}", uplink, climb, "fabric")

    def _leaf(self, card: int, rails: int, planes: int) -> int:
        return card // rails // self.nodes_per_leaf * planes + card % rails % planes

    def route(self, cluster: Cluster, source: int, target: int) -> list[str]:
        size = cluster.devices_per_node
        rails = size // self.devices_per_nic
        planes = rails if self.planes is None else self.planes
        node = source // size
        if node == target // size:
            return [f"gpu:{source}", f"nvswitch:{node}", f"gpu:{target}"]
        start, head = source, [f"gpu:{source}"]
        plane = target // self.devices_per_nic % rails % planes
        if plane != source // self.devices_per_nic % rails % planes:
            start = node * size + target % size
            head = [f"gpu:{source}", f"nvswitch:{node}", f"gpu:{start}"]
        out, back = start // self.devices_per_nic, target // self.devices_per_nic
        up, down = self._leaf(out, rails, planes), self._leaf(back, rails, planes)
        middle = [f"leaf:{up}"] if up == down else [f"leaf:{up}", f"spine:{plane}", f"leaf:{down}"]
        return [*head, f"nic:{out}", *middle, f"nic:{back}", f"gpu:{target}"]
