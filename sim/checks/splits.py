"""Rules of how a model is split over devices, and of where its experts are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sim.checks.rule import Path, Rule
from sim.placement import Observed
from sim.rng import stream
from sim.scenario import Scenario
from sim.settings import Parallel, Policy


def split_problems(scenario: Scenario, where: Path, policy: Policy, parallel: Parallel) -> Iterator[Rule]:
    """Sizes that must divide or fit. where: of ``parallel`` in the scenario."""
    model = scenario.model_of(policy)
    devices, per_node = scenario.cluster.n_devices, scenario.cluster.devices_per_node
    domain = scenario.cluster.topology.domain(scenario.cluster)
    if parallel.ep_size > devices:
        yield (
            (*where, "ep_size"),
            f"{parallel.ep_size} ranks need as many devices; the cluster has {scenario.cluster.nodes} nodes x "
            f"{per_node} = {devices}",
        )
    elif parallel.ep_size > domain and parallel.ep_size % domain:
        yield (*where, "ep_size"), f"must fill whole nodes of {domain} devices"
    if per_node % parallel.tp_size:
        yield (*where, "tp_size"), f"must divide devices_per_node = {per_node}"
    elif parallel.ep_size % parallel.tp_size:
        yield (*where, "tp_size"), f"must divide ep_size = {parallel.ep_size}"
    if parallel.pp_size > model.num_hidden_layers:
        yield (*where, "pp_size"), f"must be <= num_hidden_layers = {model.num_hidden_layers}"


def hosting_problems(scenario: Scenario, at: Path, where: Path, policy: Policy, parallel: Parallel) -> Iterator[Rule]:
    """Slots that do not divide, and placements that refuse them. at: of the policy."""
    model, placement = scenario.model_of(policy), policy.placement
    redundant = placement.num_redundant_experts
    try:
        slots = scenario.slots(policy, parallel)
    except ValueError:
        if redundant:
            yield (
                (*at, "placement", "num_redundant_experts"),
                f"{model.n_routed_experts} + {redundant} slots must be a multiple of ep_size = {parallel.ep_size}",
            )
        else:
            yield (
                (*where, "ep_size"),
                f"must divide n_routed_experts = {model.n_routed_experts} (or set placement.num_redundant_experts)",
            )
        return
    try:
        nothing = Observed.nothing(1, model.n_routed_experts)
        placement.place(slots, nothing, stream(scenario.seed, "placement", "checked"))
    except ValueError as error:
        yield (*at, "placement"), str(error)
    if slots.n_slots > np.iinfo(np.int16).max:
        yield (*at, "placement", "num_redundant_experts"), f"{slots.n_slots} slots, at most {np.iinfo(np.int16).max}"
