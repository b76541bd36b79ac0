"""A 2D or 3D torus of devices without switches, as TPU pods are (TPU v4, arXiv 2304.01433)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from sim.cluster import Cable, Cluster, Topology


class Torus(Topology):
    """Each device has two ports per dimension, which share its ``intra_node`` bandwidth evenly.

    shape: devices per dimension, ranks count up in the last one. Along a dimension of two both ports go to the same
    neighbour, one cable of twice the rate. Routes take the dimensions in order, each the shorter way round; half-way
    round, even coordinates go up and odd ones down. The whole torus is one domain: nothing is forwarded by software.
    """

    kind: Literal["torus"] = "torus"
    shape: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1, max_length=3)]

    def cables(self, cluster: Cluster) -> Iterator[Cable]:
        if math.prod(self.shape) != cluster.n_devices:
            raise ValueError(
                f"torus {' x '.join(map(str, self.shape))} has {math.prod(self.shape)} devices, cluster {cluster.name} "
                f"{cluster.n_devices}"
            )
        inner = cluster.intra_node
        rate = inner.rate_bytes_per_s / (2 * max(1, sum(size > 1 for size in self.shape)))
        for rank, at in enumerate(itertools.product(*map(range, self.shape))):
            for axis, size in enumerate(self.shape):
                # The last device of a ring closes it; a ring of two is closed already.
                if size > 2 or (size == 2 and at[axis] == 0):
                    ahead = self._rank([(x + 1) % size if i == axis else x for i, x in enumerate(at)])
                    width = 2 if size == 2 else 1
                    yield Cable(f"gpu:{rank}", f"gpu:{ahead}", rate * width, inner.latency_s, inner.kind)

    def _rank(self, at: list[int]) -> int:
        rank = 0
        for x, size in zip(at, self.shape, strict=True):
            rank = rank * size + x
        return rank

    def domain(self, cluster: Cluster) -> int:
        return cluster.n_devices

    def part(self, cluster: Cluster, n_devices: int) -> Cluster:
        # Routes wrap around over devices outside the group.
        return cluster

    def route(self, cluster: Cluster, source: int, target: int) -> list[str]:
        at: list[int] = []
        goal: list[int] = []
        for size in reversed(self.shape):
            source, x = divmod(source, size)
            target, y = divmod(target, size)
            at.insert(0, x)
            goal.insert(0, y)
        nodes = [f"gpu:{self._rank(at)}"]
        for axis, size in enumerate(self.shape):
            ahead = (goal[axis] - at[axis]) % size
            up = 2 * ahead < size or (2 * ahead == size and at[axis] % 2 == 0)
            for _ in range(min(ahead, size - ahead)):
                at[axis] = (at[axis] + (1 if up else -1)) % size
                nodes.append(f"gpu:{self._rank(at)}")
        return nodes
