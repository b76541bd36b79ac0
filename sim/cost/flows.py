"""Which link carries whose bytes: the incidence of DeepEP's flows on a `Network`, and the load it gives.

Normal mode has two hops. On the first, rank s sends one copy per remote node n to its peer there, the rank of equal
position on n. On the second, inside the node, a peer at position j forwards to rank r what all ranks of position j in
other nodes sent for r; s's own tokens for its own node leave at the same hop. So second-hop flows are [R, P]: position
and target, whatever the number of ranks.
"""

from __future__ import annotations

import math
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
        """Return the [..., L] sum of ``amount`` [..., n_flows] over every flow that crosses each link."""
        rows = amount.reshape(math.prod(amount.shape[:-1]), amount.shape[-1])
        total = np.empty((len(rows), n_links))
        # One row at a time stays in the cache, and a row has the bits it would have alone.
        for i, row in enumerate(rows):
            total[i] = np.bincount(self.link, weights=row[self.flow], minlength=n_links)
        return total.reshape(*amount.shape[:-1], n_links)

    def slowest(self, link_time_s: F64) -> F64:
        """Return the largest of ``link_time_s`` [..., L] among each flow's links, [..., n_flows]; 0 without links."""
        rows = link_time_s.reshape(math.prod(link_time_s.shape[:-1]), link_time_s.shape[-1])
        slowest = np.empty((len(rows), len(self.links)))
        for i, row in enumerate(rows):
            # The padding index -1 reads the extra last entry.
            slowest[i] = np.append(row, 0.0)[self.links].max(axis=1, initial=0.0)
        return slowest.reshape(*link_time_s.shape[:-1], len(self.links))


@dataclass(frozen=True, slots=True, eq=False)
class Incidence:
    """Flows of a network: ``direct`` [P * P] source to target; ``rail`` [P * N]; ``forward`` [R * P]."""

    ranks_per_node: int
    direct: Hop
    rail: Hop
    forward: Hop


class Same:
    """A cache key that is equal to itself only; holding the network keeps its identity from being reused."""

    __slots__ = ("network",)

    def __init__(self, network: Network) -> None:
        self.network = network

    def __hash__(self) -> int:
        return id(self.network)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.network is self.network


def _hop(network: Network, source: npt.NDArray[np.int64], target: npt.NDArray[np.int64]) -> Hop:
    links = network.paths[source, target].reshape(source.size, -1).astype(np.int64)
    flow, column = np.nonzero(links >= 0)
    latency = np.append(network.link_latency_s, 0.0)[links].sum(axis=1)
    return Hop(links, links[flow, column], flow, latency)


def incidence(network: Network) -> Incidence:
    """Return the flows of ``network``, computed once per network object."""
    return _incidence(Same(network))


@lru_cache(maxsize=8)
def _incidence(key: Same) -> Incidence:
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
    """Return [..., R, P]: tokens that position j of r's node hands to r on the second hop (own position included)."""
    per_node = min(network.ranks_per_node, network.n_ranks)
    batch = rank_tokens.shape[:-2]
    total: F64 = rank_tokens.reshape(*batch, -1, per_node, network.n_ranks).sum(axis=-3)
    return total


def link_bytes(
    network: Network, *, rank_tokens: npt.ArrayLike, node_tokens: npt.ArrayLike, bytes_per_token: float, mode: Mode
) -> F64:
    """Return the bytes [..., L] on every link in one dispatch; a combine puts the same on the reverse links.

    Arguments and errors as `sim.cost.CommunicationCost.pair_times_s`.
    """
    ranks, nodes = checked_tokens(network, rank_tokens, node_tokens)
    flows, n_links = incidence(network), len(network.link_names)
    if mode == "low_latency":
        tokens = flows.direct.load(_flat(ranks), n_links)
    else:
        tokens = flows.rail.load(_flat(nodes), n_links)
        tokens = tokens + flows.forward.load(_flat(forwarded_tokens(network, ranks)), n_links)
    return tokens * bytes_per_token


def _flat(matrix: F64) -> F64:
    """Return [..., a, b] as [..., a * b], the order of a hop's flows."""
    return matrix.reshape(*matrix.shape[:-2], -1)
