"""Seconds of the expert-parallel part of a step: dispatch, experts, combine, and who waits for whom."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from sim.advice import Serving, Setup
from sim.cluster import build_network
from sim.cost import Direction, Mode
from sim.exchange import token_bytes
from sim.kernels.choose import choose
from sim.replicas import ReplicaChoice, assign
from sim.slots import Slots
from sim.tokens import F64, I16, I32, I64


class Timed(NamedTuple):
    """One batch: seconds [L] of each layer, of its busiest rank's experts [L], and pairs [L, P] of each rank's experts."""

    layer_s: F64
    experts_s: F64
    pairs: I64


class Clock:
    """Times batches of one phase. ``kernels``: work of this many tokens x layers x plans is to come."""

    def __init__(self, setup: Setup, phase: Serving, work: int = 0) -> None:
        self.setup = setup
        self.mode: Mode = setup.mode or ("low_latency" if phase == "decode" else "normal")
        self.network = build_network(setup.cluster, setup.ep_size)
        self.node = (np.arange(setup.ep_size) // self.network.ranks_per_node).astype(np.int32)
        self.kernels = choose(work)

    @cached_property
    def wire_bytes(self) -> tuple[int, int]:
        """Bytes of a token's dispatch and combine."""
        hidden, cost = self.setup.model.dispatch_hidden_size, self.setup.cost
        return token_bytes(hidden, cost.dispatch_dtype), token_bytes(hidden, cost.combine_dtype)

    def step(self, ids: I16, maps: I32, slots: Slots, replicas: ReplicaChoice) -> Timed:
        """Return the times of one batch with ids [L, P, T, k] under maps [L, S]."""
        layers, ranks = ids.shape[:2]
        sent = np.zeros((layers, ranks, ranks), dtype=np.int64)
        to_nodes = np.zeros((layers, ranks, self.network.n_nodes), dtype=np.int64)
        slot_tokens = np.zeros((layers, slots.n_slots), dtype=np.int64)
        for layer in range(layers):
            sent[layer], to_nodes[layer], slot_tokens[layer] = self._counts(ids[layer], maps[layer], slots, replicas)
        by_slot = slot_tokens.reshape(layers, ranks, -1)
        setup, wire = self.setup, self.wire_bytes
        pairs = by_slot.sum(axis=-1)
        experts = setup.cost.compute.grouped_gemm_s(
            setup.cluster.device,
            expert_tokens=by_slot,
            ep_tokens=sent.sum(axis=-2),
            hidden_size=setup.model.dispatch_hidden_size,
            moe_intermediate_size=setup.model.moe_intermediate_size or 0,
            dtype=setup.cost.gemm_dtype,
        )
        experts = np.where(pairs > 0, experts, 0.0)
        seconds = chain_s(
            self._transfer(sent, to_nodes, wire[0], "dispatch"),
            experts,
            self._transfer(sent, to_nodes, wire[1], "combine"),
        )
        return Timed(seconds + replicas.seconds(slots), experts.max(axis=-1), pairs)

    def _counts(self, ids: I16, there: I32, slots: Slots, replicas: ReplicaChoice) -> tuple[I64, I64, I64]:
        """Return of one layer, ids [P, T, k], what each source sends to ranks [P, P] and nodes [P, N], and tokens [S]."""
        ranks, experts = len(ids), slots.n_routed_experts
        at = ids.reshape(ranks, -1).astype(np.int64) + experts * np.arange(ranks)[:, None]
        demand = np.bincount(at.ravel(), minlength=ranks * experts).reshape(ranks, experts)
        single = slots.num_redundant_experts == 0
        quota = demand[:, there] if single else replicas.quotas(demand, there, slots)
        nodes = self.network.n_nodes
        if self.mode == "low_latency":
            return quota.reshape(ranks, ranks, -1).sum(axis=-1), np.zeros((ranks, nodes), np.int64), quota.sum(axis=0)
        slot_of = np.argsort(there, kind="stable").astype(np.int16)
        to_rank, to_node = np.empty((ranks, ranks), np.int64), np.empty((ranks, nodes), np.int64)
        slot_rank, slot_node = slots.slot_rank, self.node[slots.slot_rank]
        for source in range(ranks):
            chosen = slot_of[ids[source]] if single else assign(ids[source], quota[source], there)
            to_rank[source] = self.kernels.group_tokens(chosen, slot_rank, ranks)
            to_node[source] = self.kernels.group_tokens(chosen, slot_node, nodes)
        return to_rank, to_node, quota.sum(axis=0)

    def _transfer(self, sent: I64, to_nodes: I64, size: int, direction: Direction) -> F64:
        """Return [L, P, P] seconds from source to expert's rank, minus infinity where nothing travels."""
        seconds, reaches = self.setup.cost.communication.pair_times_s(
            self.network,
            rank_tokens=sent,
            node_tokens=to_nodes,
            bytes_per_token=size,
            mode=self.mode,
            direction=direction,
        )
        return np.where(reaches, seconds, -np.inf)


def chain_s(dispatch: F64, experts: F64, combine: F64) -> F64:
    """Return [...] seconds until the last token is home, all ranks starting together.

    dispatch, combine: [..., P, P] by token's owner and expert's rank, minus infinity where nothing travels; experts:
    [..., P]. A rank computes when all that it gets has arrived, and answers when it has computed.

    >>> nothing = -np.inf
    >>> one_way = np.array([[nothing, 2.0], [nothing, nothing]])
    >>> float(chain_s(one_way, np.array([1.0, 4.0]), one_way + 1.0))
    9.0
    """
    arrived = np.maximum(dispatch.max(axis=-2), 0.0)
    done = arrived + experts
    home = (done[..., None, :] + combine).max(axis=-1)
    seconds: F64 = np.maximum(done, home).max(axis=-1)
    return seconds
