"""What is simulated, in a few lines."""

from __future__ import annotations

import textwrap

from sim.scenario import Scenario
from sim.unitmemory import kv_cache_tokens
from sim.units import human


def _simulated(scenario: Scenario) -> int:
    """Devices that the run simulates for the scenario's own split."""
    parallel = scenario.parallel
    return parallel.devices if scenario.pipelined else parallel.ep_size


def describe(scenario: Scenario) -> list[str]:
    """Say in a few lines what is simulated."""
    model, cluster, parallel = scenario.model, scenario.cluster, scenario.parallel
    warm = scenario.steps.warmup
    head = (
        f"{scenario.name}: {model.name}, {model.total_parameters / 1e9:.2f}B parameters, "
        f"{model.active_parameters / 1e9:.2f}B active ({100 * model.active_parameters / model.total_parameters:.1f} %)"
    )
    step_in = scenario.cost.gemm_dtype if scenario.serving is None else None  # serving has kernels that no step has
    constants = f"constants: {scenario.cost.compute.provenance(cluster.device, step_in)}"
    if scenario.serving is not None:
        used = sum(unit.count * unit.parallel.ep_size for unit in scenario.serving.units)
        lines = [head, f"{used} of {cluster.n_devices} {cluster.device.name} in nodes of {cluster.devices_per_node}"]
        lines += [*_units(scenario), constants]
        return [part for line in lines for part in textwrap.wrap(line, 120, subsequent_indent="  ")]
    lines = [
        head,
        f"{_simulated(scenario)} of {cluster.n_devices} {cluster.device.name} in nodes of {cluster.devices_per_node}, "
        f"EP{parallel.ep_size} x PP{parallel.pp_size}"
        + (f" x DP{parallel.dp_size}" if parallel.dp_size else "")
        + f", {scenario.tokens_per_rank} tokens per device and step, {model.n_moe_layers} MoE layers, "
        f"{scenario.schedule.phase}, "
        + (
            f"pipeline {scenario.schedule.pipeline.kind}, {scenario.schedule.micro_batches} micro-batches, recompute "
            f"{scenario.schedule.recompute}"
            + (", with MTP" if scenario.schedule.mtp and model.num_nextn_predict_layers else "")
            if scenario.pipelined
            else f"overlap {scenario.schedule.overlap}"
        ),
        f"traffic {scenario.traffic.kind}, {scenario.steps.count} step(s), {scenario.replicas} replica(s), seed {scenario.seed}"
        + (
            f"; balancing settled by {warm.steps} warm-up batches of {warm.ranks * warm.tokens_per_rank} tokens"
            if warm.steps
            else ""
        ),
        f"compute {scenario.cost.compute.kind}, communication {scenario.cost.communication.kind} ({scenario.cost.mode} "
        f"kernels), engine {scenario.schedule.engine}, "
        + ("every token routed" if scenario.steps.resolution == "token" else "loads drawn at count level"),
        *(
            [
                f"faults: {', '.join(f'{f.link} at {f.factor:g} of its rate' if f.factor else f'{f.link} down' for f in cluster.faults)}"
            ]
            if cluster.faults
            else []
        ),
        constants,
    ]
    return [part for line in lines for part in textwrap.wrap(line, 120, subsequent_indent="  ")]


def _units(scenario: Scenario) -> list[str]:
    """Who asks, and what serves them."""
    serving = scenario.serving
    assert serving is not None
    lines = [
        f"requests {serving.requests.kind} for {human(serving.duration_s, 's')}"
        + (f", the first {human(serving.warmup_s, 's')} left out of means" if serving.warmup_s else "")
        + f"; {scenario.replicas} replica(s), seed {scenario.seed}; traffic {scenario.traffic.kind}, "
        f"{len(scenario.traffic.topics)} topic(s)"
    ]
    for unit in serving.units:
        mode = unit.mode or ("low_latency" if unit.role == "decode" else scenario.cost.mode)
        ranks = max(1, unit.parallel.ep_size // unit.parallel.tp_size)
        cache = {kv_cache_tokens(scenario, policy, unit) for policy in scenario.policies}
        tokens = " to ".join(f"{n:,}" for n in sorted({min(cache), max(cache)}))
        lines.append(
            f"unit {unit.name}: {unit.count} x EP{unit.parallel.ep_size}, {unit.role}, attention on {ranks} rank(s) of TP"
            f"{unit.parallel.tp_size}, {mode} kernels, {unit.micro_batches} micro-batch(es), per rank at most "
            f"{unit.max_num_seqs} sequences, {unit.max_num_batched_tokens} tokens an iteration, "
            f"{tokens} tokens of cache"
            + ("" if unit.prefix_cache == "none" else f", prefix cache {unit.prefix_cache}")
            + ("" if unit.chunked_prefill else ", prompts whole and first")
            + (f", {unit.speculative_tokens} token(s) speculated" if unit.speculative_tokens else "")
        )
    for fault in serving.faults:
        until = "" if fault.until_s is None else f" to {human(fault.until_s, 's')}"
        lines.append(
            f"fault: {fault.kind} at {human(fault.at_s, 's')}{until}, rank {fault.rank} of {fault.unit} {fault.index}"
        )
    return lines
