"""Policies x replicas -> results: cut the work into tasks, run them on one or more processes, tabulate.

Results do not depend on the number of processes: every task is a pure function of the scenario, and tables are filled
in the order of policies, replicas, steps and layers.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sim import rollout
from sim.checks import problems
from sim.cluster import build_network
from sim.conservation import ConservationError, check_time
from sim.engine import breakdown, des, maxplus, violations
from sim.engine.chunks import ChunkTimes
from sim.engine.durations import slowdowns
from sim.engine.moves import Moves, transfer
from sim.engine.recording import recorded_step
from sim.engine.step import pipelined_step, programs, recorded_pipeline
from sim.engine.training import Work, build_plan
from sim.estimate import Estimate, TooBig, estimate
from sim.exchange import Exchange
from sim.loading import load
from sim.matrices import traffic_tables
from sim.results import Result, Table, per_replica, summarise
from sim.rollout import LAYERS_PER_TASK, Task, shape_of
from sim.scenario import Scenario
from sim.tables import merged, tabulate
from sim.tally import Counts
from sim.tokens import I64
from sim.traffic import TrafficShape
from sim.workers import Workers, processes, watched


def run(
    source: Any,
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    jobs: int | None = 1,
    force: bool = False,
    progress: bool = False,
    timeline: bool = False,
) -> Result:
    """Run a scenario and return its `sim.results.Result`.

    source: a scenario file's path, plain data, or a `Scenario`. overrides: ``{"policies.0.select.topk_group": 2}`` or
    ``["seed=3"]``. jobs: processes; None = as many as cores where that pays. Workers import the calling script, so more
    than one needs ``if __name__ == "__main__":`` in it, and plug-ins that live in an importable module. force: run even
    if the estimate says that it is too big. progress: a bar on stderr. timeline: keep what `sim.timeline` draws. Raises
    `sim.yamlfile.ScenarioError` or `sim.estimate.TooBig`.
    """
    sets = [f"{k}={json.dumps(v)}" for k, v in overrides.items()] if isinstance(overrides, Mapping) else list(overrides)
    if isinstance(source, Scenario):
        scenario = load(source.model_dump(mode="json", exclude_none=True), sets) if sets else source.resolved()
        found = [f"{'.'.join(map(str, path))}: {rule}" for path, rule in problems(scenario)]
        if found:
            raise ValueError("; ".join(found))
    else:
        scenario = load(source, sets)
    expected = estimate(scenario)
    if expected.too_big and not force:
        raise TooBig(expected)
    return simulate(scenario, jobs, expected, progress, record=timeline)


def _tasks(scenario: Scenario) -> list[Task]:
    """Cut the routing into (replica, traffic shape, block of layers)."""
    groups: dict[TrafficShape, list[int]] = {}
    for i, policy in enumerate(scenario.policies):
        if scenario.model_of(policy).is_moe:
            groups.setdefault(shape_of(scenario, policy), []).append(i)
    tasks = []
    for replica in range(scenario.replicas):
        for indices in groups.values():
            n = scenario.model_of(scenario.policies[indices[0]]).n_moe_layers
            for start in range(0, n, LAYERS_PER_TASK):
                tasks.append(Task(scenario, tuple(indices), replica, range(start, min(n, start + LAYERS_PER_TASK))))
    return tasks


def _time_step(job: tuple[Scenario, int, list[list[Exchange]], int | None]) -> dict[str, Any]:
    """Build and time one policy's step; returns parts [P] in picoseconds, the makespan and the event count, and if the job
    names the step, its record."""
    scenario, index, exchanges, step = job
    policy = scenario.policies[index]
    network = build_network(scenario.cluster, scenario.parallel_of(policy).ep_size)
    plan = build_plan(Work(scenario, policy, network, exchanges))
    engine = des if scenario.schedule.engine == "simpy" else maxplus
    timeline = engine.simulate(plan)
    broken = violations(plan, timeline)
    if broken:
        raise ConservationError("; ".join(broken))
    parts = breakdown(plan, timeline)
    check_time(parts, timeline.makespan_ps)
    talking = [i for i, op in enumerate(plan.ops) if op.stream != "compute"]
    spent = int((timeline.end_ps[talking] - timeline.start_ps[talking]).sum())
    return {
        "parts": parts,
        "makespan_ps": timeline.makespan_ps,
        "events": timeline.n_events,
        "communicating": spent / max(1, timeline.makespan_ps * plan.n_ranks),
        "recorded": None if step is None else recorded_step(scenario, index, step, plan, timeline, exchanges),
    }


def _recorded(scenario: Scenario, replica: int, step: int) -> bool:
    """Whether a run that records keeps this step: the last timed one of the first replica."""
    return replica == 0 and step == scenario.timed_steps()[-1]


def _moves(scenario: Scenario, counts: Mapping[tuple[int, int], list[Counts]]) -> dict[tuple[int, int, int], Moves]:
    """What every new placement moves, by (replica, policy, step)."""
    found: dict[tuple[int, int, int], Moves] = {}
    for (replica, index), layers in counts.items():
        steps = sorted({step for layer in layers for step in layer.moves})
        if steps:
            policy = scenario.policies[index]
            network = build_network(scenario.cluster, scenario.parallel_of(policy).ep_size)
            for step in steps:
                sent = [layer.moves[step] for layer in layers if step in layer.moves]
                found[replica, index, step] = transfer(scenario, policy, network, sent)
    return found


@dataclass(frozen=True)
class _Stages:
    """A unit of pipelined work: the pipeline ranks ``ranks``, which hold the same stages, for policies of one shape.

    layers: MoE layers (0-based) that these stages route; of them ``own`` are reported here, the others (that of an MTP
    module) by whoever holds them.
    """

    scenario: Scenario
    policies: tuple[int, ...]
    replica: int
    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    own: tuple[int, ...]


def _stage_jobs(scenario: Scenario) -> list[_Stages]:
    """Cut a pipelined run into (replica, policies of one shape, ranks that share their stages)."""
    alike: dict[Any, list[int]] = {}
    for i, policy in enumerate(scenario.policies):
        model = scenario.model_of(policy)
        shape = shape_of(scenario, policy) if model.is_moe else i
        alike.setdefault((shape, scenario.stages(policy)), []).append(i)
    jobs = []
    for replica in range(scenario.replicas):
        for (_, stages), indices in alike.items():
            model = scenario.model_of(scenario.policies[indices[0]])
            number = {layer: i for i, layer in enumerate(model.moe_layers)}
            together: dict[tuple[int, ...], list[int]] = {}
            for rank in range(len(stages)):
                together.setdefault(scenario.schedule.pipeline.stages(rank, len(stages)), []).append(rank)
            for held, ranks in together.items():
                blocks = [block for stage in held for block in stages[stage] if block.kind == "moe"]
                own = sorted({number[block.layer] for block in blocks if block.number == block.layer})
                layers = sorted({number[block.layer] for block in blocks})
                jobs.append(_Stages(scenario, tuple(indices), replica, tuple(ranks), tuple(layers), tuple(own)))
    return jobs


Times = dict[tuple[int, int, int, int], I64]  # (policy, step, pipeline rank, group) -> times of its chunks


def _run_stages(job: _Stages) -> tuple[list[Counts], Times]:
    """Route the layers of the job's stages and time their chunks; of the exchanges only the sums are kept."""
    scenario, times = job.scenario, Times()
    counts = rollout.run(Task(scenario, job.policies, job.replica, job.layers)) if job.layers else []
    for index in job.policies:
        policy = scenario.policies[index]
        parallel, plan, slow = scenario.parallel_of(policy), programs(scenario, policy), slowdowns(scenario, policy)
        network = build_network(scenario.cluster, parallel.ep_size)
        stages = scenario.stages(policy)
        held = {stage: stages[stage] for stage in scenario.schedule.pipeline.stages(job.ranks[0], parallel.pp_size)}
        mine = [result for result in counts if result.policy == index]
        for step in scenario.timed_steps():
            exchanges = {result.layer: Exchange.stack(result.exchanges[step]) for result in mine}
            chunk = ChunkTimes(scenario, policy, network, held, exchanges)
            for rank in job.ranks:
                for group in range(parallel.ep_groups):
                    times[index, step, rank, group] = chunk.times_ps(plan[rank], group, slow[rank, group])
            chunk.check()
        for result in mine:
            result.exchanges = {step: [Exchange.sum(found)] for step, found in result.exchanges.items()}
    return [result for result in counts if result.layer in job.own], times


def _simulate_pipelined(
    scenario: Scenario, jobs: int | None, expected: Estimate, progress: bool, record: bool
) -> Result:
    """As `simulate`, where steps pass a pipeline."""
    work = _stage_jobs(scenario)
    with Workers(processes(jobs, len(work), expected)) as workers:
        done = list(watched(workers.map(_run_stages, work), len(work), "stages", progress))
    counts: dict[tuple[int, int], list[Counts]] = {}
    chunk_ps: dict[tuple[int, int, int], dict[tuple[int, int], I64]] = {}
    for job, (results, times) in zip(work, done, strict=True):
        for result in results:
            counts.setdefault((job.replica, result.policy), []).append(result)
        for (index, step, rank, group), found in times.items():
            chunk_ps.setdefault((job.replica, index, step), {})[rank, group] = found
    for found_counts in counts.values():
        found_counts.sort(key=lambda result: result.layer)
    timing = {
        (replica, index, step): pipelined_step(scenario, scenario.policies[index], found)
        for (replica, index, step), found in sorted(chunk_ps.items())
    }
    for clock in timing.values():
        check_time(clock["parts"], clock["makespan_ps"])
    recorded = tuple(
        recorded_pipeline(scenario, scenario.policies[index], step, found)
        for (replica, index, step), found in sorted(chunk_ps.items())
        if record and _recorded(scenario, replica, step)
    )
    tables = tabulate(scenario, counts, timing) | traffic_tables(scenario, counts)
    return Result(
        scenario, tables, summarise(tables, scenario), sum(int(t["events"]) for t in timing.values()), recorded
    )


def simulate(
    scenario: Scenario, jobs: int | None, expected: Estimate, progress: bool = False, record: bool = False
) -> Result:
    """Run a checked scenario; see `run`. record: keep the first replica's last timed step, or all of its service, for
    `sim.timeline`."""
    arenas = scenario.arenas()
    if len(arenas) > 1 or arenas[0].scenario is not scenario:
        parts = [simulate(arena.scenario, jobs, estimate(arena.scenario), progress, record) for arena in arenas]
        names = [policy.name for policy in scenario.policies]
        tables = merged([part.tables for part in parts], names)
        kept = sorted((kept for part in parts for kept in part.recorded), key=lambda kept: names.index(kept.policy))
        return Result(scenario, tables, summarise(tables, scenario), sum(part.n_events for part in parts), tuple(kept))
    if scenario.serving is not None:
        from sim.serve import simulate as serve

        return serve(scenario, jobs, expected, progress, record)
    if scenario.pipelined:
        return _simulate_pipelined(scenario, jobs, expected, progress, record)
    with Workers(processes(jobs, len(_tasks(scenario)), expected)) as workers:
        return _timed(_routed(scenario, workers, progress), scenario, workers, progress, record)


@dataclass(frozen=True)
class Routed:
    """What the gates of ``scenario`` did with its tokens, by (replica, policy); costs and rates play no part in it."""

    scenario: Scenario
    counts: Mapping[tuple[int, int], list[Counts]]


def separable(scenario: Scenario) -> bool:
    """Whether routing and timing of ``scenario`` are two stages, so that `timed` can use one `route` many times."""
    priced = any("rank_times_s" in policy.placement.needs for policy in scenario.policies)  # placed by what it costs
    return len(scenario.arenas()) == 1 and scenario.serving is None and not scenario.pipelined and not priced


def route(scenario: Scenario, jobs: int | None, expected: Estimate, progress: bool = False) -> Routed:
    """Route the tokens of a checked scenario that is `separable`, and time nothing."""
    with Workers(processes(jobs, len(_tasks(scenario)), expected)) as workers:
        return _routed(scenario, workers, progress)


def timed(routed: Routed, scenario: Scenario) -> Result:
    """Time ``scenario`` on one process with the routing of another that differs in costs and rates alone. Raises ValueError
    if they differ in anything that routing depends on."""
    _check_same_routing(routed, scenario)
    with Workers(1) as workers:
        return _timed(routed, scenario, workers, False, False)


def timed_rows(routed: Routed, scenario: Scenario) -> Table:
    """Return `sim.results.per_replica` of what `timed` would return, in half the time: of figures that need the routing's
    own tables there is none (NaN)."""
    _check_same_routing(routed, scenario)
    with Workers(1) as workers:
        timing = dict(_clocks(routed, scenario, workers, False, False))
    return per_replica(tabulate(scenario, {}, timing, _moves(scenario, routed.counts)), scenario)


def _check_same_routing(routed: Routed, scenario: Scenario) -> None:
    strange = [name for name, of in _ROUTING.items() if of(scenario) != of(routed.scenario)]
    if strange:
        raise ValueError(f"{strange[0]} differs from that of the routing")


# What routing depends on, of a scenario.
_ROUTING: dict[str, Callable[[Scenario], Any]] = {
    name: operator.attrgetter(name)
    for name in ("seed", "replicas", "model", "parallel", "traffic", "router_dynamics", "steps", "policies")
} | {
    "schedule.micro_batches": lambda scenario: scenario.schedule.micro_batches,
    "schedule.phase": lambda scenario: scenario.schedule.phase,
    "cluster": lambda scenario: (scenario.cluster.n_devices, scenario.cluster.topology.domain(scenario.cluster)),
}


def _routed(scenario: Scenario, workers: Workers, progress: bool) -> Routed:
    tasks = _tasks(scenario)
    rolled: list[list[Counts]] = list(watched(workers.map(rollout.run, tasks), len(tasks), "routing", progress))
    counts: dict[tuple[int, int], list[Counts]] = {}
    for task, results in zip(tasks, rolled, strict=True):
        for result in results:
            counts.setdefault((task.replica, result.policy), []).append(result)
    return Routed(scenario, counts)


def _clocks(
    routed: Routed, scenario: Scenario, workers: Workers, progress: bool, record: bool
) -> list[tuple[tuple[int, int, int], dict[str, Any]]]:
    """What `_time_step` returns of every (replica, policy, step), in that order."""
    timing_jobs = []
    for replica in range(scenario.replicas):
        for index in range(len(scenario.policies)):
            for step in scenario.timed_steps():
                layers = routed.counts.get((replica, index), [])
                timing_jobs.append((replica, index, step, [layer.exchanges[step] for layer in layers]))
    todo = [
        (scenario, index, exchanges, step if record and _recorded(scenario, replica, step) else None)
        for replica, index, step, exchanges in timing_jobs
    ]
    times = watched(workers.map(_time_step, todo), len(todo), "timing", progress)
    return [
        ((replica, index, step), found) for (replica, index, step, _), found in zip(timing_jobs, times, strict=True)
    ]


def _timed(routed: Routed, scenario: Scenario, workers: Workers, progress: bool, record: bool) -> Result:
    counts, timing = routed.counts, dict(_clocks(routed, scenario, workers, progress, record))
    tables = tabulate(scenario, counts, timing, _moves(scenario, counts)) | traffic_tables(scenario, counts)
    recorded = tuple(t["recorded"] for t in timing.values() if t["recorded"] is not None)
    return Result(
        scenario, tables, summarise(tables, scenario), sum(int(t["events"]) for t in timing.values()), recorded
    )
