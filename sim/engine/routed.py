"""Seconds of the routed part of an MoE layer (dispatch, experts, combine), by the tokens that ranks bring.

Batches are drawn from a `Pool`, sent through placement and replicas, counted, and timed by the cost laws on a grid of
sizes; between them times are linear. Sizes are filled in when they are first asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import numpy as np

from sim.cost import Direction, Mode
from sim.cost.elementwise import permute_s, swiglu_s
from sim.engine.routed_counts import demand, reach, scaled
from sim.exchange import token_bytes
from sim.hardware import Device
from sim.kernels.choose import Kernels, choose
from sim.model import Model
from sim.network import Network
from sim.pool import Kind, Pool
from sim.replicas import ReplicaChoice, compiled
from sim.settings import Cost
from sim.slots import Slots
from sim.tally import spread
from sim.tokens import F64, I16, I32, I64, Bool

DISPATCH, EXPERTS, COMBINE = 0, 1, 2
LOOKED_AT = 1024
"""Tokens of a rank whose copies per rank and node are counted one by one; of more, as many in even steps."""
EXACT = 512
"""Tokens per rank up to which balanced batches are timed at every size."""
_WORTH_COMPILING = 2000
"""Sources times layers counted after which Numba is loaded for the rest; the counts do not differ."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one batch: seconds [3, L] of dispatch, experts and combine on the slowest rank, and max over mean tokens of the
    ranks' experts, mean over layers."""

    seconds: F64
    imbalance: float


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One expert-parallel group in one state (P ranks, L sampled layers, S slots).

    maps: [L, S] int32 ``physical_to_logical_map``, -1 in slots that hold nothing. compute: [P] factors on compute
    times. alive: [P]. ports: [P] factors by which a rank's links are slower.
    """

    slots: Slots
    maps: I32
    compute: F64
    ports: F64
    alive: Bool


def slowed_network(network: Network, ports: F64) -> Network:
    """Return ``network`` with the first and last link of every route of rank r ``ports[r]`` [P] times slower."""
    if (ports == 1).all():
        return network
    rate = network.link_bandwidth_bytes_per_s.copy()
    for rank in np.flatnonzero(ports != 1).tolist():
        out, into = network.paths[rank], network.paths[:, rank]
        last = np.maximum((into >= 0).sum(axis=-1) - 1, 0)
        touched = np.union1d(out[:, 0], np.take_along_axis(into, last[:, None], axis=-1))
        touched = touched[touched >= 0]
        rate[touched] = network.link_bandwidth_bytes_per_s[touched] / ports[rank]
    return replace(network, link_bandwidth_bytes_per_s=rate)


class RoutedTimes:
    """The routed layers of ``model`` for one group and one pool.

    overlapped: whether compute and communication run at the same time. sm_fraction: share of the SMs left to compute.
    usual: [topics] shares of the traffic's topics.
    """

    def __init__(
        self,
        pool: Pool,
        group: Group,
        network: Network | None,
        *,
        model: Model,
        device: Device,
        cost: Cost,
        mode: Mode,
        replicas: ReplicaChoice,
        overlapped: bool,
        sm_fraction: float,
        usual: F64,
    ) -> None:
        self.pool, self.group, self.model, self.device = pool, group, model, device
        self.cost, self.mode, self.replicas = cost, mode, replicas
        self.overlapped, self.sm_fraction = overlapped, sm_fraction
        self.network = None if network is None else slowed_network(network, group.ports)
        self.sources = np.flatnonzero(group.alive)
        self.layers = range(len(pool.layers))
        self.kernels: Kernels = choose(0)
        self.mixtures = _mixtures(usual if len(usual) == pool.n_topics else np.ones(1))
        self._seen = 0
        self._known: dict[tuple[Kind, int, int, int], Timing] = {}
        self._lines: dict[tuple[Kind, int, int, int, int], tuple[F64, F64, float, float]] = {}
        self._leads: dict[tuple[int, int, int], tuple[F64, F64]] = {}

    def mixture(self, topic_tokens: I64) -> int:
        """Return the number of the mixture that is nearest to ``topic_tokens`` [topics]."""
        total = int(topic_tokens.sum())
        if len(self.mixtures) == 1 or not total:
            return 0
        shares = topic_tokens / total
        return int(np.abs(self.mixtures - shares).sum(axis=1).argmin())

    def at(self, kind: Kind, mixture: int, draw: int, mean: float, most: float) -> Timing:
        """Return the times of draw ``draw``; see `each`."""
        return self.each(kind, mixture, (draw,), mean, most)[0]

    def each(self, kind: Kind, mixture: int, draws: Iterable[int], mean: float, most: float) -> list[Timing]:
        """Return the times of several draws where ranks bring ``mean`` tokens on average and ``most`` at most.

        A rank that brings more than others sends more: the exchange takes no less than one of evenly loaded experts in
        which one rank brings that much. Ranks without requests run a token of padding, so no mean is below 1.
        """
        # Perfectly even loads all step to the next tile of rows at once, which no straight line follows.
        low, high = (max(1, round(mean)),) * 2 if self.pool.balanced and mean <= EXACT else grid(mean)
        share = mean - low if high > low else 0.0
        sent = self._sent(mean, most) if most > mean and self.network is not None else None
        found = []
        for draw in draws:
            left, slope, imbalance, rise = self._line((kind, mixture, draw), low, high)
            seconds = left + share * slope
            if sent is not None:
                exchange = seconds[DISPATCH :: COMBINE - DISPATCH]
                np.maximum(exchange, sent, out=exchange)
            found.append(Timing(seconds, imbalance + share * rise))
        return found

    def _line(self, draw: tuple[Kind, int, int], low: int, high: int) -> tuple[F64, F64, float, float]:
        """Return the times at ``low`` and what each token more adds on the way to ``high``; imbalance likewise."""
        key = (*draw, low, high)
        if key not in self._lines:
            left, right = self._timing(*draw, low), self._timing(*draw, high)
            step = max(1, high - low)
            self._lines[key] = (
                left.seconds,
                (right.seconds - left.seconds) / step,
                left.imbalance,
                (right.imbalance - left.imbalance) / step,
            )
        return self._lines[key]

    def _timing(self, kind: Kind, mixture: int, draw: int, tokens_per_rank: int) -> Timing:
        key = kind, mixture, draw, tokens_per_rank
        if key not in self._known:
            self._known[key] = self.direct(kind, self.mixtures[mixture], draw, tokens_per_rank)
        return self._known[key]

    def direct(self, kind: Kind, shares: F64, draw: int, tokens_per_rank: int) -> Timing:
        """Return the times of one batch, counted and timed as it is."""
        ids = self.pool.batch(kind, shares, draw, len(self.sources), tokens_per_rank)
        return self.timed(ids)

    def timed(self, ids: I16 | Sequence[list[I16]]) -> Timing:
        """Return the times of a batch with experts ``ids`` [L][source] [n, k] of the ranks alive."""
        slots, seconds = self.group.slots, np.zeros((3, len(self.layers)))
        ranks, nodes = [], []
        loads = np.zeros((len(self.layers), slots.ep_size, slots.slots_per_rank))
        for layer in self.layers:
            rank_tokens, node_tokens, loads[layer] = self._counted(ids[layer], self.group.maps[layer])
            ranks.append(rank_tokens)
            nodes.append(node_tokens)
        pairs = loads.sum(axis=-1)
        live = pairs[:, self.sources]
        imbalance = live.max(axis=1) / np.maximum(live.mean(axis=1), 1e-300)
        seconds[EXPERTS] = (self.experts_s(loads) * self.group.compute).max(axis=-1)
        if self.network is not None:
            seconds[[DISPATCH, COMBINE]] = self._transfers(np.stack(ranks), np.stack(nodes))
        return Timing(seconds, float(imbalance.mean()))

    def _counted(self, ids: I16 | list[I16], physical_to_logical_map: I32) -> tuple[F64, F64, F64]:
        """Return tokens sent [P, P] and per node [P, N] (in the sense of ``mode``), and [P, slots per rank] received."""
        slots, experts, compiled = self.group.slots, self.pool.n_routed_experts, self._compiled()
        sizes = [len(chosen) for chosen in ids]
        first, together = np.cumsum([0, *sizes]), np.concatenate(ids)
        asked: I64 = np.zeros((slots.ep_size, experts), dtype=np.int64)
        asked[self.sources] = demand(together, first, experts, compiled=compiled)
        quota = self._quotas(asked, physical_to_logical_map)
        pairs = quota.reshape(slots.ep_size, slots.ep_size, slots.slots_per_rank).sum(axis=-1)
        received = quota.sum(axis=0).reshape(slots.ep_size, slots.slots_per_rank).astype(np.float64)
        nodes = np.zeros((slots.ep_size, slots.n_nodes))
        if self.mode == "low_latency" or self.network is None:
            return pairs.astype(np.float64), nodes, received
        quota, scale = quota[self.sources], np.ones((len(sizes), 1))
        if max(sizes) > LOOKED_AT and not self.pool.balanced:
            looked = [spread(size, LOOKED_AT) for size in sizes]
            together = together[np.concatenate([start + some for start, some in zip(first[:-1], looked, strict=True)])]
            first = np.cumsum([0, *map(len, looked)])
            shown = demand(together, first, experts, compiled=compiled)
            quota = scaled(quota, asked[self.sources], shown, physical_to_logical_map)
            scale = np.array([size / max(1, len(some)) for size, some in zip(sizes, looked, strict=True)])[:, None]
        ranks = np.zeros((slots.ep_size, slots.ep_size))
        reached, at_nodes = reach(together, first, quota, physical_to_logical_map, slots, compiled=compiled)
        ranks[self.sources], nodes[self.sources] = reached * scale, at_nodes * scale
        return ranks, nodes, received

    def _compiled(self) -> bool:
        self._seen += len(self.sources)
        return self._seen > _WORTH_COMPILING and compiled()

    def _quotas(self, demand: I64, physical_to_logical_map: I32) -> I64:
        held = np.bincount(physical_to_logical_map[physical_to_logical_map >= 0], minlength=demand.shape[1])
        if held.max(initial=0) > 1:
            return self.replicas.quotas(demand, physical_to_logical_map, self.group.slots)
        padded = np.concatenate([demand, np.zeros_like(demand[:, :1])], axis=1)
        return cast(I64, padded[:, physical_to_logical_map])  # -1 reads the column of zeros

    def experts_s(self, slot_tokens: F64) -> F64:
        """Seconds [..., P] of ranks whose experts get ``slot_tokens`` [..., P, slots per rank]: products, activation, and
        in normal mode the permutation around them; low-latency kernels deliver tokens in expert order."""
        model, pairs = self.model, slot_tokens.sum(axis=-1)
        hidden, width = model.dispatch_hidden_size, model.moe_intermediate_size or 0
        compute, dtype = self.cost.compute, self.cost.gemm_dtype
        seconds = compute.grouped_gemm_s(
            self.device,
            expert_tokens=slot_tokens,
            ep_tokens=pairs,
            hidden_size=hidden,
            moe_intermediate_size=width,
            dtype=dtype,
            sm_fraction=self.sm_fraction,
            products_only=True,
        )
        seconds = seconds + swiglu_s(compute, self.device, pairs=pairs, moe_intermediate_size=width, dtype=dtype)
        if self.mode == "normal":
            seconds = seconds + permute_s(compute, self.device, pairs=pairs, hidden_size=hidden, dtype=dtype)
        return np.where(pairs > 0, seconds, 0.0)

    def _transfers(self, ranks: F64, nodes: F64) -> F64:
        """Return [2, ...] seconds of the last arrival of dispatch and combine for tokens [..., P, P] and [..., P, N]."""
        assert self.network is not None
        law, found = self.cost.communication, []
        directions: tuple[Direction, Direction] = ("dispatch", "combine")
        for direction, dtype in zip(directions, (self.cost.dispatch_dtype, self.cost.combine_dtype), strict=True):
            seconds, _ = law.pair_times_s(
                self.network,
                rank_tokens=ranks,
                node_tokens=nodes,
                bytes_per_token=token_bytes(self.model.dispatch_hidden_size, dtype),
                mode=self.mode,
                direction=direction,
                slowdown=law.overlap_slowdown(direction, self.mode) if self.overlapped else 1.0,
            )
            found.append(seconds.max(axis=(-1, -2)))
        return np.stack(found)

    def _sent(self, mean: float, most: float) -> F64:
        """Return [2, 1] seconds of dispatch and combine that one rank with ``most`` tokens sets."""
        low, high = grid(most)
        lead = round(4 * math.log2(most / mean))
        key = low, high, lead
        if key not in self._leads:
            left, right = self._led(low, lead), self._led(high, lead)
            self._leads[key] = left, (right - left) / max(1, high - low)
        left, slope = self._leads[key]
        return left + (most - low) * slope

    def _led(self, most: int, lead: int) -> F64:
        """Return [2, 1] seconds of dispatch and combine if one rank brings ``most`` tokens and the others 2^(lead / 4) times
        less, for evenly loaded ranks."""
        slots, alive = self.group.slots, self.group.alive.astype(np.float64)
        targets = alive / alive.sum()
        by_node = np.add.reduceat(targets, np.arange(0, slots.ep_size, slots.ranks_per_node))
        copies, at_nodes = self._reach
        sources = alive[:, None] * (most / 2 ** (lead / 4))
        sources[self.sources[0]] = most
        return self._transfers(sources * copies * targets, sources * at_nodes * by_node)[:, None]

    @cached_property
    def _reach(self) -> tuple[float, float]:
        """Copies of a token to ranks (in the sense of ``mode``) and to nodes, mean over the pool."""
        slots, shelf = self.group.slots, self.pool.decode
        chosen = shelf.ids[:, spread(shelf.ids.shape[1], LOOKED_AT)]
        n = chosen.shape[0] * chosen.shape[1]
        if self.mode == "low_latency":
            return np.count_nonzero(chosen >= 0) / n, 0.0
        ranks = nodes = 0
        for ids, held in zip(chosen, self.group.maps, strict=True):
            first = np.zeros(self.pool.n_routed_experts, dtype=np.int32)
            there = np.flatnonzero(held >= 0)[::-1]
            first[held[there]] = slots.slot_rank[there]  # of several slots the first
            ranks += self.kernels.distinct_groups(ids, first, slots.ep_size)
            nodes += self.kernels.distinct_groups(ids, (first // slots.ranks_per_node).astype(np.int32), slots.n_nodes)
        return ranks / n, nodes / n


def grid(tokens: float) -> tuple[int, int]:
    """Return the neighbours of ``tokens`` among 1, 2, 3, 4, 6, 8, 12, 16, ...; equal where it is one of them.

    >>> grid(5.0), grid(8.0), grid(0.3)
    ((4, 6), (8, 8), (1, 1))
    """
    if tokens <= 1:
        return 1, 1
    power = 1 << (int(tokens).bit_length() - 1)
    low = power if power == 1 or tokens < power * 3 // 2 else power * 3 // 2
    if low == tokens:
        return low, low
    return low, 2 * power if low != power else max(power * 3 // 2, power + 1)


def _mixtures(usual: F64) -> F64:
    """[n, topics]: the usual mixture, and the ways from it to each topic alone, in quarters."""
    if len(usual) == 1:
        return usual[None]
    found = [usual]
    for step in (0.25, 0.5, 0.75, 1.0):
        found += [(1 - step) * usual + step * one for one in np.eye(len(usual))]
    return np.array(found)
