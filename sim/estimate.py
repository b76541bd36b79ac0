"""What a run will cost, before it runs: events, memory and seconds, from the scenario alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sim.countlevel import BLOCKS_PER_PART
from sim.kernels import compiled_enabled
from sim.rollout import LAYERS_PER_TASK, measured_steps, token_layers, token_layers_of
from sim.scenario import Scenario
from sim.settings import Policy
from sim.units import human

MAX_EVENTS = 100_000_000
MAX_SECONDS = 6 * 3600.0
_BASE_BYTES = 250 * 2**20
# Measured on one core with 256 experts, top-8; both scale with the number of experts.
_ROUTE_S = {True: 0.75e-6, False: 4.0e-6}  # per token and layer for each policy, compiled / NumPy
_SHARED_S = {True: 0.9e-6, False: 4.0e-6}  # per token and layer, once for all policies: affinities and scores
_EVENT_S = 8e-6
# A step at count level, per policy and layer, and per count of it (experts, ranks, nodes of every source): drawn, kept.
_DRAW_S, _DRAWN_S, _KEPT_S = 0.1e-3, 2e-9, 10e-9
# Building the network of one timed step: per device of the cluster, and per pair of ranks of the group.
# A pipelined step: per MoE layer, micro-batch and pair of ranks.
_CHUNK_S = 0.2e-6
# A replicated layer's quotas per micro-batch: once, and per rank and slot.
_CHOICE_S, _QUOTA_S = 1e-3, 40e-9
_DEVICE_BYTES, _PAIR_BYTES = 1300.0, 150.0
_DEVICE_S, _PAIR_S = 8.5e-6, 2.7e-6
# Serving: an iteration's guessed length, seconds of processor time and bytes kept; batches timed for each draw, and
# seconds of counting and timing one of them per rank and layer.
_GUESSED_ITERATION_S, _ITERATION_S, _ITERATION_BYTES = 0.03, 0.3e-3, 300.0
_TIMED_SIZES, _TIMING_S = 160, 35e-6


class TooBig(Exception):
    """A scenario that exceeds the limits; the text says by how much and which knob turns it down."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__(estimate.reason)
        self.estimate = estimate


@dataclass(frozen=True, slots=True)
class Estimate:
    """token_layers: tokens x MoE layers x policies to route. events: of the discrete-event engine. memory_bytes: peak
    of one process. seconds: on one core. reason: why it is too big, or empty."""

    token_layers: int
    events: int
    memory_bytes: float
    seconds: float
    reason: str

    @property
    def too_big(self) -> bool:
        return bool(self.reason)

    def __str__(self) -> str:
        return (
            f"{human(self.token_layers, '')}token-layers to route, {human(self.events, '')}events, "
            f"about {human(self.memory_bytes, 'B')} of memory and {human(self.seconds, 's')} on one core"
        )


def events_per_step(scenario: Scenario) -> int:
    """Completions of operations in one timed step, over all policies; in a pipeline those of chunks."""
    if scenario.pipelined:
        return sum(
            3 * parallel.pp_size * parallel.ep_groups * scenario.schedule.micro_batches
            for parallel in map(scenario.parallel_of, scenario.policies)
        )
    passes = 2 if scenario.schedule.phase == "training" else 1
    total = 0
    for policy in scenario.policies:
        model, parallel = scenario.model_of(policy), scenario.parallel_of(policy)
        dense = model.num_hidden_layers - model.n_moe_layers
        shared = 1 if model.n_shared_experts else 0
        per_layer = (4 + shared) * model.n_moe_layers + 2 * dense
        per_layer += model.num_hidden_layers if parallel.tp_size > 1 else 0
        weight_gradients = model.n_moe_layers if passes == 2 else 0
        total += (per_layer * passes + weight_gradients) * scenario.schedule.micro_batches * parallel.ep_size
    return total


def free_memory_bytes() -> float:
    """Memory this machine could still give to a process."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return float(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 8 * 2.0**30


def estimate(scenario: Scenario) -> Estimate:
    """Estimate a run. Too big means over 10^8 events, 6 hours on one core, or half of the free memory."""
    arenas = scenario.arenas()
    if len(arenas) > 1 or arenas[0].scenario is not scenario:
        parts = [estimate(arena.scenario) for arena in arenas]
        work, events = sum(part.token_layers for part in parts), sum(part.events for part in parts)
        memory, seconds = max(part.memory_bytes for part in parts), sum(part.seconds for part in parts)
        return Estimate(work, events, memory, seconds, _reason(scenario, events, memory, seconds))
    if scenario.serving is not None:
        return _serving(scenario)
    work = token_layers(scenario)
    compiled = compiled_enabled(work)
    events = (
        events_per_step(scenario) * len(scenario.timed_steps()) * scenario.replicas
        if scenario.schedule.engine == "simpy"
        else 0
    )
    ranks, tokens, warmup = scenario.parallel.ep_size, scenario.tokens_per_rank, scenario.steps.warmup
    seconds, memory = 0.5 + events * _EVENT_S, float(_BASE_BYTES)
    devices, groups = scenario.cluster.n_devices, [scenario.parallel_of(p).ep_size for p in scenario.policies]
    memory += _DEVICE_BYTES * devices + _PAIR_BYTES * max(groups) ** 2
    builds = len(scenario.timed_steps()) * scenario.replicas
    seconds += builds * sum(_DEVICE_S * devices + _PAIR_S * group**2 for group in groups)
    models: dict[str, float] = {}
    for policy in scenario.policies:
        model = scenario.model_of(policy)
        if not model.is_moe:
            continue
        width = (model.n_routed_experts / 256 + 0.3) / 1.3
        per_policy = token_layers_of(scenario, policy)
        seconds += per_policy * (
            _ROUTE_S[compiled] * width + policy.select.extra_s_per_token * model.n_routed_experts / 128
        )
        key = model.model_dump_json()
        models[key] = max(models.get(key, 0.0), per_policy * _SHARED_S[compiled] * width)
        domain = scenario.cluster.topology.domain(scenario.cluster)
        slots = scenario.slots(policy)
        per_exchange = 8.0 * ranks * (ranks + ranks / domain + slots.n_slots)
        kept = len(measured_steps(scenario)) * scenario.parts
        if scenario.pipelined:  # of each task's layers only, and once more to stack them
            stages = scenario.schedule.pipeline.copies * -(-model.n_moe_layers // scenario.parallel_of(policy).pp_size)
            memory += 2 * per_exchange * (stages + 1) * kept
            seconds += model.n_moe_layers * scenario.parts * scenario.replicas * _CHUNK_S * ranks**2
        else:
            memory += per_exchange * model.n_moe_layers * kept * scenario.replicas
        one, watched = _placed(scenario, policy)
        seconds, memory = seconds + one, memory + watched
        if scenario.steps.resolution == "count":
            one, pilot = _drawn(scenario, policy)
            seconds, memory = seconds + one, memory + pilot
        memory += 8.0 * scenario.steps.count * model.n_moe_layers * model.n_routed_experts * scenario.replicas
        # A row of the `layers` table holds ten boxed values, one of `experts` seven.
        memory += 600.0 * scenario.steps.count * model.n_moe_layers * scenario.replicas
        memory += 200.0 * model.n_moe_layers * model.n_routed_experts * scenario.replicas
    seconds += sum(models.values())
    widest = max((scenario.model_of(p).n_routed_experts for p in scenario.policies), default=0)
    learns = any(policy.learns for policy in scenario.policies)
    if scenario.steps.resolution == "count" and all(scenario.pilots_once(policy) for policy in scenario.policies):
        tokens = scenario.pilot_tokens
    most = max(tokens, warmup.tokens_per_rank if learns and warmup.steps else 0)
    memory += 4.0 * most * (6 * widest + ranks * 160)
    return Estimate(work, events, memory, seconds, _reason(scenario, events, memory, seconds))


# A request: simulated and written into the table; its state, and a row of the table of each policy and replica.
_REQUEST_S, _REQUEST_BYTES, _ROW_BYTES = 60e-6, 900.0, 900.0


def _serving(scenario: Scenario) -> Estimate:
    """Estimate a run that serves requests, whose iterations are guessed: how long they take is what it will find out."""
    serving = scenario.serving
    assert serving is not None
    runs = scenario.replicas * len(scenario.policies)
    groups = sum(unit.count for unit in serving.units)
    events = int(runs * groups * serving.duration_s / _GUESSED_ITERATION_S)
    topics = max(1, len(scenario.traffic.topics))
    work, seconds = 0, 0.5 + events * _ITERATION_S
    for policy in scenario.policies:
        model = scenario.model_of(policy)
        if model.is_moe:
            layers = min(model.n_moe_layers, serving.sampled_layers)
            work += 2 * serving.pool_tokens * topics * layers * scenario.replicas
            rank_layers = layers * sum(unit.parallel.ep_size for unit in serving.units)
            seconds += _TIMED_SIZES * serving.draws * rank_layers * _TIMING_S * scenario.replicas
    seconds += work * (_ROUTE_S[compiled_enabled(work)] + _SHARED_S[compiled_enabled(work)])
    requests = serving.requests.expected(serving.duration_s)
    seconds += runs * requests * _REQUEST_S
    memory = _BASE_BYTES + _ITERATION_BYTES * events / runs + requests * (_REQUEST_BYTES + _ROW_BYTES * runs)
    return Estimate(work, events, memory, seconds, _reason(scenario, events, memory, seconds))


def _placed(scenario: Scenario, policy: Policy) -> tuple[float, float]:
    """Seconds of planning and of sharing out one policy's tokens, and bytes of what its placement watches."""
    model, rule, slots = scenario.model_of(policy), policy.rebalance, scenario.slots(policy)
    layers, steps = model.n_moe_layers * scenario.replicas, scenario.steps.count
    plans = 2 + (0 if rule.interval_steps is None else steps // rule.interval_steps)
    seconds = plans * layers * policy.placement.seconds_per_plan(slots)
    if slots.num_redundant_experts:
        seconds += steps * layers * scenario.parts * (_CHOICE_S + _QUOTA_S * slots.ep_size * slots.n_slots)
    memory = 0.0
    if "coactivation" in policy.placement.needs:
        kept = max(rule.history_steps, rule.window_steps or rule.interval_steps or 0, rule.period_steps or 0)
        memory = 8.0 * (1 + kept) * model.n_routed_experts**2 * min(LAYERS_PER_TASK, model.n_moe_layers)
    if scenario.steps.record_traffic:
        pairs = slots.ep_size**2 * scenario.replicas
        seconds, memory = seconds + 1e-6 * pairs, memory + 300.0 * pairs
    return seconds, memory


def _drawn(scenario: Scenario, policy: Policy) -> tuple[float, float]:
    """Seconds of drawing one policy's counts, and bytes of the pilots that a task holds at a time."""
    model, steps, ranks = scenario.model_of(policy), scenario.steps, scenario.parallel.ep_size
    width = model.n_routed_experts + ranks + ranks / scenario.cluster.topology.domain(scenario.cluster)
    counts = scenario.parts * ranks * width
    each = steps.count * (_DRAW_S + _DRAWN_S * counts) + len(measured_steps(scenario)) * _KEPT_S * counts
    once = scenario.pilots_once(policy)
    pilot_ranks = steps.pilot_ranks if once else min(ranks, steps.pilot_ranks)
    pilot_parts = scenario.schedule.micro_batches * (scenario.pilot_tokens if once else scenario.group_tokens)
    pilot_parts //= scenario.tokens_per_rank
    blocks = 4.0 * BLOCKS_PER_PART * width + (16.0 * model.n_routed_experts if once else 0.0)
    layers = min(model.n_moe_layers, LAYERS_PER_TASK)
    return (
        each * model.n_moe_layers * scenario.replicas,
        pilot_ranks * pilot_parts * blocks * layers,
    )


def _reason(scenario: Scenario, events: int, memory: float, seconds: float) -> str:
    serving = scenario.serving
    knobs: dict[str, float] = {
        "steps.count": scenario.steps.count,
        "traffic.tokens_per_rank": scenario.tokens_per_rank,
        "replicas": scenario.replicas,
        "policies": len(scenario.policies),
    }
    if serving is not None:
        del knobs["steps.count"], knobs["traffic.tokens_per_rank"]
        knobs |= {"serving.duration_s": serving.duration_s, "units": sum(unit.count for unit in serving.units)}
    elif scenario.steps.resolution == "count":
        knobs["steps.pilot_ranks"] = scenario.steps.pilot_ranks
    lower = "lower " + " or ".join(f"{name} = {value:.10g}" for name, value in knobs.items() if value > 1)
    if events > MAX_EVENTS and serving is not None:
        return f"{events:.3g} iterations exceed {MAX_EVENTS:.0e}: {lower}"
    if events > MAX_EVENTS:
        return (
            f"{events:.3g} events exceed {MAX_EVENTS:.0e}: time fewer steps (steps.timed: last), set schedule.engine: "
            f"max_plus, or {lower}"
        )
    if memory > 0.5 * (free := free_memory_bytes()):
        return f"about {human(memory, 'B')} of memory exceeds half of the free {human(free, 'B')}: {lower}"
    if seconds > MAX_SECONDS:
        return f"about {seconds / 3600:.3g} hours on one core exceed {MAX_SECONDS / 3600:g}: {lower}"
    return ""
