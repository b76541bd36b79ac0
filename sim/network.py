"""The network as arrays: links, and the route of every ordered pair of ranks over them.

Built once by ``sim.cluster`` from a networkx graph, read by ``sim.cost``; neither imports the other. Links are directed;
a full-duplex cable is two links. Routes are symmetric in kind: the route d -> s uses the reverse links of s -> d, with
the same bandwidths, so a combine is a dispatch run backwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sim.tokens import F64, I32, Bool


@dataclass(frozen=True, slots=True)
class Network:
    """Links and routes of the ranks of one expert-parallel group.

    n_ranks, ranks_per_node: rank r is device r % ranks_per_node of node r // ranks_per_node.
    link_names: names such as ``"gpu:3->nvswitch:0"``, [L].
    link_bandwidth_bytes_per_s: [L] float64, achievable (nominal x efficiency) one-direction rate.
    link_latency_s: [L] float64.
    link_kind: [L] names of the link's class (``"nvlink"``, ``"nic"``, ``"fabric"``).
    paths: [n_ranks, n_ranks, H] int32 link ids of the direct route source -> destination, padded with -1; the diagonal
        is all -1. Where nodes are joined by rails, routes between ranks of equal position stay on theirs, unless a link
        there has failed.
    nic_bytes_per_s: achievable rate of a rank's own NIC, also where no route uses it (loopback); None without one.
    """

    n_ranks: int
    ranks_per_node: int
    link_names: tuple[str, ...]
    link_kind: tuple[str, ...]
    link_bandwidth_bytes_per_s: F64
    link_latency_s: F64
    paths: I32
    nic_bytes_per_s: float | None = None

    @property
    def inside(self) -> Bool:
        """[L]: links within a node or NVLink domain."""
        return np.isin(self.link_kind, ("nvlink", "xgmi", "ub", "ici"))

    @property
    def n_nodes(self) -> int:
        return -(-self.n_ranks // self.ranks_per_node)
