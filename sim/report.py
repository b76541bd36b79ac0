"""The result as text for a terminal: policies side by side, floors beside balance figures, intervals where there are."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from sim.countlevel import noise_of_a_step
from sim.metrics.dynamics import MIN_STEPS
from sim.results import Metric, Result, Table, metrics_of
from sim.scenario import Scenario
from sim.unitmemory import kv_cache_tokens
from sim.units import human

_BALANCE = (
    "max_vio_batch", "max_vio_batch_floor", "max_vio_global", "max_vio_global_floor", "device_max_over_mean",
    "least_share", "kept_affinity", "nodes_per_token", "devices_per_token", "inter_node_bytes",
)  # fmt: skip
_EXPERTS = (
    "max_vio_sequence", "max_vio_sequence_floor", "max_vio_micro_batch", "max_vio_micro_batch_floor", "max_vio_ep_group",
    "topic_max_vio", "specialisation_bits", "kept_against_oracle",
    "starved_10pct", "update_cv", "experts_per_token", "max_vio_asked", "dropped_share", "dropped_worst_topic",
    "offset_rms",
)  # fmt: skip
_CONTROL = ("max_vio_late", "settling_step", "ripple", "churn")
_TIME = (
    "step_time_s", "attention_s", "experts_s", "other_compute_s", "exposed_communication_s", "waiting_s",
    "tokens_per_s_per_gpu", "moved_bytes", "step_and_moves_s",
)  # fmt: skip
_PIPELINE_TIME = (
    "step_time_s", "forward_s", "backward_s", "weight_gradients_s", "overlapped_s", "bubble_s", "optimizer_s",
)  # fmt: skip
_PRICE = (
    "tokens_per_day", "tokens_per_s_per_gpu", "model_flops_per_s_per_gpu", "mfu", "gpu_hours_per_trillion",
    "usd_per_trillion", "energy_j_per_trillion",
)  # fmt: skip
_USERS = (
    "ttft_p50_s", "ttft_p99_s", "tpot_mean_s", "tpot_p99_s", "itl_p99_s", "e2e_p50_s", "queued_p99_s",
    "goodput_share", "goodput_per_s",
)  # fmt: skip
_OPERATORS = (
    "input_tokens_per_s_per_gpu", "cached_tokens_per_s_per_gpu", "output_tokens_per_s_per_gpu",
    "usd_per_million_input", "usd_per_million_output", "utilisation", "decoding_per_rank", "queue_mean", "kv_mean",
    "kv_max",
)  # fmt: skip
_ITERATIONS = (
    "iteration_s", "attention_s", "experts_s", "communication_s", "other_s", "imbalance_mean", "imbalance_p99",
    "refused", "preemptions", "retries",
)  # fmt: skip
# Columns whose paired difference a table ends with.
_LEADING = {"step_time_s": "step time", "tpot_mean_s": "mean TPOT", "iteration_s": "iteration"}
_MOST_TOPICS = 12  # of which each has a column
# Columns that say nothing where every policy has this value.
_DULL = {
    "refused": 0.0,
    "preemptions": 0.0,
    "retries": 0.0,
    "cached_tokens_per_s_per_gpu": 0.0,
    "dropped_share": 0.0,
    "dropped_worst_topic": 0.0,
    "offset_rms": 0.0,
}


def number(value: float, metric: Metric) -> str:
    """Format a mean for people; a dash where there is none."""
    if math.isnan(value):
        return "-"
    value *= metric.scale
    if metric.digits >= 4 and metric.name != "kept_affinity":
        return (
            f"{value:.{max(0, metric.digits - 1 - math.floor(math.log10(abs(value) or 1)))}f}"
            if abs(value) < 1e9
            else f"{value:.3g}"
        )
    return f"{value:.{metric.digits}f}"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first to the left, the others to the right, under head lines broken at spaces."""
    words = [h.split(" ") for h in head]
    depth = max(len(w) for w in words)
    lines = [[w[i - depth + len(w)] if i >= depth - len(w) else "" for w in words] for i in range(depth)]
    table = [*lines, *rows]
    widths = [max(len(row[c]) for row in table) for c in range(len(head))]
    text = []
    for i, row in enumerate(table):
        cells = [
            cell.ljust(width) if c == 0 else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
        if i == depth - 1:
            text.append("  ".join("-" * width for width in widths))
    return text


def _table(result: Result, names: Sequence[str]) -> list[str]:
    metrics = {m.name: m for m in metrics_of(result.scenario)}
    values: dict[tuple[str, str], tuple[float, float, float, float]] = {}
    rows: dict[str, list[Any]] = result.summary_rows
    for policy, metric, mean, half, diff, diff_half, _ in zip(*rows.values(), strict=True):
        values[policy, metric] = (mean, half, diff, diff_half)
    policies = [p.name for p in result.scenario.policies]
    names = [name for name in names if any(_says(name, values[policy, name][0], result) for policy in policies)]
    if not names:
        return []
    lines = []
    leading = next((name for name in _LEADING if name in names), None)
    first = result.scenario.policies[0].name
    for policy in (p.name for p in result.scenario.policies):
        row = [policy]
        for name in names:
            mean, half, diff, diff_half = values[policy, name]
            cell = number(mean, metrics[name])
            if not math.isnan(half) and not name.endswith("_floor") and half > 1e-6 * abs(mean):
                cell += f" ±{half * metrics[name].scale:.2g}"
            row.append(cell)
        if leading:
            mean, _, diff, diff_half = values[policy, leading]
            base = mean - diff
            cell = "-" if policy == first or math.isnan(diff) or base <= 0 else f"{100 * diff / base:+.1f} %"
            if cell != "-" and not math.isnan(diff_half):
                cell += f" ±{100 * diff_half / base:.1f}"
            row.append(cell)
        lines.append(row)
    head = ["policy", *(metrics[name].label for name in names)]
    if leading:
        head.append(f"{_LEADING[leading]} against first")
    return grid(head, lines)


def _says(name: str, value: float, result: Result) -> bool:
    if name == "goodput_share" and result.scenario.serving is not None:  # of interest where something is asked for
        slo = result.scenario.serving.slo
        return any(limit is not None for limit in (slo.ttft_s, slo.tpot_s, slo.e2e_s))
    if name == "experts_per_token":  # of interest where policies differ from the model's number
        scenario = result.scenario
        moe = [policy for policy in scenario.policies if scenario.model_of(policy).is_moe]
        several = len({scenario.model_of(policy).num_experts_per_tok for policy in moe}) > 1
        return several or any(policy.select.varies for policy in moe)
    if name == "max_vio_asked":  # where nothing is dropped it is MaxVio itself
        return any(policy.capacity.kind != "none" for policy in result.scenario.policies)
    if name.startswith(("max_vio_micro_batch", "max_vio_ep_group")) and result.scenario.schedule.micro_batches == 1:
        return False  # the EP group's micro-batch is the batch
    return not math.isnan(value) and value != _DULL.get(name)


def _by_topic(result: Result) -> list[str]:
    """Policies x topics: MaxVio within each topic and, where something is dropped, the share that is."""
    topics, table = result.scenario.traffic.topics, result.tables.get("topics", {})
    if not table or not 1 < len(topics) <= _MOST_TOPICS:
        return []
    lines: list[str] = []
    for column, label, scale in (("max_vio", "MaxVio within", 1.0), ("dropped_share", "dropped %", 100.0)):
        values: dict[tuple[str, str], list[float]] = {}
        for policy, topic, value in zip(table["policy"], table["topic"], table[column], strict=True):
            if not math.isnan(value):
                values.setdefault((policy, topic), []).append(value * scale)
        means = {key: math.fsum(found) / len(found) for key, found in values.items()}
        if not any(means.values()):
            continue
        shown = [policy.name for policy in result.scenario.policies]
        if column == "dropped_share":  # most policies drop nothing
            shown = [name for name in shown if any(means.get((name, topic)) for topic in topics)]
        rows = [
            [name, *(f"{means[key]:.2f}" if (key := (name, topic)) in means else "-" for topic in topics)]
            for name in shown
        ]
        lines += ["", *grid([label, *topics], rows)]
    return lines


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
    constants = f"constants: {scenario.cost.compute.provenance(cluster.device, scenario.cost.gemm_dtype)}"
    if scenario.serving is not None:
        used = sum(unit.count * unit.parallel.ep_size for unit in scenario.serving.units)
        lines = [head, f"{used} of {cluster.n_devices} {cluster.device.name} in nodes of {cluster.devices_per_node}"]
        lines += [*_serving(scenario), constants]
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


def _titled(result: Result, tables: Sequence[Sequence[str]]) -> list[str]:
    """The tables that say something, an empty line before each."""
    return [line for names in tables if (table := _table(result, names)) for line in ("", *table)]


def _serving(scenario: Scenario) -> list[str]:
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
            + (", with prefix cache" if unit.prefix_cache else "")
            + ("" if unit.chunked_prefill else ", prompts whole and first")
            + (f", {unit.speculative_tokens} token(s) speculated" if unit.speculative_tokens else "")
        )
    for fault in serving.faults:
        until = "" if fault.until_s is None else f" to {human(fault.until_s, 's')}"
        lines.append(
            f"fault: {fault.kind} at {human(fault.at_s, 's')}{until}, rank {fault.rank} of {fault.unit} {fault.index}"
        )
    return lines


def _units(result: Result) -> list[str]:
    """Units side by side where there are several: means over replicas of what each does."""
    table = result.tables.get("units", {})
    if not table or len(set(table["unit"])) < 2:
        return []
    names = ("input_tokens_per_s_per_gpu", "output_tokens_per_s_per_gpu", "utilisation", "decoding_per_rank", "kv_mean",
             "kv_max", "iteration_s", "imbalance_mean")  # fmt: skip
    metrics = {m.name: m for m in metrics_of(result.scenario)}
    found: dict[tuple[str, str], list[int]] = {}
    for i, key in enumerate(zip(table["policy"], table["unit"], strict=True)):
        found.setdefault(key, []).append(i)
    rows = []
    for (policy, unit), at in found.items():
        means = [math.fsum(table[name][i] for i in at) / len(at) for name in names]
        rows.append(
            [f"{policy}, {unit}", *(number(mean, metrics[name]) for name, mean in zip(names, means, strict=True))]
        )
    return ["", *grid(["policy, unit", *(metrics[name].label for name in names)], rows)]


def _events(result: Result) -> list[str]:
    """What faults and rebalances did, in a line each."""
    lines = []
    for row in _rows(result.tables.get("faults", {})):
        if row["kind"] == "dead_rank" and not row["replica"]:
            lines.append(
                f"{row['policy']}: after the death of rank {row['rank']} of {row['unit']} {row['index']} "
                f"{100 * row['alive_share']:.2f} % of experts had a live copy, {row['loaded_experts']} were loaded again in "
                f"{human(row['load_s'], 's')}; {row['retried']} requests computed again, {human(row['paused_s'], 's')} "
                "without service"
            )
    plans: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(result.tables.get("rebalances", {})):
        plans.setdefault(row["policy"], []).append(row)
    for policy, found in plans.items():
        done = [row for row in found if row["done"]]
        moved = math.fsum(row["moved_bytes"] for row in done)
        added = math.fsum(row["added_s"] for row in done)
        lines.append(
            f"{policy}: {len(done)} of {len(found)} plans moved experts, {human(moved, 'B')} in all, which took "
            f"{human(added, 's')} of iterations"
        )
    return lines


def _rows(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def _served(result: Result) -> str:
    """The whole text of a run that serves requests."""
    scenario = result.scenario
    several = scenario.replicas > 1
    note = "Means over replicas, ± 95 %." if several else "One replica, so no intervals."
    parts = [*describe(scenario), *_titled(result, [_USERS, _OPERATORS, _ITERATIONS]), *_units(result), ""]
    remarks = [*_events(result), note, *(f"requests: {caveat}" for caveat in _asked(scenario))]
    wrapped = [part for line in remarks for part in textwrap.wrap(line, 120, subsequent_indent="  ")]
    return "\n".join([*parts, *wrapped, *_remarks(scenario)])


def _asked(scenario: Scenario) -> tuple[str, ...]:
    return () if scenario.serving is None else scenario.serving.requests.caveats


def terminal(result: Result) -> str:
    """Return the whole text."""
    if result.scenario.serving is not None:
        return _served(result)
    tables = [_BALANCE, _EXPERTS]
    parts = [*describe(result.scenario), *_titled(result, tables), *_by_topic(result)]
    tables = [_CONTROL] if result.scenario.steps.count >= MIN_STEPS else []
    if len(result.scenario.timed_steps()):
        tables += [_PIPELINE_TIME, _PRICE] if result.scenario.pipelined else [_TIME]
    parts += _titled(result, tables)
    notes = [
        "",
        "(floor): MaxVio of a perfectly uniform random gate at this batch size. Means over MoE layers and steps",
    ]
    notes[-1] += ", ± 95 % over replicas." if result.scenario.replicas > 1 else "; one replica, so no intervals."
    return "\n".join([*parts, *notes, *_remarks(result.scenario)])


def _count_level(scenario: Scenario) -> list[str]:
    """Which ranks were routed and which drawn, and the error that the pilot leaves."""
    ranks, pilot = scenario.parallel.ep_size, scenario.steps.pilot_ranks
    gates = [policy for policy in scenario.policies if scenario.model_of(policy).is_moe]
    moving = [policy.name for policy in gates if not scenario.pilots_once(policy)]
    lines = []
    if len(moving) < len(gates):
        lines.append(
            f"count level: all ranks of all steps are drawn from blocks of a pilot of {pilot} ranks, whose means err by "
            f"{(ranks / pilot) ** 0.5:.2f} times the sampling noise of one step; that overstates MaxVio"
        )
    if moving and pilot < ranks:
        lines.append(
            f"{', '.join(moving)}: of each step's {ranks} ranks {pilot} are routed token by token, the others drawn from "
            f"them; that makes a batch's sampling noise {noise_of_a_step(ranks, pilot):.2f} times too large"
        )
    return lines


def _without_effect(scenario: Scenario) -> list[str]:
    """Balancing that a reader would take to be at work and that is not."""
    moe = [policy for policy in scenario.policies if policy.learns and scenario.model_of(policy).is_moe]
    deaf = [policy.name for policy in moe if policy.select.reads == "nothing"]
    early = [policy.name for policy in moe if policy.name not in deaf]
    lines = [f"{', '.join(deaf)}: the selection looks at no scores, so balancing has no effect"] if deaf else []
    if early and scenario.steps.count == 1 and not scenario.steps.warmup.steps:
        lines.append(
            f"{', '.join(early)}: balancing has not moved yet: it learns from a step after it; set steps.warmup or steps.count"
        )
    return lines


def _remarks(scenario: Scenario) -> list[str]:
    """What the pieces of the gates, the assumed dynamics and the traffic want the reader to know, each thing once."""
    remarks: dict[str, list[str]] = {}
    for policy in scenario.policies:
        model = scenario.model_of(policy)
        if model.is_moe:
            for _, piece in policy.pieces():
                remarks.setdefault(piece.note(model), []).append(policy.name)
    lines = [f"{', '.join(dict.fromkeys(names))}: {note}" for note, names in remarks.items() if note]
    lines += _without_effect(scenario)
    lines += [f"all policies: {rule.note(scenario.model)}" for rule in scenario.router_dynamics]
    if scenario.pipelined and scenario.cluster.device.price_per_hour is None:
        lines.append(f"no USD: cluster {scenario.cluster.name} states no device.price_per_hour")
    lines += [f"traffic: {caveat}" for caveat in scenario.traffic.caveats]
    if scenario.steps.resolution == "count":
        lines += _count_level(scenario)
    return [part for line in lines for part in textwrap.wrap(line, 120, subsequent_indent="  ")]
