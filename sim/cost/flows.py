"""Which link carries whose bytes: the incidence of DeepEP's flows on a `Network`, and the load it gives.

Normal mode has two hops. On the first, rank s sends one copy per remote node n to its peer there, the rank of equal
position on n. On the second, inside the node, a peer at position j forwards to rank r what all ranks of position j in
other nodes sent for r; s's own tokens for its own node leave at the same hop. So second-hop flows are [R, P]: position
and target, whatever the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from sim.cost import Mode, checked_tokens
from sim.network import Network
from sim.tokens import F64, I64


@dataclass(frozen=True, slots=True, eq=False)
class Hop:
    """Flows of one hop: ``links`` [n_flows, H] with -1 padding, and the same as a flat (link, flow) list."""

    links: I64
    link: I64
    flow: I64
    latency_s: F64

    def load(self, amount: F64, n_links: int) -> F64:
        """Return the [L] sum of ``amount`` [n_flows] over every flow that crosses each link."""
        # An empty bincount comes back as integers.
        return np.bincount(self.link, weights=amount[self.flow], minlength=n_links).astype(np.float64, copy=False)

    def slowest(self, link_time_s: F64) -> F64:
        """Return the [n_flows] largest time among each flow's links; 0 for a flow without links."""
        # The padding index -1 reads the extra last entry.
        padded = np.append(link_time_s, 0.0)
        slowest: F64 = padded[self.links].max(axis=1, initial=0.0)
        return slowest


@dataclass(frozen=True, slots=True, eq=False)
class Incidence:
    """Flows of a network: ``direct`` [P * P] source to target; ``rail`` [P * N]; ``forward`` [R * P]."""

    ranks_per_node: int
    direct: Hop
    rail: Hop
    forward: Hop


class _Same:
    """A cache key that is equal to itself only; holding the network keeps its identity from being reused."""

    __slots__ = ("network",)

    def __init__(self, network: Network) -> None:
        self.network = network

    def __hash__(self) -> int:
        return id(self.network)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.network is self.network


def _hop(network: Network, source: npt.NDArray[np.int64], target: npt.NDArray[np.int64]) -> Hop:
    links = network.paths[source, target].reshape(source.size, -1).astype(np.int64)
    flow, column = np.nonzero(links >= 0)
    latency = np.append(network.link_latency_s, 0.0)[links].sum(axis=1)
    return Hop(links, links[flow, column], flow, latency)


def incidence(network: Network) -> Incidence:
    """Return the flows of ``network``, computed once per network object."""
    return _incidence(_Same(network))


@lru_cache(maxsize=8)
def _incidence(key: _Same) -> Incidence:
    network = key.network
    ranks = np.arange(network.n_ranks)
    per_node = min(network.ranks_per_node, network.n_ranks)
    own_node = ranks // per_node
    peer = np.arange(network.n_nodes)[None, :] * per_node + ranks[:, None] % per_node
    # A rank is its own peer at home, and the route to oneself has no links.
    position = own_node[None, :] * per_node + np.arange(per_node)[:, None]
    everyone = np.broadcast_to(ranks, (per_node, network.n_ranks))
    return Incidence(
        ranks_per_node=per_node,
        direct=_hop(network, np.repeat(ranks, network.n_ranks), np.tile(ranks, network.n_ranks)),
        rail=_hop(network, np.repeat(ranks, network.n_nodes), peer.ravel()),
        forward=_hop(network, position.ravel(), everyone.ravel()),
    )


def forwarded_tokens(network: Network, rank_tokens: F64) -> F64:
    """Return [R, P]: tokens that position j of r's node hands to r on the second hop (r's own position included)."""
    per_node = min(network.ranks_per_node, network.n_ranks)
    total: F64 = rank_tokens.reshape(-1, per_node, network.n_ranks).sum(axis=0)
    return total


def link_bytes(
    network: Network, *, rank_tokens: npt.ArrayLike, node_tokens: npt.ArrayLike, bytes_per_token: float, mode: Mode
) -> F64:
    """Return the bytes [L] on every link in one dispatch; a combine puts the same on the reverse links.

    Arguments and errors as `sim.cost.CommunicationCost.pair_times_s`.
    """
    ranks, nodes = checked_tokens(network, rank_tokens, node_tokens)
    flows, n_links = incidence(network), len(network.link_names)
    if mode == "low_latency":
        tokens = flows.direct.load(ranks.ravel(), n_links)
    else:
        tokens = flows.rail.load(nodes.ravel(), n_links)
        tokens = tokens + flows.forward.load(forwarded_tokens(network, ranks).ravel(), n_links)
    return tokens * bytes_per_token
