"""Where the parts of a cluster stand in a drawing: by level from devices up to spines, or as a grid for a torus."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from sim.cluster import Cable, Cluster
from sim.cluster.torus import Torus

Place = tuple[float, float]
LEVELS = {
    "superswitch": -2.2,
    "nvswitch": -1.2,
    "switch": -1.2,
    "gpu": 0.0,
    "node": 0.0,
    "pcie": 1.0,
    "root": 1.7,
    "nic": 1.0,
    "leaf": 2.4,
    "spine": 3.4,
}
# Of the boxes without NVLink, whose NICs hang on PCIe switches.
BEHIND_PCIE = {"nic": 2.4, "leaf": 3.4, "spine": 4.4}
GAP = 1.2
"""Between nodes, in devices."""


def kind_of(part: str) -> str:
    return part.partition(":")[0]


def number_of(part: str) -> int:
    return int(part.partition(":")[2])


def contracted(cables: Sequence[Cable], cluster: Cluster) -> dict[str, str]:
    """Return what every part of ``cables`` is drawn as where nodes stand for their devices: ``node:N``, or itself.

    NICs and switches belong to the node of the devices that they hang on; those of several nodes stand for themselves.
    """
    nodes: dict[str, set[int]] = {}
    for cable in cables:
        for part in (cable.a, cable.b):
            if kind_of(part) == "gpu":
                nodes[part] = {number_of(part) // cluster.devices_per_node}
    inner = {"nvswitch", "switch", "pcie", "nic", "root"}
    for _ in range(3):  # device, PCIe switch, NIC or root
        for cable in cables:
            for part, other in ((cable.a, cable.b), (cable.b, cable.a)):
                if kind_of(part) in inner and kind_of(other) in ("gpu", *inner) and other in nodes:
                    nodes.setdefault(part, set()).update(nodes[other])
    parts = dict.fromkeys(part for cable in cables for part in (cable.a, cable.b))
    return {part: f"node:{min(nodes[part])}" if len(nodes.get(part, ())) == 1 else part for part in parts}


def places(edges: Sequence[tuple[str, str]], cluster: Cluster) -> dict[str, Place]:
    """Return the place of every part of ``edges``. Devices count up from the left; what joins them stands above or below
    the middle of its neighbours, leaves and spines are spread over the whole width."""
    parts = list(dict.fromkeys(part for edge in edges for part in edge))
    topology, nodes = cluster.topology, any(kind_of(part) == "node" for part in parts)
    if isinstance(topology, Torus) and not nodes:
        return _grid(topology, parts)
    levels = LEVELS | BEHIND_PCIE if any(kind_of(part) == "pcie" for part in parts) else LEVELS
    size = cluster.devices_per_node
    found: dict[str, Place] = {}
    for part in parts:
        if kind_of(part) in ("gpu", "node"):
            at = number_of(part)
            found[part] = (at + GAP * (at // size) if kind_of(part) == "gpu" else float(at), 0.0)
    width = max(x for x, _ in found.values())
    tall = 0.055 * max(width, 12)  # of one level, so that wide clusters do not come out flat
    order = ("pcie", "nic", "root", "nvswitch", "switch", "superswitch")
    for kind in order:
        for part in (part for part in parts if kind_of(part) == kind):
            near = [
                found[other][0] for a, b in edges for mine, other in ((a, b), (b, a)) if mine == part and other in found
            ]
            found[part] = (sum(near) / max(1, len(near)), levels[kind] * tall)
    for kind in ("leaf", "spine"):
        above = sorted((part for part in parts if kind_of(part) == kind), key=number_of)
        for i, part in enumerate(above):
            found[part] = (width * (i + 0.5) / len(above), levels[kind] * tall * 1.3)
    return found


def _grid(torus: Torus, parts: Sequence[str]) -> dict[str, Place]:
    """Return a torus as rows and columns of its last two dimensions; a third one goes back into the page."""
    shape = (1,) * (3 - len(torus.shape)) + torus.shape
    places = [(x + 0.85 * z / shape[0], -y + 0.6 * z / shape[0]) for z, y, x in itertools.product(*map(range, shape))]
    return {part: places[number_of(part)] for part in parts}
