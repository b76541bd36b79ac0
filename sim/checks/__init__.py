"""The rules that hold between the parts of a scenario: everything that a single field cannot know is wrong."""

from __future__ import annotations

from collections.abc import Iterator

from sim.checks import gates, serving, steps
from sim.checks.rule import Rule
from sim.scenario import Scenario


def problems(scenario: Scenario) -> Iterator[Rule]:
    """Yield ``(path, rule)`` for everything that is wrong between the parts."""
    names = [policy.name for policy in scenario.policies]
    for i, policy in enumerate(scenario.policies):
        if policy.name in names[:i]:
            yield ("policies", i, "name"), f"another policy is called {policy.name!r}"
        yield from gates.problems(scenario, i, policy)
    for i, assumed in enumerate(scenario.router_dynamics):
        if not assumed.assumes:
            yield ("router_dynamics", i), f"{assumed.kind} balances a gate: put it into a policy's balance"
    yield from (steps if scenario.serving is None else serving).problems(scenario)
    cluster = scenario.cluster
    if cluster.inter_node is None and cluster.topology.domain(cluster) < cluster.n_devices:
        yield ("cluster", "inter_node"), f"{cluster.nodes} nodes need a link between them"
    try:
        scenario.cost.compute.gemm_s(
            scenario.cluster.device,
            tokens=1,
            in_features=1,
            out_features=1,
            dtype=scenario.cost.gemm_dtype,
        )
    except ValueError as error:
        key = "compute" if str(error).startswith(scenario.cost.compute.kind) else "gemm_dtype"
        yield ("cost", key), str(error)


__all__ = ["Rule", "problems"]
