"""Bottleneck link: everything of one all-to-all shares the links from its start, nothing waits for its turn."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from sim.cost import CommunicationCost, Direction, Mode, checked_tokens
from sim.cost.flows import incidence, link_bytes
from sim.network import Network
from sim.tokens import F64, Bool
from sim.units import Seconds


class Overhead(BaseModel):
    """Kernel overhead (launch, layout, synchronisation), within one node and across nodes, without link latency."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dispatch_intranode_s: Seconds
    dispatch_internode_s: Seconds
    combine_intranode_s: Seconds
    combine_internode_s: Seconds

    def of(self, direction: Direction, n_nodes: int) -> float:
        if direction == "dispatch":
            return self.dispatch_internode_s if n_nodes > 1 else self.dispatch_intranode_s
        return self.combine_internode_s if n_nodes > 1 else self.combine_intranode_s


class Port(CommunicationCost):
    """A pair's time is that of the busiest link on its way, bytes over bandwidth, plus latencies and overhead.

    The hops of a pair overlap (DeepEP forwards chunk by chunk). The largest entry is the makespan of max-min fair
    sharing within 0.2-2 % (measured; worst 10 % at strong skew); of single pairs it is only a first guess.
    Overheads: intercepts of aiconfigurator-core's DeepEP tables on H100 at 1 and 2 nodes (normal dispatch 35 / 29,
    combine 52 / 55; low latency 15 / 20 and 11 / 25 us) less the link latencies of the route.
    """

    kind: Literal["port"] = "port"
    normal: Overhead = Overhead(
        dispatch_intranode_s=32e-6, dispatch_internode_s=23e-6, combine_intranode_s=49e-6, combine_internode_s=49e-6
    )
    low_latency: Overhead = Overhead(
        dispatch_intranode_s=12e-6, dispatch_internode_s=17e-6, combine_intranode_s=8e-6, combine_internode_s=22e-6
    )
    source: str = "DeepEP on H100, aiconfigurator-core 0.12.0 deepep_normal and deepep_ll tables, fit"

    def pair_times_s(
        self,
        network: Network,
        *,
        rank_tokens: npt.ArrayLike,
        node_tokens: npt.ArrayLike,
        bytes_per_token: float,
        mode: Mode,
        direction: Direction = "dispatch",
    ) -> tuple[F64, Bool]:
        ranks, nodes = checked_tokens(network, rank_tokens, node_tokens)
        moved = link_bytes(network, rank_tokens=ranks, node_tokens=nodes, bytes_per_token=bytes_per_token, mode=mode)
        busy = moved / network.link_bandwidth_bytes_per_s
        flows, size = incidence(network), network.n_ranks
        if mode == "low_latency":
            seconds = (flows.direct.slowest(busy) + flows.direct.latency_s).reshape(size, size)
        else:
            per_node = flows.ranks_per_node
            node = np.arange(size) // per_node
            # First hop [P, N] spread to the ranks of each node, second hop [R, P] to the sources of each position.
            rail = np.repeat(flows.rail.slowest(busy).reshape(size, -1), per_node, axis=1)
            rail_latency = np.repeat(flows.rail.latency_s.reshape(size, -1), per_node, axis=1)
            reps = (int(node[-1]) + 1, 1)
            forward = np.tile(flows.forward.slowest(busy).reshape(per_node, size), reps)
            forward_latency = np.tile(flows.forward.latency_s.reshape(per_node, size), reps)
            seconds = np.maximum(rail, forward) + (rail_latency + forward_latency)
        reaches = ranks > 0
        np.fill_diagonal(reaches, False)
        overhead = (self.normal if mode == "normal" else self.low_latency).of(direction, network.n_nodes)
        return np.where(reaches, seconds + overhead, 0.0), reaches
