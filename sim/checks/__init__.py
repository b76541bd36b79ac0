"""The rules that hold between the parts of a scenario: everything that a single field cannot know is wrong."""

from __future__ import annotations

from collections.abc import Iterator

from sim.checks import gates, serving, steps
from sim.checks.rule import Path, Rule
from sim.scenario import Arena, Scenario


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
    if scenario.serving is not None and len(scenario.serving.units) > 1:
        for i, policy in enumerate(scenario.policies):
            if policy.parallel is not None:
                yield ("policies", i, "parallel"), "is for a serving block of one unit; set serving.units"
                return
    for arena in scenario.arenas():
        for path, rule in _arena_problems(arena.scenario):
            yield _in_whole(scenario, arena, path), rule


def _arena_problems(scenario: Scenario) -> Iterator[Rule]:
    yield from (steps if scenario.serving is None else serving).problems(scenario)
    cluster = scenario.cluster
    if cluster.inter_node is None and cluster.topology.domain(cluster) < cluster.n_devices:
        yield ("cluster", "inter_node"), f"{cluster.nodes} nodes need a link between them"
    try:
        scenario.cost.compute.gemm_s(
            cluster.device, tokens=1, in_features=1, out_features=1, dtype=scenario.cost.gemm_dtype
        )
    except ValueError as error:
        key = "compute" if str(error).startswith(scenario.cost.compute.kind) else "gemm_dtype"
        yield ("cost", key), str(error)


def _in_whole(scenario: Scenario, arena: Arena, path: Path) -> Path:
    """Where a problem of an arena's scenario is in the whole one."""
    first = scenario.policies[arena.indices[0]]
    if path[0] == "policies":
        return ("policies", arena.indices[int(path[1])], *path[2:])
    if path[0] == "cluster" and first.cluster is not None:
        return ("policies", arena.indices[0], *path)
    own_split = arena.scenario.parallel != scenario.parallel or path[:2] == ("serving", "units")
    if first.parallel is not None and own_split and "parallel" in path:
        return ("policies", arena.indices[0], *path[path.index("parallel") :])
    return path


__all__ = ["Rule", "problems"]
