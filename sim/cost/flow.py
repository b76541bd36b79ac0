"""Max-min fair flows: everything of one all-to-all shares links and SMs, and who is done leaves room for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from sim.cost import CommunicationCost, Direction, Mode, checked_tokens
from sim.cost.flows import Same, forwarded_tokens, incidence
from sim.cost.maxmin import Routes, completions, routes
from sim.cost.port import Kernels, Port, Release
from sim.network import Network
from sim.tokens import F64, I64, Bool


class Flow(CommunicationCost):
    """A pair's time is the end of its flows under max-min fair sharing, plus latencies and overhead.

    Low latency: one flow per pair. Normal: one flow per rank and node over the NICs, and one per position and rank
    inside the nodes, which carries what all ranks of that position sent on. The SMs of a device that copy normal-mode
    tokens are two more links that its flows cross, one for what it hands on and one for what it receives. All flows
    start together, as chunk by chunk forwarding keeps both hops busy, and a pair ends with the later of its two; that
    the second hop may wait for the first one's chunks is not modelled.

    Releases, kernels and their constants are those of ``port``, which gives nearly the same makespan faster (within 2 %
    at mild skew, 4 % where NIC, NVLink and few SMs bind at once); this gives the ends of single pairs, which there are
    off by a tenth to several times under skew. eps: flow ends within this share of the clock are taken together
    (`sim.cost.maxmin`); 0 is exact and, for 64 ranks, 10 to 300 times slower (60 ms or more).
    """

    kind: Literal["flow"] = "flow"
    eps: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    release: Release = "v1"
    """Which release of DeepEP."""
    kernels: Kernels | None = None
    """Constants instead of those of ``release``."""
    source: str = "constants as port"

    @property
    def constants(self) -> Kernels:
        """The constants that ``port`` has under the same settings."""
        return Port(release=self.release, kernels=self.kernels).constants

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
        constants, p = self.constants, network.n_ranks
        shared = _shared(Same(network), mode, self.release, constants, self.num_sms)
        batch = ranks.shape[:-2]
        tokens = ranks.reshape(*batch, -1)
        if mode == "normal":
            forward = forwarded_tokens(network, ranks).reshape(*batch, -1)
            tokens = np.concatenate([nodes.reshape(*batch, -1), forward], axis=-1)
        flat = tokens.reshape(-1, tokens.shape[-1])
        seconds = np.empty((len(flat), p, p))
        for i, row in enumerate(flat):
            ends, _ = completions(shared.routes, shared.capacity, row * bytes_per_token, eps=self.eps)
            seconds[i] = ends.reshape(p, p) if mode == "low_latency" else _later_hop(network, ends)
        overhead = constants.dispatch_s if direction == "dispatch" else constants.combine_s
        if mode == "low_latency":
            overhead = constants.low_latency_s
        seconds = seconds * slowdown + (shared.latency_s + overhead)
        reaches = ranks > 0
        reaches[..., np.arange(p), np.arange(p)] = False
        return np.where(reaches, seconds.reshape(*batch, p, p), 0.0), reaches


def _later_hop(network: Network, ends: F64) -> F64:
    """Return [P, P] from the ends of the first hop [P, N] and the second [R, P], one after the other."""
    per_node, p = min(network.ranks_per_node, network.n_ranks), network.n_ranks
    first, second = np.split(ends, [p * network.n_nodes])
    rail = np.repeat(first.reshape(p, -1), per_node, axis=1)
    later: F64 = np.maximum(rail, np.tile(second.reshape(per_node, p), (network.n_nodes, 1)))
    return later


@dataclass(frozen=True, slots=True, eq=False)
class _Shared:
    """Flows of one exchange and what they share; ``latency_s`` [P, P] of the links and, in low latency, the NIC."""

    routes: Routes
    capacity: F64
    latency_s: F64


@lru_cache(maxsize=16)
def _shared(key: Same, mode: Mode, release: Release, constants: Kernels, num_sms: int) -> _Shared:
    """Prepare the flows of an exchange, once per network and settings."""
    network = key.network
    # The first release sends what stays in the node through the NIC too.
    loops = release == "v1_first" and network.nic_bytes_per_s is not None
    made = (
        _low_latency(network, constants, loops)
        if mode == "low_latency"
        else _normal(network, constants, num_sms, loops)
    )
    links, capacity, latency_s = made
    used = np.unique(links[links >= 0])
    number = np.full(len(capacity) + 1, -1)
    number[used] = np.arange(used.size)
    links, capacity = number[links], capacity[used]
    return _Shared(routes(_tightest(links, capacity), len(capacity)), capacity, latency_s)


def _low_latency(network: Network, constants: Kernels, loops: bool) -> tuple[I64, F64, F64]:
    """Return routes [P * P, H], capacities and latencies [P, P]; beyond the links, each NIC's loop out and in."""
    flows, p, n_links = incidence(network), network.n_ranks, len(network.link_names)
    source, target = np.divmod(np.arange(p * p), p)
    away = source // flows.ranks_per_node != target // flows.ranks_per_node
    rate = network.link_bandwidth_bytes_per_s * np.where(network.inside, constants.low_latency_share, 1.0)
    latency = flows.direct.latency_s + np.where(away | loops, constants.low_latency_nic_s, 0.0)
    links = flows.direct.links
    if loops:
        loop = np.stack([n_links + source, n_links + p + target], axis=1)
        links = _beside(np.where(away[:, None], links, -1), np.where((source != target)[:, None], loop, -1))
        rate = np.concatenate([rate, np.full(2 * p, float(network.nic_bytes_per_s or np.inf))])
    return links, rate, latency.reshape(p, p)


def _normal(network: Network, constants: Kernels, num_sms: int, loops: bool) -> tuple[I64, F64, F64]:
    """Return routes [P * N + R * P, H], capacities and latencies [P, P]; beyond the links SMs, then NICs, out and in."""
    flows, p, n_nodes, n_links = incidence(network), network.n_ranks, network.n_nodes, len(network.link_names)
    per_node = flows.ranks_per_node
    source, node = np.divmod(np.arange(p * n_nodes), n_nodes)
    position, target = np.divmod(np.arange(per_node * p), p)
    first = n_links + np.stack([source, p + node * per_node + source % per_node], axis=1)
    second = n_links + np.stack([target // per_node * per_node + position, p + target], axis=1)
    rail, forward = flows.rail.links, flows.forward.links
    if num_sms:
        forward = _beside(forward, second)
        rail = _beside(rail, first) if n_nodes > 1 else rail
    if loops and n_nodes > 1:
        rail = _beside(rail, 2 * p + first)
    width = max(rail.shape[1], forward.shape[1])
    padded = [np.pad(hop, ((0, 0), (0, width - hop.shape[1])), constant_values=-1) for hop in (rail, forward)]
    sm, nic = num_sms * constants.bytes_per_s_and_sm, float(network.nic_bytes_per_s or np.inf)
    rate = np.concatenate([network.link_bandwidth_bytes_per_s, np.repeat([sm, nic], 2 * p)])
    latency = np.repeat(flows.rail.latency_s.reshape(p, n_nodes), per_node, axis=1)
    latency = latency + np.tile(flows.forward.latency_s.reshape(per_node, p), (n_nodes, 1))
    return np.concatenate(padded), rate, latency


def _beside(links: I64, more: npt.NDArray[np.int64]) -> I64:
    return np.concatenate([links, more], axis=1)


def _tightest(links: I64, capacity: F64) -> I64:
    """Take links out of routes [F, H] that the same flows cross as another of no more capacity: GPU, NIC, leaf."""
    flow, column = np.nonzero(links >= 0)
    order = np.argsort(links[flow, column], kind="stable")
    crossing = np.split(flow[order], np.cumsum(np.bincount(links[flow, column], minlength=len(capacity)))[:-1])
    kept: dict[bytes, int] = {}
    for link, members in enumerate(crossing):
        key = members.tobytes()
        if key not in kept or capacity[link] < capacity[kept[key]]:
            kept[key] = link
    stays = np.zeros(len(capacity) + 1, dtype=bool)
    stays[list(kept.values())] = True
    stays[-1] = False
    return np.where(stays[links], links, -1)
