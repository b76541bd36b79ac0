"""A scenario's traffic through the gate of one of its policies, and what it says of devices, units and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sim.advice import Serving
from sim.advice.batches import FEW_WINDOWS, TYPICAL, WINDOWS
from sim.advice.guess import load as load_named
from sim.advice.inputs import Inputs
from sim.advice.options import least_redundant
from sim.advice.recording import record
from sim.checks import problems
from sim.cluster import Cluster
from sim.cost import Mode
from sim.deployment import Unit
from sim.gating.select.balanced import Balanced
from sim.loading import load
from sim.located import dotted
from sim.placement.linear import Linear
from sim.pool import spread_layers
from sim.replicas.static import Static
from sim.scenario import Scenario
from sim.settings import Policy, Rebalance
from sim.traces import RecordedTrace
from sim.unitmemory import kv_cache_tokens

BUDGET = 12_000_000
"""Tokens x layers of a scenario that are routed unasked: about half a minute on one core."""
MOST = 100_000_000
"""The same with --batches: a few minutes, and about 2 GB."""
_BATCHES = 40 * WINDOWS
_ENOUGH = 14 * WINDOWS
"""Batches for which layers are given up."""
_RUN = 256
"""Tokens of a sequence that are recorded for a decode unit: its batch is of as many sequences as it has tokens, and a trace
of few long ones would show the topics of these few."""


def of_scenario(
    path: str,
    folder: Path,
    *,
    phases: Sequence[Serving] | None,
    policy: str | None,
    model: str | None,
    cluster: str | None,
    ep_size: int | None,
    tokens_per_rank: int | None,
    layers: int,
    batches: int | None,
) -> dict[Serving, Inputs]:
    """Return, by phase, the traffic of the scenario at ``path`` through the gate of ``policy``, on that policy's devices.

    In a scenario that serves requests, those of the unit that does the phase, in batches of what the unit takes. phases:
    None: all that there are units for. policy: None: the first whose routing is a gate's. batches: to record, None: as
    many as ``BUDGET`` allows.

    Raises ScenarioError (a ValueError) for a bad scenario, and ValueError for what cannot be asked of one.
    """
    if model is not None:
        raise ValueError("--model is for traces: a scenario has its own")
    whole = load(path)
    scenario, gate = _alone(whole, _policy(whole, policy), folder, cluster, ep_size)
    found: dict[Serving, Inputs] = {}
    recorded: dict[tuple[int, int, int, int | None], RecordedTrace] = {}
    for phase in phases or ("decode", "prefill"):
        unit = _unit(scenario, phase)
        if scenario.serving is not None and unit is None:
            if phases:
                raise ValueError(f"--phase {phase}: scenario {scenario.name} has no unit for it")
            continue
        found[phase] = _inputs(scenario, gate, unit, phase, tokens_per_rank, layers, batches, recorded)
    return found


def _policy(scenario: Scenario, name: str | None) -> Policy:
    able = [each for each in scenario.policies if scenario.model_of(each).is_moe]
    if name is None:
        gated = [each for each in able if not isinstance(each.select, Balanced)]
        chosen = (gated or able)[:1]
    else:
        chosen = [each for each in able if each.name == name]
    if not chosen:
        known = ", ".join(each.name for each in able) or "none: no model here has experts"
        raise ValueError(f"--policy must be one of {known} [got {name or ''!r}]")
    return chosen[0]


def _alone(
    scenario: Scenario, policy: Policy, folder: Path, cluster: str | None, ep_size: int | None
) -> tuple[Scenario, Policy]:
    """Return the scenario of ``policy`` alone and the policy in it, on its own devices or those asked for.

    Its own placement is dropped: what it should be is the question. Another cluster has at least as many devices. Raises ValueError for what then does not go together.
    """
    changes: dict[str, Any] = {}
    redundant = policy.placement.num_redundant_experts
    if ep_size is not None:
        redundant = least_redundant(scenario.model_of(policy).n_routed_experts, ep_size)
    placement = Linear(num_redundant_experts=redundant)
    policy = policy.model_copy(update={"placement": placement, "replicas": Static(), "rebalance": Rebalance()})
    if cluster is not None:
        old = policy.cluster or scenario.cluster
        new = load_named(Cluster, cluster, folder / "clusters", "--cluster")
        nodes = max(new.nodes, -(-old.n_devices // new.devices_per_node))
        changes["cluster"] = new.model_copy(update={"nodes": nodes})
        policy = policy.model_copy(update={"cluster": None})
    if ep_size is not None:
        policy_split = policy.parallel
        changes["parallel"] = (policy_split or scenario.parallel).model_copy(update={"ep_size": ep_size})
        policy = policy.model_copy(update={"parallel": None})
        if scenario.serving is not None:
            units = tuple(
                unit.model_copy(
                    update={
                        "parallel": (policy_split or unit.parallel).model_copy(update={"ep_size": ep_size}),
                        "count": max(1, unit.count * unit.parallel.ep_size // ep_size),
                    }
                )
                for unit in scenario.serving.units
            )
            changes["serving"] = scenario.serving.model_copy(update={"units": units})
    found = scenario.model_copy(update={**changes, "policies": (policy,)}).arenas()[0].scenario
    for path, rule in problems(found) if changes else ():
        given = " ".join(f"--{name} {value}" for name, value in (("cluster", cluster), ("ep-size", ep_size)) if value)
        raise ValueError(f"{given}: {dotted(path)}: {rule}")
    return found, found.policies[0]


def _unit(scenario: Scenario, phase: Serving) -> Unit | None:
    """Return the first unit that does ``phase``."""
    units = scenario.serving.units if scenario.serving else ()
    return next((unit for unit in units if unit.role in (phase, "mixed")), None)


def _inputs(
    scenario: Scenario,
    policy: Policy,
    unit: Unit | None,
    phase: Serving,
    tokens_per_rank: int | None,
    layers: int,
    batches: int | None,
    recorded: dict[tuple[int, int, int, int | None], RecordedTrace],
) -> Inputs:
    """Return one phase of ``policy``. recorded: traffic by EP size, layers, tokens and run, which is added to."""
    model, notes = scenario.model_of(policy), []
    tokens, mode, room = tokens_per_rank, None, None
    if unit is not None:
        scenario = scenario.model_copy(update={"parallel": unit.parallel})
        share = unit.parallel.tp_size
        asked = unit.max_num_seqs if phase == "decode" else unit.max_num_batched_tokens
        tokens = tokens or max(1, asked // share)
        mode = _mode(scenario, unit)
        room = _room(scenario, policy, unit)
        notes = [f"{phase} on unit {unit.name!r}: EP size {unit.parallel.ep_size}, DeepEP's {mode} kernels"]
        if share > 1:
            notes.append(f"attention is timed as if data-parallel, each rank with 1 / {share} of the unit's batch")
        if unit.micro_batches > 1:
            notes.append("micro-batches are not interleaved: nothing hides communication")
    ranks = scenario.parallel.ep_size
    usual = tokens or max(scenario.tokens_per_rank, TYPICAL["decode"])
    kept, wanted = _amount(ranks, usual, min(layers, model.n_moe_layers), batches, fixed=tokens is not None)
    run = _RUN if unit is not None and phase == "decode" else None
    key = (ranks, kept, wanted, run)
    if key not in recorded:
        recorded[key] = record(scenario, policy, spread_layers(model, kept), wanted, run)
    trace = recorded[key]
    note = f"traffic and gate of policy {policy.name!r} of scenario {scenario.name}, {trace.n_tokens:,} tokens"
    return Inputs(
        trace, model, scenario.cluster, scenario.cost, ranks, (note, *notes), tokens, mode, room, simulated=True
    )


def _mode(scenario: Scenario, unit: Unit) -> Mode:
    return unit.mode or ("low_latency" if unit.role == "decode" else scenario.cost.mode)


def _room(scenario: Scenario, policy: Policy, unit: Unit) -> Callable[[int], float]:
    """Return tokens of cache on one device by the number of redundant experts."""
    return partial(_cache_tokens, scenario, policy, unit)


def _cache_tokens(scenario: Scenario, policy: Policy, unit: Unit, redundant: int) -> float:
    placement = policy.placement.model_copy(update={"num_redundant_experts": redundant})
    held = policy.model_copy(update={"placement": placement})
    return kv_cache_tokens(scenario, held, unit) / unit.parallel.tp_size


def _amount(ranks: int, tokens: int, layers: int, batches: int | None, *, fixed: bool) -> tuple[int, int]:
    """Return the layers and tokens to record. fixed: batches have ``tokens`` per rank, however few that makes."""
    size = ranks * tokens
    if batches is not None:
        if batches * size * layers > MOST:
            raise ValueError(
                f"--batches {batches}: {batches:,} x {ranks} ranks x {tokens:,} tokens x {layers} layers = "
                f"{batches * size * layers:,} choices to record; at most {MOST:,}: take fewer --layers or --tokens-per-rank"
            )
        return layers, batches * size
    if not fixed:
        return layers, min(_BATCHES * size, BUDGET // layers)
    if FEW_WINDOWS * size > BUDGET:
        raise ValueError(
            f"--tokens-per-rank {tokens}: {FEW_WINDOWS} batches of {ranks} ranks x {tokens:,} tokens = {FEW_WINDOWS * size:,} "
            f"tokens; at most {BUDGET:,} are recorded"
        )
    kept = max(1, min(layers, BUDGET // (_ENOUGH * size)))
    return kept, min(_BATCHES * size, BUDGET // kept)
