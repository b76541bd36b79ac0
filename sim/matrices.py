"""Traffic matrices: the bytes of a step by pair of ranks, by pair of nodes and by link, as tidy tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sim.cluster import build_network
from sim.cost.flows import link_bytes
from sim.exchange import Exchange, token_bytes
from sim.network import Network
from sim.scenario import Scenario
from sim.settings import Policy
from sim.tally import Counts
from sim.tokens import F64

Table = dict[str, list[Any]]


def traffic_tables(scenario: Scenario, counts: Mapping[tuple[int, int], list[Counts]]) -> dict[str, Table]:
    """Return the tables ``pairs``, ``node_pairs`` and ``links`` of every policy's and replica's last step.

    All MoE layers, micro-batches and passes together. pairs: dispatch_bytes that source sends for destination's experts
    and combine_bytes that come back; what stays on the device is listed with them. node_pairs: the same between nodes, as
    it crosses (normal mode: one copy per token and node). links: bytes over every link and direction, and busy_s, the
    time that they take at its rate.
    """
    tables: dict[str, Table] = {"pairs": {}, "node_pairs": {}, "links": {}}
    if not scenario.steps.record_traffic:
        return {}
    for (replica, index), layers in sorted(counts.items(), key=lambda item: (item[0][1], item[0][0])):
        policy = scenario.policies[index]
        network = build_network(scenario.cluster, scenario.parallel_of(policy).ep_size)
        total = Exchange.sum([e for layer in layers for e in layer.exchanges[scenario.steps.count - 1]])
        head = {"policy": policy.name, "replica": replica}
        for name, columns in _columns(scenario, policy, network, total).items():
            n = len(next(iter(columns.values())))
            for key, values in {**{k: [v] * n for k, v in head.items()}, **columns}.items():
                tables[name].setdefault(key, []).extend(values)
    return tables


def node_matrix(exchange: Exchange, ranks_per_node: int, low_latency: bool) -> F64:
    """Return [N, N] copies of tokens from node to node in one dispatch, its own node included."""
    starts = np.arange(0, len(exchange.rank_tokens), ranks_per_node)
    if low_latency:
        between: F64 = np.add.reduceat(np.add.reduceat(exchange.pairs, starts, axis=0), starts, axis=1)
        return between.astype(np.float64)
    crossing: F64 = np.add.reduceat(exchange.node_tokens, starts, axis=0)
    return crossing.astype(np.float64)


def _columns(scenario: Scenario, policy: Policy, network: Network, total: Exchange) -> dict[str, dict[str, list[Any]]]:
    cost, hidden = scenario.cost, scenario.model_of(policy).dispatch_hidden_size
    passes = 2 if scenario.schedule.phase == "training" else 1
    there = passes * token_bytes(hidden, cost.dispatch_dtype)
    back = passes * token_bytes(hidden, cost.combine_dtype)
    sent = total.sent(cost.mode).astype(np.float64)
    nodes = node_matrix(total, network.ranks_per_node, cost.mode == "low_latency")
    on_links = link_bytes(network, rank_tokens=sent, node_tokens=total.node_tokens, bytes_per_token=1.0, mode=cost.mode)
    # Links come in pairs, one for each direction: the combine takes the other one.
    bytes_ = on_links * there + on_links.reshape(-1, 2)[:, ::-1].ravel() * back
    return {
        "pairs": _pairs("source", "destination", sent, there, back),
        "node_pairs": _pairs("source_node", "destination_node", nodes, there, back),
        "links": {
            "link": list(network.link_names),
            "link_kind": list(network.link_kind),
            "bytes": bytes_.tolist(),
            "busy_s": (bytes_ / network.link_bandwidth_bytes_per_s).tolist(),
        },
    }


def _pairs(source: str, destination: str, copies: F64, there: float, back: float) -> dict[str, list[Any]]:
    s, d = np.indices(copies.shape)
    return {
        source: s.ravel().tolist(),
        destination: d.ravel().tolist(),
        "dispatch_bytes": (copies * there).ravel().tolist(),
        "combine_bytes": (copies * back).ravel().tolist(),
    }
