"""What is simulated, in a few lines."""

from __future__ import annotations

import textwrap

from sim.deployment import Serving
from sim.scenario import Scenario
from sim.unitmemory import kv_cache_tokens
from sim.units import human


def _simulated(scenario: Scenario) -> int:
    """Devices that the run simulates for the scenario's own split."""
    parallel = scenario.parallel
    return parallel.devices if scenario.pipelined else parallel.ep_size


def describe(scenario: Scenario) -> list[str]:
    """Say in a few lines what is simulated."""
    lines = []
    for term, text in facts(scenario):
        head = {"model": f"{scenario.name}: ", "machines": "", "run": "", "laws": ""}.get(term, f"{term}: ")
        lines += textwrap.wrap(head + text, 120, subsequent_indent="  ")
    return lines


def facts(scenario: Scenario) -> list[tuple[str, str]]:
    """Return (term, text) pairs that say what is simulated."""
    model, cluster, serving = scenario.model, scenario.cluster, scenario.serving
    size, active = model.total_parameters, model.active_parameters
    of_model = f"{model.name}, {size / 1e9:.2f}B parameters, {active / 1e9:.2f}B active ({100 * active / size:.1f} %)"
    step_in = scenario.cost.gemm_dtype if serving is None else None  # serving has kernels that no step has
    used = sum(unit.count * unit.parallel.ep_size for unit in serving.units) if serving else _simulated(scenario)
    machines = f"{used} of {cluster.n_devices} {cluster.device.name} in nodes of {cluster.devices_per_node}"
    return [
        ("model", of_model),
        ("machines", machines + (f", {_step(scenario)}" if serving is None else "")),
        *(_steps(scenario) if serving is None else _units(scenario, serving)),
        ("constants", scenario.cost.compute.provenance(cluster.device, step_in)),
    ]


def _step(scenario: Scenario) -> str:
    """How the devices share a step."""
    model, parallel, schedule = scenario.model, scenario.parallel, scenario.schedule
    order = f"overlap {schedule.overlap}"
    if scenario.pipelined:
        order = (
            f"pipeline {schedule.pipeline.kind}, {schedule.micro_batches} micro-batches, recompute {schedule.recompute}"
        )
        order += ", with MTP" if schedule.mtp and model.num_nextn_predict_layers else ""
    return (
        f"EP{parallel.ep_size} x PP{parallel.pp_size}"
        + (f" x DP{parallel.dp_size}" if parallel.dp_size else "")
        + f", {scenario.tokens_per_rank} tokens per device and step, {model.n_moe_layers} MoE layers, {schedule.phase}, {order}"
    )


def _steps(scenario: Scenario) -> list[tuple[str, str]]:
    """What is routed, and by which laws it takes time."""
    cost, steps, warm = scenario.cost, scenario.steps, scenario.steps.warmup
    run = (
        f"traffic {scenario.traffic.kind}, {steps.count} step(s), {scenario.replicas} replica(s), seed {scenario.seed}"
    )
    if warm.steps:
        run += f"; balancing settled by {warm.steps} warm-up batches of {warm.ranks * warm.tokens_per_rank} tokens"
    laws = (
        f"compute {cost.compute.kind}, communication {cost.communication.kind} ({cost.mode} kernels), engine "
        f"{scenario.schedule.engine}, "
        + ("every token routed" if steps.resolution == "token" else "loads drawn at count level")
    )
    found = [("run", run), ("laws", laws)]
    faults = scenario.cluster.faults
    if faults:
        broken = (f"{f.link} at {f.factor:g} of its rate" if f.factor else f"{f.link} down" for f in faults)
        found.append(("faults", ", ".join(broken)))
    return found


def _units(scenario: Scenario, serving: Serving) -> list[tuple[str, str]]:
    """Who asks, and what serves them."""
    run = (
        f"requests {serving.requests.kind} for {human(serving.duration_s, 's')}"
        + (f", the first {human(serving.warmup_s, 's')} left out of means" if serving.warmup_s else "")
        + f"; {scenario.replicas} replica(s), seed {scenario.seed}; traffic {scenario.traffic.kind}, "
        f"{len(scenario.traffic.topics)} topic(s)"
    )
    found = [("run", run)]
    for unit in serving.units:
        mode = unit.mode or ("low_latency" if unit.role == "decode" else scenario.cost.mode)
        ranks = max(1, unit.parallel.ep_size // unit.parallel.tp_size)
        cache = {kv_cache_tokens(scenario, policy, unit) for policy in scenario.policies}
        tokens = " to ".join(f"{n:,}" for n in sorted({min(cache), max(cache)}))
        text = (
            f"{unit.count} x EP{unit.parallel.ep_size}, {unit.role}, attention on {ranks} rank(s) of TP"
            f"{unit.parallel.tp_size}, {mode} kernels, {unit.micro_batches} micro-batch(es), per rank at most "
            f"{unit.max_num_seqs} sequences, {unit.max_num_batched_tokens} tokens an iteration, "
            f"{tokens} tokens of cache"
            + ("" if unit.prefix_cache == "none" else f", prefix cache {unit.prefix_cache}")
            + ("" if unit.chunked_prefill else ", prompts whole and first")
            + (f", {unit.speculative_tokens} token(s) speculated" if unit.speculative_tokens else "")
        )
        found.append((f"unit {unit.name}", text))
    for fault in serving.faults:
        until = "" if fault.until_s is None else f" to {human(fault.until_s, 's')}"
        text = f"{fault.kind} at {human(fault.at_s, 's')}{until}, rank {fault.rank} of {fault.unit} {fault.index}"
        found.append(("fault", text))
    return found
