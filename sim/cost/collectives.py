"""Collectives of tensor and data parallelism, and hops of pipeline parallelism: seconds, pure functions, no clock.

``message_bytes`` is NCCL's size: the buffer that every rank holds whole. All-reduce: what each rank contributes and
gets back. All-gather: the gathered result. Reduce-scatter: the input of each rank. All-to-all: what each rank sends,
its own slice included. Point to point: the message.

A cluster is anything with ``intra_node`` and ``inter_node`` (`sim.cluster.Cluster` is). Groups of ``n_ranks`` hold
``ranks_per_node`` ranks of every node they reach, one NIC each: 8 for data parallelism over whole nodes, 1 where every
member sits on another node (pipeline stages or replicas of one position). A cluster whose switch joins everything has
one node.

Within a node NCCL switches protocol with the message, and so does this: a time is the least of three lines, one for
latency (LL), one for mid-size messages (LL128) and one for bandwidth (Simple), whose slopes are shares of the nominal
link rate; the last one also copies the own slice, except in an all-reduce, which works in place. Set on
aiconfigurator-core 0.12.0 nccl tables of H100 and A100 with 2 and 8 devices, half precision; 4 devices and H200, B200
and GB200 are predictions by the ratio of the data sheets (mean error 10-24 % over 512 B to 512 MB, the most of it below
64 KB, where H100 takes 5 and A100 and B200 9 us). Across nodes no table was at hand: rings over the NICs at the rate
that all-to-alls sustain, beside the part within the node, and a start that grows with the logarithm of the nodes.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from sim.hardware import LinkSpec, NicSpec
from sim.tokens import F64


class Fabric(Protocol):
    """The links of a cluster: within a node (or NVLink domain) and between nodes."""

    @property
    def intra_node(self) -> LinkSpec: ...

    @property
    def inter_node(self) -> NicSpec | None: ...


class _Lines(NamedTuple):
    """Start of every line (seconds, and per further rank and pass), what the later lines add, shares of nominal."""

    start_s: float
    rank_s: float
    mid_s: float
    bulk_s: float
    low_share: float
    mid_share: float
    bulk_share: float
    copy_share: float


_RING = _Lines(6.1e-6, 0.80e-6, 2.6e-6, 21.0e-6, 0.034, 0.317, 0.687, 2.59)
_ALL_TO_ALL = _Lines(8.0e-6, 0.23e-6, 4.6e-6, 24.3e-6, 0.006, 0.411, 0.699, 3.8)
# NVLS: a device puts its whole message on its link once and the reduced slice once. NCCL takes it from 8 ranks on; set
# between H100 (0.64 of nominal at 8 devices) and B200 (where a ring is nearly as fast).
_MULTICAST_SHARE, _MULTICAST_RANKS = 0.57, 8
# What a step between nodes costs besides the link's latency: proxy thread, flow control. From memory, no table.
_NODE_STEP_S = 3e-6


def all_gather_s(cluster: Fabric, n_ranks: int, message_bytes: npt.ArrayLike, ranks_per_node: int) -> F64:
    """Return the seconds of one all-gather whose result has ``message_bytes``; any shape, 0 for one rank or no bytes.

    Raises ValueError for counts below one, or where a group leaves its node and the cluster has no ``inter_node``.
    """
    return _time(cluster, n_ranks, message_bytes, ranks_per_node, _RING, passes=1, copies=True)


def reduce_scatter_s(cluster: Fabric, n_ranks: int, message_bytes: npt.ArrayLike, ranks_per_node: int) -> F64:
    """Return the seconds of one reduce-scatter of ``message_bytes`` per rank; otherwise as `all_gather_s`."""
    return _time(cluster, n_ranks, message_bytes, ranks_per_node, _RING, passes=1, copies=True)


def all_reduce_s(cluster: Fabric, n_ranks: int, message_bytes: npt.ArrayLike, ranks_per_node: int) -> F64:
    """Return the seconds of one all-reduce of ``message_bytes`` per rank; otherwise as `all_gather_s`."""
    return _time(cluster, n_ranks, message_bytes, ranks_per_node, _RING, passes=2, copies=False)


def all_to_all_s(cluster: Fabric, n_ranks: int, message_bytes: npt.ArrayLike, ranks_per_node: int) -> F64:
    """Return the seconds of NCCL's all-to-all, ``message_bytes`` sent by each rank in equal slices (own included).

    Across nodes each rank's NIC carries the slices for other nodes. Otherwise as `all_gather_s`.
    """
    return _time(cluster, n_ranks, message_bytes, ranks_per_node, _ALL_TO_ALL, passes=1, copies=True)


def point_to_point_s(cluster: Fabric, message_bytes: npt.ArrayLike, inter_node: bool = True) -> F64:
    """Return the seconds of one send and receive between two devices, over the NIC or (``inter_node=False``) NVLink."""
    link = _nic(cluster) if inter_node else cluster.intra_node
    size = _size(message_bytes)
    return np.where(size > 0, link.latency_s + _NODE_STEP_S + size / link.rate_bytes_per_s, 0.0)


def _size(message_bytes: npt.ArrayLike) -> F64:
    size = np.asarray(message_bytes, dtype=np.float64)
    if not (size.min(initial=0.0) >= 0 and size.max(initial=0.0) < np.inf):
        raise ValueError("message_bytes is negative or not finite")
    return size


def _nic(cluster: Fabric) -> NicSpec:
    if cluster.inter_node is None:
        raise ValueError("the group leaves its node, and the cluster has no inter_node link")
    return cluster.inter_node


def _time(
    cluster: Fabric,
    n_ranks: int,
    message_bytes: npt.ArrayLike,
    ranks_per_node: int,
    lines: _Lines,
    passes: int,
    copies: bool,
) -> F64:
    if n_ranks < 1 or ranks_per_node < 1:
        raise ValueError(f"n_ranks and ranks_per_node must be at least 1 [got {n_ranks} and {ranks_per_node}]")
    size, inner = _size(message_bytes), min(n_ranks, ranks_per_node)
    nodes = -(-n_ranks // inner)
    seconds = np.zeros_like(size)
    if inner > 1:
        seconds = _within(cluster.intra_node, inner, size, lines, passes, copies)
    if nodes > 1:
        nic = _nic(cluster)
        away = size * (nodes - 1) / nodes
        # A ring's bytes spread over the NICs of a node; a rank's slices for other nodes have its own NIC only.
        on_nic = away if lines is _ALL_TO_ALL else away / inner
        start = passes * math.ceil(math.log2(nodes)) * (nic.latency_s + _NODE_STEP_S)
        # Chunks are on both kinds of link at once.
        seconds = start + np.maximum(seconds, lines.start_s + passes * on_nic / nic.rate_bytes_per_s)
    return np.where((size > 0) & (n_ranks > 1), seconds, 0.0)


def _within(link: LinkSpec, n: int, size: F64, lines: _Lines, passes: int, copies: bool) -> F64:
    rate, wire = link.bandwidth_bytes_per_s, passes * (n - 1) / n * size
    start = lines.start_s + passes * (n - 1) * lines.rank_s
    low = wire / (lines.low_share * rate)
    mid = lines.mid_s + wire / (lines.mid_share * rate)
    bulk = lines.bulk_s + wire / (lines.bulk_share * rate)
    if copies:
        bulk = bulk + size / n / (lines.copy_share * rate)
    best = np.minimum(np.minimum(low, mid), bulk)
    if passes == 2 and link.multicast and n >= _MULTICAST_RANKS:
        best = np.minimum(best, lines.bulk_s + (1 + 1 / n) * size / (_MULTICAST_SHARE * rate))
    seconds: F64 = start + best
    return seconds
