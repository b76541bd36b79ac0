"""Rules of a run of steps."""

from __future__ import annotations

from collections.abc import Iterator

from sim.checks.rule import Path, Rule
from sim.checks.splits import hosting_problems, split_problems
from sim.cost.memory import refusal
from sim.scenario import Scenario
from sim.settings import Policy
from sim.traffic import TrafficShape


def problems(scenario: Scenario) -> Iterator[Rule]:
    for i, policy in enumerate(scenario.policies):
        yield from _policy_problems(scenario, i, policy)
    yield from _traffic_problems(scenario)
    if scenario.tokens_per_rank % scenario.schedule.micro_batches:
        yield ("schedule", "micro_batches"), f"must divide traffic.tokens_per_rank = {scenario.tokens_per_rank}"
    pilot_of_all = scenario.steps.resolution == "count" and scenario.steps.pilot_ranks >= scenario.parallel.ep_size
    if pilot_of_all and not any(scenario.pilots_once(policy) for policy in scenario.policies):
        yield (
            ("steps", "pilot_ranks"),
            f"must be < parallel.ep_size = {scenario.parallel.ep_size}: no gate stands still under stationary traffic, "
            "and a pilot of every rank of every step leaves nothing to draw",
        )
    if scenario.schedule.overlap == "forward_backward" and scenario.schedule.phase == "forward":
        yield ("schedule", "overlap"), "forward_backward needs phase: training"
    if scenario.pipelined and scenario.schedule.phase == "forward":
        yield ("schedule", "pipeline"), f"{scenario.schedule.pipeline.kind} needs phase: training"
    micro, length = scenario.tokens_per_rank // scenario.schedule.micro_batches, scenario.traffic.longest_sequence
    routed = any(scenario.model_of(policy).is_moe for policy in scenario.policies)
    if scenario.pipelined and scenario.steps.resolution == "count" and routed and length and micro % length:
        yield (
            ("schedule", "micro_batches"),
            f"a micro-batch of tokens_per_rank / micro_batches = {micro} tokens must hold whole sequences of {length} at "
            f"count level: set traffic.tokens_per_rank to a multiple of {scenario.schedule.micro_batches * length}",
        )
    if scenario.pipelined and scenario.cluster.faults:
        yield (
            ("cluster", "faults"),
            "a pipeline times the links of one EP group for all of them: set schedule.pipeline: none to study a fault",
        )
    if scenario.schedule.recompute == "full" and not scenario.pipelined:
        yield ("schedule", "recompute"), "full needs a schedule.pipeline, which times it"
    if scenario.pipelined and scenario.traffic.provides == "ids":
        yield ("traffic",), "a pipeline needs generated traffic: recorded choices have no batches to fill it"
    for i, slow in enumerate(scenario.stragglers):
        count = scenario.parallel.devices if scenario.pipelined else scenario.parallel.ep_size
        if slow.device >= count:
            yield ("stragglers", i, "device"), f"must be < {count}, the devices simulated"
    if scenario.steps.warmup.steps and scenario.steps.warmup.ranks > scenario.parallel.ep_size:
        yield ("steps", "warmup", "ranks"), f"must be <= parallel.ep_size = {scenario.parallel.ep_size}"
    if scenario.steps.warmup.steps and scenario.steps.warmup.tokens_per_rank < scenario.warmup_parts:
        yield (
            ("steps", "warmup", "tokens_per_rank"),
            f"must be at least schedule.micro_batches = {scenario.warmup_parts}",
        )


def _traffic_problems(scenario: Scenario) -> Iterator[Rule]:
    """Start recorded traffic once, so that a trace that does not fit the model is refused before anything runs."""
    for policy in scenario.policies:
        model = scenario.model_of(policy)
        if scenario.traffic.provides == "ids" and model.is_moe:
            shape = TrafficShape(
                model.n_moe_layers, model.n_routed_experts, model.num_experts_per_tok, scenario.parallel.ep_size
            )
            try:
                source = scenario.traffic.start(shape, scenario.seed, 0)
                ranks, tokens = scenario.parallel.ep_size, scenario.tokens_per_rank
                source.batch("train", scenario.steps.count - 1, n_ranks=ranks, tokens_per_rank=tokens)
            except (ValueError, OSError) as error:
                yield ("traffic",), str(error)
                return
            for i, other in enumerate(scenario.policies):
                steps = other.rebalance.history_steps if other.placement.needs else 0
                try:
                    for step in range(steps):
                        source.batch("history", step, n_ranks=ranks, tokens_per_rank=tokens)
                except ValueError as error:
                    yield ("policies", i, "rebalance", "history_steps"), f"{error}; 0 starts with experts in order"
            return


def _group_problems(scenario: Scenario, where: Path, policy: Policy) -> Iterator[Rule]:
    """Data parallelism and pipelines: sizes that must divide or fit."""
    parallel, schedule, devices = scenario.parallel_of(policy), scenario.schedule, scenario.cluster.n_devices
    if parallel.dp_size is not None:
        if not scenario.pipelined:
            yield (*where, "dp_size"), "needs a schedule.pipeline; without one a single EP group is simulated"
        elif parallel.dp_size * parallel.tp_size % parallel.ep_size:
            yield (
                (*where, "dp_size"),
                f"x tp_size must be a multiple of ep_size = {parallel.ep_size}: whole EP groups",
            )
    if scenario.pipelined:
        needed = parallel.devices
        if needed > devices:
            yield (
                (*where, "pp_size"),
                f"{parallel.pp_size} stages x {parallel.ep_groups} groups of {parallel.ep_size} need {needed} devices; "
                f"the cluster has {devices} (groups follow from dp_size)",
            )
        for field, rule in schedule.pipeline.problems(parallel.pp_size, schedule.micro_batches):
            yield ((*where, field) if field == "pp_size" else ("schedule", field)), rule


def _moving_problems(scenario: Scenario, at: Path, policy: Policy) -> Iterator[Rule]:
    """What only some runs can do with replicas and moving experts."""
    placement, rule = policy.placement, policy.rebalance
    redundant = placement.num_redundant_experts
    if redundant and scenario.schedule.phase == "training":
        yield (
            (*at, "placement", "num_redundant_experts"),
            "replicas are for phase: forward; in training they would have to share gradients",
        )
    if rule.interval_steps is not None and scenario.schedule.phase == "training":
        yield (*at, "rebalance", "interval_steps"), "moving experts needs phase: forward"
    elif rule.interval_steps is not None and scenario.steps.timed != "all":
        yield (*at, "rebalance", "interval_steps"), "needs steps.timed: all, so that every move is in the means"
    if scenario.steps.resolution == "count" and (redundant or placement.needs or rule.interval_steps):
        yield (*at, "placement"), f"{placement.kind} looks at every token: set steps.resolution: token"
    if rule.forecast == "periodic" and rule.interval_steps and rule.period_steps is None:
        yield (*at, "rebalance", "period_steps"), "is what forecast: periodic needs"
    if rule.interval_s is not None:
        yield (*at, "rebalance", "interval_s"), "is for runs with a serving block; set interval_steps"


def _policy_problems(scenario: Scenario, i: int, policy: Policy) -> Iterator[Rule]:
    at: Path = ("policies", i)
    model, parallel = scenario.model_of(policy), scenario.parallel_of(policy)
    where = (*at, "parallel") if policy.parallel else ("parallel",)
    yield from split_problems(scenario, where, policy, parallel)
    grouping = list(_group_problems(scenario, where, policy))
    yield from grouping
    if model.is_moe:
        yield from hosting_problems(scenario, at, where, policy, parallel)
        yield from _moving_problems(scenario, at, policy)
        has = scenario.traffic.provides
        if scenario.steps.resolution == "count":
            if has == "ids" or not policy.select.per_token or policy.select.varies:
                yield (*at, "select"), f"select {policy.select.kind} cannot be drawn: set steps.resolution: token"
            if policy.capacity.kind != "none":
                yield (*at, "capacity"), "what capacity drops cannot be drawn: set steps.resolution: token"
    twin = any(
        scenario.model_of(p) == model
        and scenario.parallel_of(p) == parallel
        and p.placement.num_redundant_experts == policy.placement.num_redundant_experts
        for p in scenario.policies[:i]
    )
    if (
        parallel.ep_size <= scenario.cluster.n_devices
        and parallel.pp_size <= model.num_hidden_layers
        and not grouping
        and not twin
    ):
        # Memory comes last: it is only worth saying when the split itself makes sense, and once for all alike.
        text = refusal(scenario.memory(policy), scenario.cluster.device.memory_bytes)
        if text:
            less = {"none": "schedule.recompute: selective, ", "selective": "schedule.recompute: full, "}
            ways = less.get(scenario.schedule.recompute, "") if scenario.schedule.phase == "training" else ""
            yield (
                where,
                f"policy {policy.name!r} {text} of {scenario.cluster.device.name} (per device, {scenario.schedule.phase}); "
                f"what helps: {ways}larger pp_size or ep_size, more micro_batches",
            )
