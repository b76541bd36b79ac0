"""Policies x replicas of a run that serves requests: every one serves the same requests, in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sim.deployment import Unit
from sim.engine.recording import RecordedService
from sim.engine.serving import Finished, Sizes, World
from sim.engine.serving.experts import Experts
from sim.engine.serving.recorded import recorded_service
from sim.engine.serving.tables import Tables
from sim.estimate import Estimate
from sim.results import Result, Table, summarise
from sim.scenario import Scenario
from sim.settings import Policy
from sim.unitmemory import kv_cache_tokens, unit_memory
from sim.workers import Workers, processes, watched


@dataclass(frozen=True)
class _Job:
    scenario: Scenario
    policy: int
    replica: int
    record: bool


def sizes_of(scenario: Scenario, policy: Policy, unit: Unit) -> Sizes:
    """What ``unit`` comes down to under ``policy``. Caches go from unit to unit through the network cards of a rank's
    devices, or through NVLink where it joins the whole cluster."""
    cluster, parallel = scenario.cluster, unit.parallel
    inside = cluster.inter_node is None or cluster.topology.domain(cluster) >= cluster.n_devices
    link = cluster.intra_node if inside or cluster.inter_node is None else cluster.inter_node
    latency_s = link.latency_s if inside or cluster.inter_node is None else cluster.inter_node.cross_leaf_latency_s
    model = scenario.model_of(policy)
    return Sizes(
        unit=unit,
        n_ranks=max(1, parallel.ep_size // parallel.tp_size),
        capacity_blocks=kv_cache_tokens(scenario, policy, unit) // unit.block_size,
        kv_bytes_per_token=model.kv_cache_bytes_per_token(unit.kv_cache_bytes_per_element),
        port_bytes_per_s=link.rate_bytes_per_s * parallel.tp_size,
        latency_s=latency_s,
        devices=parallel.ep_size,
    )


def _run(job: _Job) -> tuple[dict[str, Table], int, RecordedService | None]:
    policy = job.scenario.policies[job.policy]
    tables, finished = _served(job.scenario, policy, job.replica, job.record)
    recorded = recorded_service(policy.name, job.replica, finished) if job.record else None
    return tables, finished.n_events, recorded


def serve_one(scenario: Scenario, policy: Policy, replica: int) -> tuple[dict[str, Table], int]:
    """Serve one replica's requests under one policy; return its tables and the number of events."""
    tables, finished = _served(scenario, policy, replica, record=False)
    return tables, finished.n_events


def _served(scenario: Scenario, policy: Policy, replica: int, record: bool) -> tuple[dict[str, Table], Finished]:
    serving, traffic = scenario.serving, scenario.traffic
    assert serving is not None
    sizes = tuple(sizes_of(scenario, policy, unit) for unit in serving.units)
    requests = serving.requests.draw(serving.duration_s, traffic.topic_weights, scenario.seed, replica)
    topics = traffic.topics
    experts = Experts(scenario, policy, replica)
    world = World(serving, sizes, requests, experts, len(topics), scenario.seed, replica, record)
    finished = world.run()
    head: dict[str, Any] = {"policy": policy.name, "replica": replica}
    price = scenario.cluster.device.price_per_hour
    tables = Tables(finished, serving, topics, price, head).all()
    tables["service"]["memory_bytes"] = [_memory_bytes(scenario, policy, tables["units"])]
    return tables, finished


def _memory_bytes(scenario: Scenario, policy: Policy, units: Table) -> float:
    """Bytes on a device of the unit that holds most: weights, buffers, and the cache of its rank that was ever fullest."""
    assert scenario.serving is not None
    return max(
        unit_memory(scenario, policy, unit, tokens * share)["total"]
        for unit, tokens, share in zip(scenario.serving.units, units["kv_cache_tokens"], units["kv_max"], strict=True)
    )


def simulate(
    scenario: Scenario, jobs: int | None, expected: Estimate, progress: bool = False, record: bool = False
) -> Result:
    """Serve the requests of a checked scenario; see `sim.study.simulate`."""
    todo = [
        _Job(scenario, index, replica, record and replica == 0)
        for index in range(len(scenario.policies))
        for replica in range(scenario.replicas)
    ]
    with Workers(processes(jobs, len(todo), expected)) as workers:
        done = list(watched(workers.map(_run, todo), len(todo), "serving", progress))
    tables: dict[str, Table] = {}
    for found, _, _ in done:
        for name, table in found.items():
            for column, values in table.items():
                tables.setdefault(name, {}).setdefault(column, []).extend(values)
    for name in done[0][0]:
        tables.setdefault(name, {})
    recorded = tuple(kept for _, _, kept in done if kept is not None)
    return Result(scenario, tables, summarise(tables, scenario), sum(events for _, events, _ in done), recorded)
