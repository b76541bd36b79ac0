"""Tidy tables of a run, from what was counted and timed: one row per policy and replica, and per what the table says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from sim.conservation import ConservationError
from sim.engine.moves import Moves
from sim.exchange import Exchange, token_bytes
from sim.metrics.balance import (
    balancedness_mean,
    balancedness_sum,
    coefficient_of_variation,
    least_share,
    max_vio,
    starved_share,
    uniform_max_vio,
)
from sim.metrics.dynamics import churn, ripple, settling_step
from sim.metrics.serving import usd_per_million
from sim.metrics.specialisation import mutual_information_bits, topic_max_vio
from sim.placement import replica_counts
from sim.rollout import measured_steps
from sim.scenario import Scenario
from sim.settings import Rebalance
from sim.tally import Counts
from sim.tokens import I64
from sim.units import PS_PER_S

Table = dict[str, list[Any]]
Timing = Mapping[tuple[int, int, int], dict[str, Any]]  # (replica, policy, step) -> parts, makespan


def tabulate(
    scenario: Scenario,
    counts: Mapping[tuple[int, int], list[Counts]],
    timing: Timing,
    moved: Mapping[tuple[int, int, int], Moves] = MappingProxyType({}),
) -> dict[str, Table]:
    """Return the tables by name.

    steps: per step, means over MoE layers and the time of timed steps. layers: per step and MoE layer. totals: per MoE
    layer, what holds over all steps. devices: per timed step and device. experts: per MoE layer and expert, tokens over
    all steps. topics: per measured step, MoE layer and topic, if the traffic has several.
    """
    tables: dict[str, Table] = {name: {} for name in ("steps", "layers", "totals", "devices", "experts", "topics")}
    measured = measured_steps(scenario)
    for index, policy in enumerate(scenario.policies):
        model, parallel = scenario.model_of(policy), scenario.parallel_of(policy)
        for replica in range(scenario.replicas):
            found = counts.get((replica, index), [])
            ranks = [result.rank_tokens for result in found]
            per_layer = [_layer_rows(scenario, result, loads) for result, loads in zip(found, ranks, strict=True)]
            head: dict[str, Any] = {"policy": policy.name, "replica": replica}
            memory = scenario.memory(policy)["total"] if scenario.timed_steps() else math.nan
            for step in range(scenario.steps.count):
                row = head | {"step": step}
                rows = [{key: values[step] for key, values in layer.items()} for layer in per_layer]
                for key in per_layer[0] if per_layer else ():
                    row[key] = float(np.mean([r[key] for r in rows]))
                if ranks:
                    by_layer = np.stack([loads[step] for loads in ranks])
                    row["balancedness_sum"] = balancedness_sum(by_layer)
                    row["balancedness_mean"] = balancedness_mean(by_layer)
                clock = timing.get((replica, index, step))
                exchanges = [r.exchanges[step] for r in found] if step in measured else []
                row |= _exchange_row(scenario, index, exchanges) | _time_row(scenario, index, clock)
                row["memory_bytes"] = memory if clock else math.nan
                if policy.rebalance.interval_steps:
                    row |= _moves_row(policy.rebalance, moved.get((replica, index, step)), clock)
                _append(tables["steps"], row)
                for result, r in zip(found, rows, strict=True):
                    _append(tables["layers"], head | {"step": step, "layer": model.moe_layers[result.layer]} | r)
                if clock and scenario.pipelined:
                    for i in range(parallel.pp_size * parallel.ep_groups):
                        parts = {f"{key}_s": float(value[i]) / PS_PER_S for key, value in clock["parts"].items()}
                        at = {"step": step, "pp_rank": i // parallel.ep_groups, "ep_group": i % parallel.ep_groups}
                        _append(tables["devices"], head | at | parts)
                elif clock:
                    received = sum((loads[step] for loads in ranks), np.zeros(parallel.ep_size, dtype=np.int64))
                    for device in range(parallel.ep_size):
                        parts = {f"{key}_s": float(value[device]) / PS_PER_S for key, value in clock["parts"].items()}
                        at = {"step": step, "device": device, "expert_tokens": int(received[device])}
                        _append(tables["devices"], head | at | parts)
            for result in found:
                where = head | {"layer": model.moe_layers[result.layer]}
                _append(tables["totals"], where | _total_row(scenario, result))
                copies, slots = replica_counts(result.map, model.n_routed_experts).tolist(), result.map.tolist()
                per_rank = len(slots) // parallel.ep_size
                for expert, n in enumerate(result.expert_tokens.sum(axis=0).tolist()):
                    at = {"device": slots.index(expert) // per_rank, "replicas": copies[expert]}
                    _append(tables["experts"], where | {"expert": expert, **at, "tokens": n})
                for step, topic_tokens in result.topic_tokens.items():
                    for row in _topic_rows(scenario, topic_tokens, result.topic_asked[step]):
                        _append(tables["topics"], where | {"step": step} | row)
    return tables


_NO_EXCHANGE = {"nodes_per_token": math.nan, "devices_per_token": math.nan, "inter_node_bytes": math.nan}


def merged(parts: Sequence[Mapping[str, Table]], policies: Sequence[str]) -> dict[str, Table]:
    """Put the tables of arenas together: rows by policy in the order of ``policies``, else as they were."""
    tables: dict[str, Table] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        found = [part[name] for part in parts if part.get(name)]
        rows: dict[str, list[tuple[Table, int]]] = {policy: [] for policy in policies}
        for table in found:
            for i, policy in enumerate(table["policy"]):
                rows[policy].append((table, i))
        columns = dict.fromkeys(column for table in found for column in table)
        tables[name] = {
            column: [table[column][i] if column in table else None for of in rows.values() for table, i in of]
            for column in columns
        }
    return tables


def _append(table: Table, row: Mapping[str, Any]) -> None:
    length = max((len(column) for column in table.values()), default=0)
    for key in row:
        if key not in table:
            table[key] = [None] * length
    for key, column in table.items():
        column.append(row.get(key))


def _k(scenario: Scenario, result: Counts) -> int:
    """Experts that a token asks for, on average and rounded."""
    tokens = scenario.parallel.ep_size * scenario.group_tokens * len(result.asked)
    return max(1, round(int(result.asked.sum()) / tokens))


def _layer_rows(scenario: Scenario, result: Counts, ranks: I64) -> dict[str, Any]:
    loads, steps = result.expert_tokens, len(result.expert_tokens)
    tokens = scenario.parallel.ep_size * scenario.group_tokens
    rows: dict[str, Any] = {
        "max_vio": max_vio(loads),
        "max_vio_floor": np.full(steps, uniform_max_vio(tokens, loads.shape[1], _k(scenario, result))),
        "max_vio_asked": result.asked_max_vio,
        "load_cv": coefficient_of_variation(loads),
        "least_share": least_share(loads),
        "device_max_over_mean": max_vio(ranks) + 1.0,
        "kept_affinity": result.kept_affinity,
        "dropped_share": 1.0 - loads.sum(axis=1) / np.maximum(result.asked, 1),
        "experts_per_token": result.asked / tokens,
    }
    scopes = sorted({name for scope in result.scopes.values() for name in scope})
    for name in scopes:
        rows[name] = np.full(steps, np.nan)
        for step, scope in result.scopes.items():
            rows[name][step] = scope[name]
    return rows


def _total_row(scenario: Scenario, result: Counts) -> dict[str, float]:
    loads = result.expert_tokens
    total, late = loads.sum(axis=0), loads[-max(1, len(loads) // 4) :].sum(axis=0)
    tokens = scenario.parallel.ep_size * scenario.group_tokens * len(loads)
    series = max_vio(loads)
    row = {
        "max_vio_global": float(max_vio(total)),
        "max_vio_global_floor": uniform_max_vio(tokens, loads.shape[1], _k(scenario, result)),
        "max_vio_late": float(max_vio(late)),
        "least_share": float(least_share(total)),
        "starved_1pct": float(starved_share(total, 0.01)),
        "starved_10pct": float(starved_share(total, 0.1)),
        "update_cv": float(coefficient_of_variation(total)),
        "churn": churn(loads),
        "settling_step": settling_step(series),
        "ripple": ripple(series),
        "offset_rms": result.offset_rms,
        "oracle_kept_affinity": result.oracle_kept_affinity,
        "kept_against_oracle": float(result.kept_affinity[-1]) / result.oracle_kept_affinity,
        "specialisation_bits": math.nan,
        "topic_max_vio": math.nan,
        "dropped_worst_topic": math.nan,
    }
    if result.topic_tokens:
        by_topic = np.sum(list(result.topic_tokens.values()), axis=0)
        asked = np.sum(list(result.topic_asked.values()), axis=0)
        row["specialisation_bits"] = float(mutual_information_bits(by_topic))
        row["topic_max_vio"] = float(topic_max_vio(by_topic))
        row["dropped_worst_topic"] = float(
            (1.0 - by_topic.sum(axis=1) / np.maximum(asked, 1))[asked > 0].max(initial=0.0)
        )
    return row


def _topic_rows(scenario: Scenario, topic_tokens: Any, asked: Any) -> list[dict[str, Any]]:
    kept = topic_tokens.sum(axis=1)
    return [
        {
            "topic": name,
            "modality": modality,
            "asked": int(asked[i]),
            "dropped_share": float(1.0 - kept[i] / asked[i]) if asked[i] else math.nan,
            "max_vio": float(max_vio(topic_tokens[i])) if kept[i] else math.nan,
            "load_cv": float(coefficient_of_variation(topic_tokens[i])) if kept[i] else math.nan,
            "starved_10pct": float(starved_share(topic_tokens[i], 0.1)) if kept[i] else math.nan,
        }
        | ({"expert_tokens": topic_tokens[i].tolist()} if scenario.steps.record_topic_experts else {})
        for i, (name, modality) in enumerate(zip(scenario.traffic.topics, scenario.traffic.modalities, strict=True))
    ]


def _exchange_row(scenario: Scenario, index: int, layers: list[list[Exchange]]) -> dict[str, float]:
    if not layers:
        return _NO_EXCHANGE
    policy = scenario.policies[index]
    cost, domain = scenario.cost, scenario.cluster.topology.domain(scenario.cluster)
    tokens = scenario.parallel.ep_size * scenario.group_tokens * len(layers)
    nodes = sum(int(e.node_tokens.sum()) for layer in layers for e in layer)
    ranks = sum(int(e.rank_tokens.sum()) for layer in layers for e in layer)
    copies = sum(e.inter_node_copies(domain, cost.mode) for layer in layers for e in layer)
    hidden = scenario.model_of(policy).dispatch_hidden_size
    per_copy = token_bytes(hidden, cost.dispatch_dtype) + token_bytes(hidden, cost.combine_dtype)
    passes = 2 if scenario.schedule.phase == "training" else 1
    return {
        "nodes_per_token": nodes / tokens,
        "devices_per_token": ranks / tokens,
        "inter_node_bytes": float(copies * per_copy * passes),
    }


def _moves_row(rule: Rebalance, moves: Moves | None, clock: dict[str, Any] | None) -> dict[str, float]:
    """What a new placement before this step moves, and what that adds to its time: all of it where devices wait, else what
    the exchange, busy for its part of the step, has to share its links for."""
    solver_s = 0.0 if moves is None else rule.solver_s
    moves = moves or Moves(0.0, 0.0)
    row = {"moved_bytes": moves.moved_bytes, "move_s": moves.transfer_s}
    if clock is None:
        return row | {"step_and_moves_s": math.nan}
    stall = moves.transfer_s + solver_s if rule.transfer == "stall" else moves.transfer_s * clock["communicating"]
    return row | {"step_and_moves_s": clock["makespan_ps"] / PS_PER_S + stall}


TIME_PARTS = ("attention_s", "experts_s", "other_compute_s", "exposed_communication_s", "waiting_s")


PIPELINE_PARTS = ("forward_s", "backward_s", "weight_gradients_s", "overlapped_s", "bubble_s", "optimizer_s")


def _time_row(scenario: Scenario, index: int, clock: dict[str, Any] | None) -> dict[str, float]:
    if clock is None:
        parts = PIPELINE_PARTS if scenario.pipelined else TIME_PARTS
        return dict.fromkeys(("step_time_s", *parts, "tokens_per_s_per_gpu", "usd_per_million_tokens"), np.nan)
    mean = {key: float(value.mean()) / PS_PER_S for key, value in clock["parts"].items()}
    if scenario.pipelined:
        row = {"step_time_s": clock["makespan_ps"] / PS_PER_S} | {f"{key}_s": value for key, value in mean.items()}
        return row | _price(scenario, index, row["step_time_s"])
    experts = ("experts", "experts_wgrad")
    known = {"attention", *experts, "exposed_communication", "waiting"}
    row = {
        "step_time_s": clock["makespan_ps"] / PS_PER_S,
        "attention_s": mean.get("attention", 0.0),
        "experts_s": sum(mean.get(part, 0.0) for part in experts),
        "other_compute_s": sum(value for key, value in mean.items() if key not in known),
        "exposed_communication_s": mean["exposed_communication"],
        "waiting_s": mean["waiting"],
    }
    if abs(sum(row[part] for part in TIME_PARTS) - row["step_time_s"]) > 1e-9 * row["step_time_s"]:
        raise ConservationError("C7 the reported parts do not sum to the step time")
    return row | _rate(scenario, scenario.tokens_per_rank / row["step_time_s"])


def _rate(scenario: Scenario, tokens_per_s_per_gpu: float) -> dict[str, float]:
    dollars = usd_per_million(tokens_per_s_per_gpu * 3600, 1.0, scenario.cluster.device.price_per_hour)
    return {"tokens_per_s_per_gpu": tokens_per_s_per_gpu, "usd_per_million_tokens": dollars}


def _price(scenario: Scenario, index: int, step_time_s: float) -> dict[str, float]:
    """What a pipelined step means in tokens, utilisation, device hours, money and energy.

    Model FLOPs: three times the forward pass with causal attention, MTP modules and recomputation left out, over the
    bf16 peak whatever the format (arXiv 2505.09343, Table 4). Energy: every device at its board limit.
    """
    policy, device = scenario.policies[index], scenario.cluster.device
    parallel, model = scenario.parallel_of(policy), scenario.model_of(policy)
    devices = parallel.devices
    tokens = scenario.tokens_per_rank * parallel.ep_size * parallel.ep_groups
    flops = model.training_flops_per_token(scenario.schedule.sequence_length) * tokens / (devices * step_time_s)
    hours = devices * step_time_s / tokens * 1e12 / 3600
    return _rate(scenario, tokens / (devices * step_time_s)) | {
        "tokens_per_day": tokens / step_time_s * 86400,
        "model_flops_per_s_per_gpu": flops,
        "mfu": flops / device.peak("bf16"),
        "gpu_hours_per_trillion": hours,
        "usd_per_trillion": math.nan if device.price_per_hour is None else hours * device.price_per_hour,
        "energy_j_per_trillion": hours * 3600 * device.power_w,
    }
