"""Collectives of tensor and data parallelism, and hops of pipeline parallelism: seconds, pure functions, no clock.

``message_bytes`` is NCCL's size: the buffer that every rank holds whole. All-reduce: what each rank contributes and
gets back. All-gather: the gathered result. Reduce-scatter: the input of each rank. All-to-all: what each rank sends,
its own slice included. Point to point: the message.

A cluster is anything with ``intra_node`` and ``inter_node`` (`sim.cluster.Cluster` is). Groups of ``n_ranks`` hold
``ranks_per_node`` ranks of every node they reach, one NIC each: 8 for data parallelism over whole nodes, 1 where every
member sits on another node (pipeline stages or replicas of one position).
"""

from __future__ import annotations

from typing import Protocol

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


def all_gather_s(cluster: Fabric, n_ranks: int, message_bytes: npt.ArrayLike, ranks_per_node: int) -> F64:
    """Return the seconds of one all-gather whose result has ``message_bytes``; any shape, 0 for one rank."""
    return _ring(cluster, n_ranks, message_bytes, ranks_per_node, 1)


def reduce_scatter_s(cluster: Fabric, n_ranks: int, message_bytes: npt.ArrayLike, ranks_per_node: int) -> F64:
    """Return the seconds of one reduce-scatter of ``message_bytes`` per rank; any shape, 0 for one rank."""
    return _ring(cluster, n_ranks, message_bytes, ranks_per_node, 1)


def all_reduce_s(cluster: Fabric, n_ranks: int, message_bytes: npt.ArrayLike, ranks_per_node: int) -> F64:
    """Return the seconds of one all-reduce of ``message_bytes`` per rank; any shape, 0 for one rank."""
    return _ring(cluster, n_ranks, message_bytes, ranks_per_node, 2)


def all_to_all_s(cluster: Fabric, n_ranks: int, message_bytes: npt.ArrayLike, ranks_per_node: int) -> F64:
    """Return the seconds of NCCL's all-to-all, ``message_bytes`` sent by each rank in equal slices (own included)."""
    return _ring(cluster, n_ranks, message_bytes, ranks_per_node, 1)


def point_to_point_s(cluster: Fabric, message_bytes: npt.ArrayLike, inter_node: bool = True) -> F64:
    """Return the seconds of one send and receive between two devices, over the NIC or (``inter_node=False``) NVLink."""
    link = _link(cluster, inter_node)
    return np.asarray(link.latency_s + np.asarray(message_bytes, dtype=np.float64) / link.rate_bytes_per_s)


def _link(cluster: Fabric, inter_node: bool) -> LinkSpec:
    if not inter_node:
        return cluster.intra_node
    if cluster.inter_node is None:
        raise ValueError("the cluster has no inter_node link: a group of this size does not fit one NVLink domain")
    return cluster.inter_node


def _ring(cluster: Fabric, n_ranks: int, message_bytes: npt.ArrayLike, ranks_per_node: int, passes: int) -> F64:
    size = np.asarray(message_bytes, dtype=np.float64)
    if n_ranks == 1:
        return np.zeros_like(size)
    link = _link(cluster, n_ranks > ranks_per_node)
    share = (n_ranks - 1) / n_ranks
    return np.asarray(passes * ((n_ranks - 1) * link.latency_s + share * size / link.rate_bytes_per_s))
