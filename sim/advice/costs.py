"""What balancing costs: bytes that move, the time they take, and cache that replicas displace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sim.advice import Setup
from sim.advice.clock import Clock
from sim.cost.memory import serving_memory_bytes
from sim.hardware import BYTES_PER_ELEMENT
from sim.placement import moves
from sim.slots import Slots
from sim.tokens import I32

_UTILIZATION = 0.9
"""Share of device memory for weights, activations and cache (the default of vLLM's gpu_memory_utilization)."""


def expert_bytes(setup: Setup) -> float:
    """Return the bytes of one expert of one layer."""
    return setup.model.expert_parameters * BYTES_PER_ELEMENT[setup.cost.gemm_dtype]


@dataclass(frozen=True, slots=True)
class Move:
    """A rebalance over all MoE layers: experts sent from rank to rank, their bytes, seconds on the links."""

    slots: float
    bytes: float
    seconds: float


def move(setup: Setup, clock: Clock, before: I32, after: I32, slots: Slots) -> Move:
    """Return what it takes to get from ``before`` [L, S0] to ``after`` [L, S], layer by layer; the L layers stand for all.

    A map of fewer slots (before redundant experts) counts as that: the new slots are filled like any other.
    """
    sent = np.stack([moves(a, b, slots) for a, b in zip(before, after, strict=True)])
    each = float(sent.sum(axis=(-1, -2)).mean())
    size = expert_bytes(setup)
    seconds, _ = setup.cost.communication.pair_times_s(
        clock.network,
        rank_tokens=sent,
        node_tokens=np.zeros((len(sent), slots.ep_size, clock.network.n_nodes)),
        bytes_per_token=size,
        mode="low_latency",
    )
    layers = setup.model.n_moe_layers
    return Move(each * layers, each * layers * size, float(seconds.max(axis=(-1, -2)).mean()) * layers)


@dataclass(frozen=True, slots=True)
class Cache:
    """Memory of one rank. replica_bytes: of its redundant experts. tokens: cache that is left; negative: it does not fit.
    batch_share: sequences that still fit, as a share of those asked for."""

    replica_bytes: float
    tokens: float
    batch_share: float


def cache(setup: Setup, num_redundant_experts: int, sequences: int) -> Cache:
    """Return what a rank with ``num_redundant_experts`` / ep_size extra slots in every layer can cache.

    Everything but experts is held by every rank (data-parallel attention). sequences: requests of ``setup.context`` tokens
    that are to fit; 0 where a batch is not short of cache, as in prefill.
    """
    model, ranks = setup.model, setup.ep_size
    extra = num_redundant_experts / ranks * model.expert_parameters * model.n_moe_layers
    element = BYTES_PER_ELEMENT[setup.cost.gemm_dtype]
    used = serving_memory_bytes(
        dense_parameters=model.total_parameters - model.parameters.routed_experts,
        expert_parameters=model.parameters.routed_experts / ranks + extra,
        dense_weight_bytes=element,
        expert_weight_bytes=element,
    )["total"]
    room = _UTILIZATION * setup.cluster.device.memory_bytes - used
    tokens = room / model.kv_cache_bytes_per_token()
    if setup.cache_tokens is not None:
        tokens = setup.cache_tokens(num_redundant_experts)
    share = min(1.0, max(0.0, tokens) / (sequences * setup.context)) if sequences else 1.0
    return Cache(extra * element, tokens, share)


def rebalance_s(setup: Setup, moved: Move, communication_share: float) -> float:
    """Return seconds that one rebalance takes from serving.

    In a stall, solver and moves. In the background the host plans beside the device, and the moves share the links: for
    ``communication_share`` of the time that they take, dispatch and combine would have had them alone.
    """
    return setup.solver_s + moved.seconds if setup.stall else moved.seconds * communication_share
