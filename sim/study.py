"""Policies x replicas -> results: cut the work into tasks, run them on one or more processes, tabulate.

Results do not depend on the number of processes: every task is a pure function of the scenario, and tables are filled
in the order of policies, replicas, steps and layers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import numpy as np

from sim import rollout
from sim.cluster import build_network
from sim.conservation import ConservationError, check_time
from sim.engine import breakdown, des, maxplus, violations
from sim.engine.training import Work, build_plan
from sim.estimate import Estimate, TooBig, estimate
from sim.exchange import Exchange, token_bytes
from sim.metrics.balance import coefficient_of_variation, least_share, max_vio, uniform_max_vio
from sim.results import Result, summarise
from sim.rollout import Task, measured_steps, shape_of
from sim.scenario import Scenario, load
from sim.tally import Counts
from sim.traffic import TrafficShape
from sim.units import PS_PER_S

A = TypeVar("A")
B = TypeVar("B")
Table = dict[str, list[Any]]
LAYERS_PER_TASK = 4
# Starting a worker process costs about a second, so small runs stay in this one.
WORTH_A_PROCESS_S = 4.0


def run(
    source: Any,
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    jobs: int | None = 1,
    force: bool = False,
    progress: bool = False,
) -> Result:
    """Run a scenario and return its `sim.results.Result`.

    source: a scenario file's path, plain data, or a `Scenario`. overrides: ``{"policies.0.select.topk_group": 2}`` or
    ``["seed=3"]``. jobs: processes; None = as many as cores where that pays. Workers import the calling script, so more
    than one needs ``if __name__ == "__main__":`` in it, and plug-ins that live in an importable module. force: run even
    if the estimate says that it is too big. progress: a bar on stderr. Raises `sim.yamlfile.ScenarioError` or `sim.estimate.TooBig`.
    """
    sets = [f"{k}={json.dumps(v)}" for k, v in overrides.items()] if isinstance(overrides, Mapping) else list(overrides)
    if isinstance(source, Scenario):
        scenario = load(source.model_dump(mode="json", exclude_none=True), sets) if sets else source.resolved()
        found = [f"{'.'.join(map(str, path))}: {rule}" for path, rule in scenario.problems()]
        if found:
            raise ValueError("; ".join(found))
    else:
        scenario = load(source, sets)
    expected = estimate(scenario)
    if expected.too_big and not force:
        raise TooBig(expected)
    return simulate(scenario, jobs, expected, progress)


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


def _time_step(job: tuple[Scenario, int, list[list[Exchange]]]) -> dict[str, Any]:
    """Build and time one policy's step; returns parts [P] in picoseconds, the makespan and the event count."""
    scenario, index, exchanges = job
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
    return {"parts": parts, "makespan_ps": timeline.makespan_ps, "events": timeline.n_events}


class _Workers:
    """``map`` on this process or on several; order and results are the same."""

    def __init__(self, jobs: int) -> None:
        self.pool = _pool(jobs) if jobs > 1 else None

    def map(self, function: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
        if self.pool is None:
            return map(function, items)
        # Not Executor.map: when abandoned it cancels futures, which races with a pool that is going down.
        return (future.result() for future in [self.pool.submit(function, item) for item in items])

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        if self.pool is not None:
            if kind is not None:  # interrupted or failed: nobody waits for the tasks in progress
                import multiprocessing

                for worker in multiprocessing.active_children():
                    worker.terminate()
            self.pool.shutdown()


def _pool(jobs: int) -> ProcessPoolExecutor:
    # BLAS threads of the workers would compete with the workers themselves.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    import multiprocessing

    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    """Leave interrupts to the parent, and do not outlive it."""
    import multiprocessing
    import signal
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _watched(items: Iterable[B], total: int, label: str, progress: bool) -> Iterator[B]:
    if not progress:
        yield from items
        return
    from tqdm import tqdm

    yield from tqdm(items, total=total, desc=label, file=sys.stderr, leave=False, unit="task")


def simulate(scenario: Scenario, jobs: int | None, expected: Estimate, progress: bool = False) -> Result:
    """Run a checked scenario; see `run`."""
    tasks = _tasks(scenario)
    if jobs is None:
        jobs = min(os.cpu_count() or 1, max(1, len(tasks))) if expected.seconds > WORTH_A_PROCESS_S else 1
    with _Workers(jobs) as workers:
        rolled: list[list[Counts]] = list(_watched(workers.map(rollout.run, tasks), len(tasks), "routing", progress))
        counts: dict[tuple[int, int], list[Counts]] = {}
        for task, results in zip(tasks, rolled, strict=True):
            for result in results:
                counts.setdefault((task.replica, result.policy), []).append(result)
        timing_jobs = []
        for replica in range(scenario.replicas):
            for index in range(len(scenario.policies)):
                for step in scenario.timed_steps():
                    layers = counts.get((replica, index), [])
                    timing_jobs.append((replica, index, step, [layer.exchanges[step] for layer in layers]))
        todo = [(scenario, index, exchanges) for _, index, _, exchanges in timing_jobs]
        timed = list(_watched(workers.map(_time_step, todo), len(todo), "timing", progress))
    timing = {(replica, index, step): t for (replica, index, step, _), t in zip(timing_jobs, timed, strict=True)}
    tables = _tabulate(scenario, counts, timing)
    return Result(scenario, tables, summarise(tables, scenario), sum(int(t["events"]) for t in timed))


def _tabulate(
    scenario: Scenario, counts: dict[tuple[int, int], list[Counts]], timing: dict[tuple[int, int, int], dict[str, Any]]
) -> dict[str, Table]:
    """Return the tidy tables: one row per (policy, replica, step), with layer, device or expert where it says so."""
    steps: Table = {}
    layers: Table = {}
    devices: Table = {}
    experts: Table = {}
    measured = measured_steps(scenario)
    for index, policy in enumerate(scenario.policies):
        model, parallel = scenario.model_of(policy), scenario.parallel_of(policy)
        for replica in range(scenario.replicas):
            found = counts.get((replica, index), [])
            per_layer = [_layer_rows(scenario, index, result) for result in found]
            head = {"policy": policy.name, "replica": replica}
            for step in range(scenario.steps.count):
                row: dict[str, Any] = head | {"step": step}
                rows = [{key: values[step] for key, values in layer.items()} for layer in per_layer]
                for key in per_layer[0] if per_layer else ():
                    row[key] = float(np.mean([r[key] for r in rows]))
                clock = timing.get((replica, index, step))
                row |= (
                    _exchange_row(scenario, index, [r.exchanges[step] for r in found])
                    if step in measured
                    else _NO_EXCHANGE
                )
                row |= _time_row(scenario, clock)
                _append(steps, row)
                for result, r in zip(found, rows, strict=True):
                    _append(layers, head | {"step": step, "layer": model.moe_layers[result.layer]} | r)
                if clock:
                    received = _device_loads(found, step, parallel.ep_size)
                    for device in range(parallel.ep_size):
                        parts = {f"{key}_s": float(value[device]) / PS_PER_S for key, value in clock["parts"].items()}
                        _append(
                            devices,
                            head | {"step": step, "device": device, "expert_tokens": int(received[device])} | parts,
                        )
            for result in found:
                total = result.expert_tokens.sum(axis=0)
                for expert, n in enumerate(total.tolist()):
                    where = {"layer": model.moe_layers[result.layer], "expert": expert}
                    _append(experts, head | where | {"device": int(result.expert_rank[expert]), "tokens": n})
    return {"steps": steps, "layers": layers, "devices": devices, "experts": experts}


_NO_EXCHANGE = {"nodes_per_token": np.nan, "devices_per_token": np.nan, "inter_node_bytes": np.nan}


def _append(table: Table, row: Mapping[str, Any]) -> None:
    length = max((len(column) for column in table.values()), default=0)
    for key in row:
        if key not in table:
            table[key] = [None] * length
    for key, column in table.items():
        column.append(row.get(key))


def _layer_rows(scenario: Scenario, index: int, result: Counts) -> dict[str, Any]:
    loads = result.expert_tokens
    k = max(1, round(float(result.asked.mean()) / (scenario.parallel.ep_size * scenario.tokens_per_rank)))
    order = np.argsort(result.expert_rank, kind="stable")
    ranks = loads[:, order].reshape(len(loads), scenario.parallel.ep_size, -1).sum(axis=2)
    tokens = scenario.parallel.ep_size * scenario.tokens_per_rank
    return {
        "max_vio": max_vio(loads),
        "max_vio_floor": np.full(len(loads), uniform_max_vio(tokens, loads.shape[1], k)),
        "load_cv": coefficient_of_variation(loads),
        "least_share": least_share(loads),
        "device_max_over_mean": max_vio(ranks) + 1.0,
        "kept_affinity": result.kept_affinity,
    }


def _exchange_row(scenario: Scenario, index: int, layers: list[list[Exchange]]) -> dict[str, float]:
    if not layers:
        return _NO_EXCHANGE
    policy = scenario.policies[index]
    cost, domain = scenario.cost, scenario.cluster.topology.domain(scenario.cluster)
    tokens = scenario.parallel.ep_size * scenario.tokens_per_rank * len(layers)
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


TIME_PARTS = ("attention_s", "experts_s", "other_compute_s", "exposed_communication_s", "waiting_s")


def _time_row(scenario: Scenario, clock: dict[str, Any] | None) -> dict[str, float]:
    if clock is None:
        return dict.fromkeys(("step_time_s", *TIME_PARTS, "tokens_per_s_per_gpu"), np.nan)
    mean = {key: float(value.mean()) / PS_PER_S for key, value in clock["parts"].items()}
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
    return row | {"tokens_per_s_per_gpu": scenario.tokens_per_rank / row["step_time_s"]}


def _device_loads(found: list[Counts], step: int, n_ranks: int) -> Any:
    total = np.zeros(n_ranks, dtype=np.int64)
    for result in found:
        np.add.at(total, result.expert_rank, result.expert_tokens[step])
    return total
