"""Rules of a run that serves requests."""

from __future__ import annotations

from collections.abc import Iterator

from sim.checks.rule import Rule
from sim.checks.splits import hosting_problems, split_problems
from sim.deployment import Unit
from sim.scenario import Scenario
from sim.unitmemory import kv_cache_tokens, unit_memory
from sim.units import human


def problems(scenario: Scenario) -> Iterator[Rule]:
    serving = scenario.serving
    assert serving is not None
    roles = {unit.role for unit in serving.units}
    if "prefill" in roles and "decode" not in roles:
        yield ("serving", "units"), "prefill units need decode units beside them"
    if "mixed" in roles and len(roles) > 1:
        yield ("serving", "units"), "mixed units do both: not beside prefill and decode units"
    names = [unit.name for unit in serving.units]
    devices = sum(unit.count * unit.parallel.ep_size for unit in serving.units)
    if devices > scenario.cluster.n_devices:
        cluster = scenario.cluster
        yield (
            ("serving", "units"),
            f"count x ep_size of all units need {devices} devices; the cluster has {cluster.nodes} nodes x "
            f"{cluster.devices_per_node} = {cluster.n_devices}",
        )
    for j, unit in enumerate(serving.units):
        if unit.name in names[:j]:
            yield ("serving", "units", j, "name"), f"another unit is called {unit.name!r}"
        yield from _unit_problems(scenario, j, unit)
    groups = {unit.name: unit for unit in serving.units}
    for j, fault in enumerate(serving.faults):
        if fault.unit not in groups:
            yield ("serving", "faults", j, "unit"), f"no unit is called {fault.unit!r}; there are {', '.join(names)}"
            continue
        unit = groups[fault.unit]
        for field, value, limit in (("index", fault.index, unit.count), ("rank", fault.rank, unit.parallel.ep_size)):
            if value >= limit:
                yield ("serving", "faults", j, field), f"must be < {limit}"
        if fault.until_s is not None and fault.until_s <= fault.at_s:
            yield ("serving", "faults", j, "until_s"), f"must be > at_s = {fault.at_s:g}"
    if roles == {"decode"} and serving.slo.ttft_s is not None:
        yield ("serving", "slo", "ttft_s"), "has no meaning at decode units alone: prompts come with their cache"
    if scenario.steps.record_traffic:
        yield ("steps", "record_traffic"), "is for runs of steps: a run that serves draws its batches"
    if serving.warmup_s >= serving.duration_s:
        yield ("serving", "warmup_s"), f"must be < duration_s = {serving.duration_s:g}"
    # Recorded requests are read once, and of generated ones none are drawn, so that what cannot be drawn is refused.
    recorded = "path" in type(serving.requests).model_fields
    try:
        span_s = serving.duration_s if recorded else 1e-9
        serving.requests.draw(span_s, scenario.traffic.topic_weights, scenario.seed, 0)
    except (ValueError, OSError) as error:
        yield ("serving", "requests"), str(error)
    for i, policy in enumerate(scenario.policies):
        select = policy.select
        if scenario.model_of(policy).is_moe and select.kind != "balanced" and (not select.per_token or select.varies):
            yield ("policies", i, "select"), f"{select.kind} chooses for a whole batch: it cannot serve requests"
        if policy.capacity.kind != "none":
            yield ("policies", i, "capacity"), "drops by batch; requests are served without"
        if policy.rebalance.interval_steps is not None:
            yield ("policies", i, "rebalance", "interval_steps"), "is for runs of steps; set interval_s"


def _unit_problems(scenario: Scenario, j: int, unit: Unit) -> Iterator[Rule]:
    where = ("serving", "units", j, "parallel")
    needed = unit.max_num_seqs * (1 + unit.speculative_tokens)
    if unit.role != "prefill" and unit.max_num_batched_tokens < needed:
        yield (
            ("serving", "units", j, "max_num_batched_tokens"),
            f"must be >= max_num_seqs x (1 + speculative_tokens) = {needed}, or not all decodes fit",
        )
    if unit.long_prefill_token_threshold is not None and not unit.chunked_prefill:
        yield ("serving", "units", j, "long_prefill_token_threshold"), "needs chunked_prefill"
    for field in ("cache_store_tokens", "cache_load_bytes_per_s"):
        if getattr(unit, field) is not None and unit.prefix_cache != "shared":
            yield ("serving", "units", j, field), "is of a shared cache; set prefix_cache: shared"
    if unit.parallel.dp_size is not None:
        yield (*where, "dp_size"), "attention's data-parallel ranks of a unit are ep_size / tp_size"
    if unit.parallel.pp_size > 1:
        yield (*where, "pp_size"), "serving has no pipelines"
    seen: set[int] = set()
    for i, policy in enumerate(scenario.policies):
        found = [] if i else list(split_problems(scenario, where, policy, unit.parallel))
        if scenario.model_of(policy).is_moe:
            found += hosting_problems(scenario, ("policies", i), where, policy, unit.parallel)
        yield from found
        size = policy.placement.num_redundant_experts
        if found or size in seen:
            continue
        seen.add(size)
        if kv_cache_tokens(scenario, policy, unit) < unit.block_size:
            items = unit_memory(scenario, policy, unit, 0.0)
            parts = " + ".join(
                f"{name} {human(value, 'B')}" for name, value in items.items() if name != "total" and value
            )
            yield (
                where,
                f"policy {policy.name!r} leaves no room for a cache: {parts} = {human(items['total'], 'B')} of "
                f"{unit.gpu_memory_utilization:g} x {human(scenario.cluster.device.memory_bytes, 'B')}; what helps: larger "
                "ep_size or tp_size, fewer redundant experts, smaller max_num_batched_tokens",
            )
