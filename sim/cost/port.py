"""Bottleneck port: everything of one all-to-all shares links and SMs from its start, nothing waits for its turn.

A pair's time is an overhead plus the slowest of what its bytes pass: the links of its route, and in normal mode the SMs
that copy them on every device on the way. Links come with the network at the rate that all-to-all kernels sustain
(`sim.hardware.LinkSpec`); the constants of a release are here. Eight for two modes: three of each, and the two shares of
the links' nominal rates that both use.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from sim.cost import CommunicationCost, Direction, Mode, checked_tokens
from sim.cost.flows import forwarded_tokens, incidence, link_bytes
from sim.network import Network
from sim.tokens import F64, Bool
from sim.units import BytesPerSecond, Seconds

Release = Literal["v1_first", "v1", "v2"]


class Kernels(BaseModel):
    """Constants of one release's kernels, the latency of the links not included.

    dispatch_s, combine_s: overhead of normal kernels (launch, layout, synchronisation). bytes_per_s_and_sm: what one SM
    of them copies; a copy is a token on its way to a node, or from a node's forwarding device to a rank, the own ones
    included. low_latency_s: overhead of low-latency kernels. low_latency_nic_s: what a pair over the NIC waits besides.
    low_latency_share: of the sustained rate within a node that low-latency kernels reach.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dispatch_s: Seconds = 25e-6
    combine_s: Seconds = 47e-6
    bytes_per_s_and_sm: BytesPerSecond = 16.5e9
    low_latency_s: Seconds = 9e-6
    low_latency_nic_s: Seconds = 14e-6
    low_latency_share: Annotated[float, Field(gt=0, le=1)] = 0.81


class Port(CommunicationCost):
    """DeepEP by its busiest port. Releases: ``v1_first`` (February 2025), ``v1`` (docs/legacy.md today), ``v2``.

    The first release sends through the NIC also what stays in the node: all of it in low-latency mode, the own node's
    copy in normal mode across nodes; its printed logical bandwidth, 43-47 GB/s at every size, is that NIC. Hops of a
    pair overlap (chunk by chunk). The largest entry is the makespan of max-min fair sharing within 0.2-4 % (worst 10 %
    at strong skew); of single pairs it is a first guess. Set on: normal and low-latency tables of aiconfigurator-core
    on H100 with 1 and 2 nodes, DeepEP's H800 tables of both releases. Other node counts and devices are predictions:
    H100 on 4 and 8 nodes low latency within 1-5 % (median), H200 7-12 %, B200 and GB200 normal 4-14 %; low latency there
    11-29 %, since their kernels start slower (16-22 us) and combine nearer to the link's rate than any H100's.

    ``bytes_per_s_and_sm`` of v2 is the least that its rows with 6 and 12 SMs need. ``num_sms: 0`` leaves SMs out.
    """

    kind: Literal["port"] = "port"
    release: Release = "v1"
    """Which release of DeepEP."""
    kernels: Kernels | None = None
    """Constants instead of those of ``release``."""
    source: str = "DeepEP docs/legacy.md and README.md; aiconfigurator-core 0.12.0 DeepEP tables on H100; set by hand"

    @property
    def constants(self) -> Kernels:
        """The kernels given, or those of ``release``."""
        if self.kernels is not None:
            return self.kernels
        return Kernels(bytes_per_s_and_sm=32e9) if self.release == "v2" else Kernels()

    def pair_times_s(
        self,
        network: Network,
        *,
        rank_tokens: npt.ArrayLike,
        node_tokens: npt.ArrayLike,
        bytes_per_token: float,
        mode: Mode,
        direction: Direction = "dispatch",
        slowdown: float = 1.0,
    ) -> tuple[F64, Bool]:
        ranks, nodes = checked_tokens(network, rank_tokens, node_tokens)
        constants = self.constants
        times = self._low_latency if mode == "low_latency" else self._normal
        busy, latency = times(network, constants, ranks, nodes, bytes_per_token)
        overhead = constants.dispatch_s if direction == "dispatch" else constants.combine_s
        if mode == "low_latency":
            overhead = constants.low_latency_s
        reaches = ranks > 0
        reaches[..., np.arange(network.n_ranks), np.arange(network.n_ranks)] = False
        return np.where(reaches, busy * slowdown + latency + overhead, 0.0), reaches

    def _all_by_nic(self, network: Network) -> bool:
        return self.release == "v1_first" and network.nic_bytes_per_s is not None

    def _low_latency(
        self, network: Network, constants: Kernels, ranks: F64, nodes: F64, size: float
    ) -> tuple[F64, F64]:
        """Return transfer times [..., P, P] and latencies [P, P] of links and NICs."""
        flows, p = incidence(network), network.n_ranks
        node = np.arange(p) // network.ranks_per_node
        away = node[:, None] != node
        remote = ranks * away if self._all_by_nic(network) else ranks
        moved = link_bytes(network, rank_tokens=remote, node_tokens=nodes, bytes_per_token=size, mode="low_latency")
        rate = network.link_bandwidth_bytes_per_s * np.where(network.inside, constants.low_latency_share, 1.0)
        busy = flows.direct.slowest(moved / rate).reshape(*ranks.shape[:-2], p, p)
        if self._all_by_nic(network):
            away, sent = np.ones_like(away), ranks * ~np.eye(p, dtype=bool)
            busy = np.maximum(busy, _loopback(network, sent.sum(axis=-1), sent.sum(axis=-2), size))
        return busy, flows.direct.latency_s.reshape(p, p) + away * constants.low_latency_nic_s

    def _normal(self, network: Network, constants: Kernels, ranks: F64, nodes: F64, size: float) -> tuple[F64, F64]:
        flows, p, n_nodes, batch = incidence(network), network.n_ranks, network.n_nodes, ranks.shape[:-2]
        per_node = flows.ranks_per_node
        moved = link_bytes(network, rank_tokens=ranks, node_tokens=nodes, bytes_per_token=size, mode="normal")
        busy = moved / network.link_bandwidth_bytes_per_s
        # First hop [P, N] spread to the ranks of each node, second hop [R, P] to the sources of each position.
        rail = np.repeat(flows.rail.slowest(busy).reshape(*batch, p, n_nodes), per_node, axis=-1)
        forward = np.concatenate([flows.forward.slowest(busy).reshape(*batch, per_node, p)] * n_nodes, axis=-2)
        seconds = np.maximum(rail, forward, out=rail)
        latency = np.repeat(flows.rail.latency_s.reshape(p, n_nodes), per_node, axis=-1)
        latency = latency + np.tile(flows.forward.latency_s.reshape(per_node, p), (n_nodes, 1))
        if self.num_sms:
            rate = self.num_sms * constants.bytes_per_s_and_sm
            np.maximum(seconds, _copies(network, ranks, nodes) * (size / rate), out=seconds)
        if n_nodes > 1 and self._all_by_nic(network):
            out, into = nodes.sum(axis=-1), _arriving(network, nodes).reshape(*batch, p)
            np.maximum(seconds, _loopback(network, out, into, size), out=seconds)
        return seconds, latency


def _copies(network: Network, ranks: F64, nodes: F64) -> F64:
    """Return [..., P, P]: token copies that the SMs of the busiest device on each pair's way make in normal mode."""
    per_node, n_nodes = min(network.ranks_per_node, network.n_ranks), network.n_nodes
    batch, p = ranks.shape[:-2], network.n_ranks
    # Copies that each device hands on inside its node [P]; its sends are copies per node where there are several.
    handed = forwarded_tokens(network, ranks).reshape(*batch, per_node, n_nodes, per_node).sum(axis=-1)
    handed = np.swapaxes(handed, -1, -2).reshape(*batch, p)
    received = ranks.sum(axis=-2)
    if n_nodes > 1:
        handed = handed + nodes.sum(axis=-1)
        received = received + _arriving(network, nodes).reshape(*batch, p)
    busy = np.maximum(handed, received)
    # The device that forwards s -> r stands in r's node at the position of s.
    by_node = np.swapaxes(busy.reshape(*batch, n_nodes, per_node), -1, -2)
    relay = np.repeat(np.concatenate([by_node] * n_nodes, axis=-2), per_node, axis=-1)
    ends = np.maximum(busy[..., :, None], busy[..., None, :])
    longest: F64 = np.maximum(ends, relay, out=ends)
    return longest


def _arriving(network: Network, nodes: F64) -> F64:
    """Return [..., N, R]: copies that each device gets on the first hop, from its position in all nodes (own too)."""
    per_node = min(network.ranks_per_node, network.n_ranks)
    by_position = nodes.reshape(*nodes.shape[:-2], -1, per_node, network.n_nodes).sum(axis=-3)
    return np.swapaxes(by_position, -1, -2)


def _loopback(network: Network, out: F64, into: F64, size: float) -> F64:
    """Return [..., P, P] seconds of the busier NIC of a pair, of tokens ``out`` of and ``into`` each device [..., P]."""
    assert network.nic_bytes_per_s is not None
    seconds: F64 = np.maximum(out[..., :, None], into[..., None, :]) * (size / network.nic_bytes_per_s)
    return seconds
