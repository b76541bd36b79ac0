"""Routing over the steps of a block of layers: the same tokens through every policy's gate, counted as they go.

A layer's gate is a closed loop (tokens -> counts -> bias -> next tokens) that no other layer touches, so blocks of
layers run anywhere, in any order, with the same result. No seconds here; those are made of the counts afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from sim.drawn import DrawnTally
from sim.drawn import tally as tally_of
from sim.gating import Choices, Gate, Router, recorded_affinity
from sim.gating.assignment import balanced_share
from sim.gating.score import Score
from sim.kernels.choose import choose
from sim.rng import stream
from sim.scenario import Scenario
from sim.settings import Policy
from sim.tally import Counts, Tally, spread
from sim.tokens import F32, I16, Tokens
from sim.traffic import Batch, Source, TrafficShape

LAYERS_PER_TASK = 4
"""Layers that are rolled together and whose pilots are held at a time."""
ORACLE_TOKENS = 4096
"""Tokens of the last step, over all ranks, on which the balanced optimum is bounded."""


@dataclass(frozen=True)
class Task:
    """A unit of work: ``layers`` (MoE layer numbers) of ``replica``, for the policies at ``policies`` (one traffic
    shape)."""

    scenario: Scenario
    policies: tuple[int, ...]
    replica: int
    layers: Sequence[int]


def measured_steps(scenario: Scenario) -> list[int]:
    """Steps whose exchange is counted: the timed ones and the last."""
    return sorted({*scenario.timed_steps(), scenario.steps.count - 1})


def shape_of(scenario: Scenario, policy: Policy) -> TrafficShape:
    """What the traffic has to know for ``policy``'s model."""
    model = scenario.model_of(policy)
    return TrafficShape(
        model.n_moe_layers, model.n_routed_experts, model.num_experts_per_tok, scenario.parallel.ep_size
    )


def token_layers(scenario: Scenario) -> int:
    """Tokens x MoE layers x policies that a run routes: the size of its work."""
    return sum(token_layers_of(scenario, policy) for policy in scenario.policies)


def token_layers_of(scenario: Scenario, policy: Policy) -> int:
    """The part of `token_layers` that one policy routes."""
    steps = scenario.steps
    rank_steps = steps.count * scenario.parallel.ep_size
    if steps.resolution == "count":
        once = scenario.pilots_once(policy)
        if once:
            return _token_layers(scenario, policy, steps.pilot_ranks * scenario.pilot_tokens)
        rank_steps = steps.count * _routed_ranks(scenario)
    return _token_layers(scenario, policy, rank_steps * scenario.group_tokens)


def _token_layers(scenario: Scenario, policy: Policy, tokens: int) -> int:
    warmup = scenario.steps.warmup
    if policy.learns:
        tokens += warmup.steps * warmup.ranks * warmup.tokens_per_rank
    return tokens * scenario.model_of(policy).n_moe_layers * scenario.replicas


def _routed_ranks(scenario: Scenario) -> int:
    """Ranks of each step that are routed token by token, for gates that are not piloted once."""
    ranks = scenario.parallel.ep_size
    return min(ranks, scenario.steps.pilot_ranks) if scenario.steps.resolution == "count" else ranks


Layers = Mapping[int, list[Tally]]


def _each(layers: Layers) -> Iterator[Tally]:
    return (tally for tallies in layers.values() for tally in tallies)


def _those(layers: Layers, which: Callable[[Tally], bool]) -> Layers:
    chosen = {layer: [tally for tally in tallies if which(tally)] for layer, tallies in layers.items()}
    return {layer: tallies for layer, tallies in chosen.items() if tallies}


def run(task: Task) -> list[Counts]:
    """Roll the task's layers through warm-up and all steps; one `Counts` per (policy, layer), in that order."""
    scenario = task.scenario
    kernels = choose(token_layers(scenario))
    shape = shape_of(scenario, scenario.policies[task.policies[0]])
    source = scenario.traffic.start(shape, scenario.seed, task.replica)
    layers = {
        layer: [tally_of(scenario, index, task.replica, layer, kernels) for index in task.policies]
        for layer in task.layers
    }
    steps, ranks = scenario.steps, scenario.parallel.ep_size
    warm_up(task, source, layers)
    _history(task, source, layers)
    measured = set(measured_steps(scenario))
    _pilot(task, source, layers)
    for step in range(steps.count):
        for tally in _each(layers):
            tally.hosting.begin(step)
            tally.reset(ranks, measure=step in measured)
        batch = source.batch("train", step, n_ranks=ranks, tokens_per_rank=scenario.group_tokens)
        routed, judged = _those(layers, lambda tally: tally.wants_tokens), step == steps.count - 1
        _route(task, batch, routed, _routed_ranks(scenario), "train", step, judged)
        for tally in _each(layers):
            tally.record(step, scenario.group_tokens)
            if tally.learns:
                tally.learn(step)
    for tallies in layers.values():
        _bound(tallies)
    return [layers[layer][i].finish() for i in range(len(task.policies)) for layer in task.layers]


def warm_up(task: Task, source: Source, layers: Layers) -> None:
    """Settle the balancing rules of ``layers`` on the warm-up's batches, before the first step."""
    scenario, warmup = task.scenario, task.scenario.steps.warmup
    learners = _those(layers, lambda tally: tally.policy.learns)
    for step in range(warmup.steps if learners else 0):
        tokens = warmup.tokens_per_rank - warmup.tokens_per_rank % scenario.warmup_parts
        batch = source.batch("warmup", step, n_ranks=warmup.ranks, tokens_per_rank=tokens)
        for tally in _each(learners):
            tally.reset(warmup.ranks, measure=False, warming_up=True)
        _route(task, batch, learners, warmup.ranks, "warmup", step)
        gain = warmup.gain ** (1.0 - step / max(1, warmup.steps - 1))
        for tally in _each(learners):
            tally.learn(-1, gain, warming_up=True)


def _history(task: Task, source: Source, layers: Layers) -> None:
    """Show placements that look at loads what came before the first step, and let them plan."""
    scenario = task.scenario
    curious = _those(layers, lambda tally: tally.hosting.wants_history)
    steps = max((tally.hosting.rule.history_steps for tally in _each(curious)), default=0)
    ranks, tokens = scenario.parallel.ep_size, scenario.group_tokens
    for step in range(steps):
        batch = source.batch("history", step, n_ranks=ranks, tokens_per_rank=tokens)
        these = _those(curious, lambda tally, step=step: step < tally.hosting.rule.history_steps)  # type: ignore[misc]
        for tally in _each(these):
            tally.reset(ranks, measure=False)
        _route(task, batch, these, ranks, "history", step)
        for tally in _each(these):
            tally.observe()
    for tally in _each(curious):
        tally.hosting.first_plan()


def _pilot(task: Task, source: Source, layers: Layers) -> None:
    """Route the one pilot of the gates whose every step is drawn."""
    steps = task.scenario.steps
    drawn = [tally for tally in _each(layers) if isinstance(tally, DrawnTally) and tally.pilots_once]
    if drawn:
        n_ranks = steps.pilot_ranks
        batch = source.batch("pilot", 0, n_ranks=n_ranks, tokens_per_rank=task.scenario.pilot_tokens)
        for tally in drawn:
            tally.begin_pilot()
        _route(task, batch, _those(layers, lambda tally: not tally.wants_tokens), n_ranks, "pilot", 0, judged=True)
        for tally in drawn:
            tally.end_pilot()


def _bound(tallies: list[Tally]) -> None:
    """Tell each tally what a perfectly balanced choice could keep of its natural affinity; equal affinities share it."""
    found: dict[int, float] = {}
    for tally in tallies:
        if tally.natural:
            key = id(tally.natural[0])
            if key not in found:
                found[key] = balanced_share(np.concatenate(tally.natural), tally.gate.k, tally.gate.kernels)
            tally.result.oracle_kept_affinity = found[key]


def _route(task: Task, batch: Batch, layers: Layers, n_ranks: int, phase: str, step: int, judged: bool = False) -> None:
    """Send the first ``n_ranks`` ranks of a batch through the gates. A rank's latents serve all its layers, so ranks are
    outside and layers inside. judged: keep a sample of natural affinities for `_bound`."""
    training = task.scenario.schedule.phase == "training"
    sample = -(-ORACLE_TOKENS // n_ranks) if judged else 0
    lots = any(tally.gate.capacity.lots for tally in _each(layers))
    for rank in range(n_ranks):
        lot = None
        for layer, tallies in layers.items():
            tokens = batch.tokens(layer, rank)
            if lots:
                if lot is None:  # the sequences of a rank are the same in all layers
                    draw = stream(task.scenario.seed, "lots", task.replica, phase, step, rank)
                    lot = draw.random(int(tokens.sequences.max(initial=0)) + 1)[tokens.sequences]
                tokens = replace(tokens, lot=lot)
            rng = partial(stream, task.scenario.seed, "gate", task.replica, phase, step, layer, rank)
            if tokens.logits is None:
                for tally in tallies:
                    chosen = _in_parts(tally, tokens, rng, _recorded(tally.gate))
                    tally.take(tokens, chosen, None)
                    tally.judge(*_recorded_affinity(tokens, chosen))
            else:
                _choose(tokens, tokens.logits, tallies, rng, judge=phase != "warmup", training=training, sample=sample)


Draw = Callable[..., np.random.Generator]
Decide = Callable[[slice, Tokens, Draw], Choices]


def _in_parts(tally: Tally, tokens: Tokens, rng: Draw, decide: Decide) -> list[Choices]:
    """Decide for all tokens at once, or by micro-batch where a token's experts depend on its neighbours."""
    parts = tally.micro_batches
    if parts == 1 or not tally.gate.looks_across_tokens:
        return [decide(slice(None), tokens, rng)]
    size, found = tokens.n_tokens // parts, []
    for part in range(parts):
        rows = slice(part * size, (part + 1) * size)
        arrays = ("logits", "topic", "sequence", "token_ids", "lot", "topk_ids", "topk_weights")
        cut = {name: a[rows] for name in arrays if (a := getattr(tokens, name)) is not None}
        found.append(decide(rows, replace(tokens, **cut), partial(rng, part)))
    return found


def _recorded_affinity(tokens: Tokens, chosen: list[Choices]) -> tuple[float, float]:
    """Recorded affinity that capacity let through, and all of it."""
    weights = recorded_affinity(tokens)
    kept = np.concatenate([choices.kept for choices in chosen]) >= 0
    return float(weights[kept].sum(dtype=np.float64)), float(weights.sum(dtype=np.float64))


def _recorded(gate: Gate) -> Decide:
    return lambda rows, some, draw: gate.keep_recorded(some, draw)


def _routed(gate: Gate, router: Router, plain: I16 | None) -> Decide:
    def decide(rows: slice, some: Tokens, draw: Draw) -> Choices:
        best = None if plain is None else plain[rows]
        return gate.choose(router.scores[rows], draw, some, logits=router.logits[rows], plain=best)

    return decide


@dataclass(frozen=True, slots=True)
class _Natural:
    """What tokens would like best: natural logits and affinities, the unrestricted top-k and its summed affinity; and a
    sample [<= sample, E] of the affinities."""

    router: Router
    plain: I16 | None
    best: float
    sample: F32 | None = None


def _natural(gate: Gate, tokens: Tokens, logits: F32, judge: bool, sample: int) -> _Natural:
    logits = gate.natural_logits(logits, tokens.topic)
    scores = gate.score.scores(logits, gate.kernels)
    if not judge:
        return _Natural(Router(logits, scores), None, 0.0)
    ones, zeros = np.ones(scores.shape[1], np.float32), np.zeros(scores.shape[1], np.float32)
    plain = gate.kernels.topk(scores, ones, zeros, gate.k)
    best = float(gate.kernels.picked(scores, plain).sum(dtype=np.float64))
    return _Natural(Router(logits, scores), plain, best, scores[spread(len(scores), sample)] if sample else None)


def _choose(
    tokens: Tokens, logits: F32, tallies: list[Tally], rng: Draw, *, judge: bool, training: bool, sample: int
) -> None:
    """Route one rank's tokens through every gate; scores and the unrestricted top-k are shared by equal gates."""
    shared: dict[Score, _Natural] = {}
    for tally in tallies:
        gate = tally.gate
        natural = shared.get(gate.score) if gate.natural_offset is None else None
        if natural is None:
            natural = _natural(gate, tokens, logits, judge, sample)
            if gate.natural_offset is None:
                shared[gate.score] = natural
        router, plain = natural.router, natural.plain
        if gate.moved or (training and gate.jitter > 0):
            router, plain = gate.router(logits, tokens.topic, partial(rng, "jitter"), training), None
        chosen = _in_parts(tally, tokens, rng, _routed(gate, router, plain))
        tally.take(tokens, chosen, router)
        if natural.sample is not None:
            tally.natural.append(natural.sample)
        if judge:
            scores = np.split(natural.router.scores, len(chosen))
            kept = (
                sum(
                    float(gate.kernels.picked(s, choices.kept).sum(dtype=np.float64))
                    for s, choices in zip(scores, chosen, strict=True)
                )
                if plain is None or not gate.is_plain_topk or gate.looks_across_tokens
                else natural.best
            )
            tally.judge(kept, natural.best)
