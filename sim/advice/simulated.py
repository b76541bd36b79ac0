"""A scenario's traffic through the gate of one of its policies, and what it says of devices, units and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sim.advice import Serving
from sim.advice.batches import FEW_WINDOWS, TYPICAL, WINDOWS
from sim.advice.inputs import Inputs
from sim.advice.recording import record
from sim.cost import Mode
from sim.deployment import Unit
from sim.gating.select.balanced import Balanced
from sim.loading import load
from sim.pool import spread_layers
from sim.scenario import Scenario
from sim.settings import Policy
from sim.traces import RecordedTrace
from sim.unitmemory import kv_cache_tokens

BUDGET = 12_000_000
"""Tokens x layers of a scenario that are routed unasked: about half a minute on one core."""
MOST = 100_000_000
"""The same with --batches: a few minutes, and about 2 GB."""
_BATCHES = 40 * WINDOWS
_ENOUGH = 14 * WINDOWS
"""Batches for which layers are given up."""


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
    scenario = load(path)
    index = _policy(scenario, policy)
    sets = _overrides(scenario, index, folder, cluster, ep_size, phases)
    scenario = load(path, sets) if sets else scenario
    arena = next(arena for arena in scenario.arenas() if index in arena.indices)
    alone = arena.scenario
    gate = alone.policies[arena.indices.index(index)]
    found: dict[Serving, Inputs] = {}
    recorded: dict[tuple[int, int, int], RecordedTrace] = {}
    for phase in phases or ("decode", "prefill"):
        unit = _unit(alone, phase)
        if alone.serving is not None and unit is None:
            if phases:
                raise ValueError(f"--phase {phase}: scenario {scenario.name} has no unit for it")
            continue
        found[phase] = _inputs(alone, gate, unit, phase, tokens_per_rank, layers, batches, recorded)
    return found


def _policy(scenario: Scenario, name: str | None) -> int:
    able = [i for i, each in enumerate(scenario.policies) if scenario.model_of(each).is_moe]
    if name is None:
        gated = [i for i in able if not isinstance(scenario.policies[i].select, Balanced)]
        chosen = (gated or able)[:1]
    else:
        chosen = [i for i in able if scenario.policies[i].name == name]
    if not chosen:
        known = ", ".join(scenario.policies[i].name for i in able) or "none: no model here has experts"
        raise ValueError(f"--policy must be one of {known} [got {name or ''!r}]")
    return chosen[0]


def _overrides(
    scenario: Scenario,
    index: int,
    folder: Path,
    cluster: str | None,
    ep_size: int | None,
    phases: Sequence[Serving] | None,
) -> list[str]:
    """Return what ``cluster`` and ``ep_size`` replace: the policy's own cluster and split, or the scenario's or units'."""
    policy, sets = scenario.policies[index], []
    if cluster is not None:
        owner = f"policies.{index}." if policy.cluster is not None else ""
        sets.append(f"{owner}cluster.extends={folder / 'clusters' / cluster}.yaml")
    if ep_size is not None:
        if policy.parallel is not None:
            sets.append(f"policies.{index}.parallel.ep_size={ep_size}")
        elif scenario.serving is None:
            sets.append(f"parallel.ep_size={ep_size}")
        else:
            units = [_unit(scenario, phase) for phase in phases or ("decode", "prefill")]
            sets += [
                f"serving.units.{j}.parallel.ep_size={ep_size}"
                for j, unit in enumerate(scenario.serving.units)
                if unit in units
            ]
    return sets


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
    recorded: dict[tuple[int, int, int], RecordedTrace],
) -> Inputs:
    """Return one phase of ``policy``. recorded: traffic by EP size, layers and tokens, which is added to."""
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
    key = (ranks, kept, wanted)
    if key not in recorded:
        recorded[key] = record(scenario, policy, spread_layers(model, kept), wanted)
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
