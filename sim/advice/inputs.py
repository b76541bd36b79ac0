"""Recorded choices, and the model, cluster and cost laws to time them with; of a trace here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sim.advice.guess import cost_of, ep_size_of, load, model_of
from sim.cluster import Cluster, build_network
from sim.cost import Mode
from sim.model import Model
from sim.settings import Cost
from sim.traces import RecordedTrace, read


class Inputs(NamedTuple):
    """notes: what was guessed, one sentence each. tokens_per_rank: batch of a rank, None: as the trace allows. mode,
    cache_tokens: see `sim.advice.Setup`. simulated: from a scenario."""

    trace: RecordedTrace
    model: Model
    cluster: Cluster
    cost: Cost
    ep_size: int
    notes: tuple[str, ...]
    tokens_per_rank: int | None = None
    mode: Mode | None = None
    cache_tokens: Callable[[int], float] | None = None
    simulated: bool = False


def of_trace(
    path: str, folder: Path, *, experts: int | None, model: str | None, cluster: str | None, ep_size: int | None
) -> Inputs:
    """Return the trace at ``path`` with the model and cluster named, or guessed from ``folder``, the shipped scenarios.

    Raises ValueError for a bad trace, unknown names, a model that has other experts than the trace, and ranks that the
    cluster cannot join.
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
    else:
        try:
            build_network(machine, ranks)
        except ValueError as error:
            raise ValueError(f"--ep-size: {error}") from None
    return Inputs(trace, found, machine, cost_of(machine.device), ranks, tuple(notes))
