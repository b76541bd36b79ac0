"""From a trace or a scenario to recorded choices, and the model, cluster and cost laws to time them with."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sim.advice.batches import TYPICAL, WINDOWS
from sim.advice.guess import cost_of, ep_size_of, load, model_of
from sim.advice.recording import record
from sim.cluster import Cluster
from sim.model import Model
from sim.pool import spread_layers
from sim.settings import Cost
from sim.traces import RecordedTrace, read

BUDGET = 12_000_000
"""Tokens x layers of a scenario that are routed: about half a minute on one core."""
_BATCHES = 40 * WINDOWS


class Inputs(NamedTuple):
    """notes: what was guessed, one sentence each."""

    trace: RecordedTrace
    model: Model
    cluster: Cluster
    cost: Cost
    ep_size: int
    notes: tuple[str, ...]


def of_trace(
    path: str, folder: Path, *, experts: int | None, model: str | None, cluster: str | None, ep_size: int | None
) -> Inputs:
    """Return the trace at ``path`` with the model and cluster named, or guessed from ``folder``, the shipped scenarios.

    Raises ValueError for a bad trace, unknown names, and a model that has other experts than the trace.
    """
    if model is None:
        trace = read(path, experts)
        found, note = model_of(trace.n_routed_experts, trace.topk_ids.shape[2], len(trace.layers), folder / "models")
        notes = [note]
    else:
        found, notes = load(Model, model, folder / "models", "--model"), []
        trace = read(path, experts or found.n_routed_experts)
    k = trace.topk_ids.shape[2]
    if (found.n_routed_experts, found.num_experts_per_tok) != (trace.n_routed_experts, k):
        raise ValueError(
            f"model {found.name} has {found.n_routed_experts} experts, {found.num_experts_per_tok} per token; {path} has "
            f"{trace.n_routed_experts}, {k}: give another --model"
        )
    machine = load(Cluster, cluster or "h100", folder / "clusters", "--cluster")
    if cluster is None:
        notes.append("cluster h100, the default")
    ranks = ep_size or ep_size_of(trace.n_routed_experts, machine)
    if ep_size is None:
        notes.append(f"EP size {ranks}, the default: one node")
    return Inputs(trace, found, machine, cost_of(machine.device), ranks, tuple(notes))


def of_scenario(
    path: str,
    folder: Path,
    *,
    policy: str | None,
    model: str | None,
    cluster: str | None,
    ep_size: int | None,
    tokens_per_rank: int | None,
    layers: int,
) -> Inputs:
    """Return the traffic of the scenario at ``path`` through the gate of one of its policies.

    Raises ScenarioError (a ValueError) for a bad scenario, and ValueError for what cannot be asked of one.
    """
    from sim.loading import load as load_scenario

    if model is not None:
        raise ValueError("--model is for traces: a scenario has its own")
    sets = [f"cluster.extends={folder / 'clusters' / cluster}.yaml"] if cluster else []
    sets += [f"parallel.ep_size={ep_size}"] if ep_size else []
    scenario = load_scenario(path, sets)
    known = [each.name for each in scenario.policies if scenario.model_of(each).is_moe]
    chosen = policy or (known[0] if known else "")
    if chosen not in known:
        raise ValueError(
            f"--policy must be one of {', '.join(known) or 'none: no model here has experts'} [got {chosen!r}]"
        )
    gate = next(each for each in scenario.policies if each.name == chosen)
    found, ranks = scenario.model_of(gate), scenario.parallel.ep_size
    wanted = _BATCHES * ranks * (tokens_per_rank or max(scenario.tokens_per_rank, TYPICAL["decode"]))
    held = max(1, min(layers, BUDGET // wanted)) if tokens_per_rank else layers
    trace = record(scenario, gate, spread_layers(found, held), min(wanted, BUDGET // held))
    note = f"traffic and gate of policy {chosen!r} of scenario {scenario.name}, {trace.n_tokens:,} tokens"
    return Inputs(trace, found, scenario.cluster, scenario.cost, ranks, (note,))
