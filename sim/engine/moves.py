"""What moving experts costs: their weights over the network that the exchange uses too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.hardware import BYTES_PER_ELEMENT
from sim.network import Network
from sim.scenario import Scenario
from sim.settings import Policy
from sim.tokens import I64


@dataclass(frozen=True, slots=True)
class Moves:
    """One new placement of all layers. moved_bytes: over links, of all ranks. transfer_s: until the last has arrived."""

    moved_bytes: float
    transfer_s: float


def expert_bytes(scenario: Scenario, policy: Policy) -> float:
    """Bytes of one routed expert's weights as they are served."""
    return scenario.model_of(policy).expert_parameters * BYTES_PER_ELEMENT[scenario.cost.gemm_dtype]


def chunk_s(scenario: Scenario, policy: Policy, network: Network, sent: I64) -> float:
    """Return seconds until the last of the experts ``sent`` [P, P] from rank to rank has arrived: one direct exchange."""
    times, _ = scenario.cost.communication.pair_times_s(
        network,
        rank_tokens=sent,
        node_tokens=np.zeros((network.n_ranks, network.n_nodes)),
        bytes_per_token=expert_bytes(scenario, policy),
        mode="low_latency",
    )
    return float(times.max())


def transfer(scenario: Scenario, policy: Policy, network: Network, layers: Sequence[I64]) -> Moves:
    """Return what sending experts ``layers`` ([P, P] from rank to rank, of every layer) takes.

    ``policy.rebalance.layers_per_chunk`` layers go at a time, one chunk after another, each as one direct exchange under
    the scenario's communication cost.
    """
    size, chunk = expert_bytes(scenario, policy), policy.rebalance.layers_per_chunk
    seconds = 0.0
    for start in range(0, len(layers), chunk):
        sent = np.sum(layers[start : start + chunk], axis=0)
        if sent.any():
            seconds += chunk_s(scenario, policy, network, sent)
    return Moves(float(sum(int(sent.sum()) for sent in layers)) * size, seconds)
