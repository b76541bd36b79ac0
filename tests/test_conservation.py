"""The checker checks: a real run passes, and one wrong counter anywhere does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim import rollout
from sim.cluster import build_network
from sim.conservation import ConservationError, check_exchange, check_flops, check_time
from sim.engine import Plan, Timeline, breakdown, des, violations
from sim.engine.training import Work, build_plan
from sim.exchange import Exchange
from sim.loading import load
from sim.rollout import Counts, Task
from sim.scenario import Scenario
from sim.tokens import I64

SMALL = ["replicas=1", "steps.count=1", "steps.warmup.steps=2", "traffic.tokens_per_rank=64"]
TOKENS, K = 32, 4  # per rank and micro-batch


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return load(Path(__file__).resolve().parents[1] / "scenarios" / "tiny.yaml", SMALL)


@pytest.fixture(scope="module")
def counts(scenario: Scenario) -> list[Counts]:
    indices = tuple(range(len(scenario.policies)))
    return rollout.run(Task(scenario, indices, 0, range(scenario.model.n_moe_layers)))


@pytest.fixture(scope="module")
def exchanges(counts: list[Counts]) -> list[Exchange]:
    return [exchange for result in counts for exchange in result.exchanges[0]]


@pytest.fixture(scope="module")
def timed(scenario: Scenario, counts: list[Counts]) -> tuple[Work, Plan, Timeline]:
    network = build_network(scenario.cluster, scenario.parallel.ep_size)
    work = Work(scenario, scenario.policies[0], network, [r.exchanges[0] for r in counts if r.policy == 0])
    plan = build_plan(work)
    return work, plan, des.simulate(plan)


def test_a_real_run_keeps_every_law(exchanges: list[Exchange], timed: tuple[Work, Plan, Timeline]) -> None:
    assert len(exchanges) == 5 * 3 * 2  # policies, layers, micro-batches
    for exchange in exchanges:
        assert exchange.copies is not None
        check_exchange(exchange, TOKENS, TOKENS * K)
    _, plan, timeline = timed
    assert violations(plan, timeline) == []
    check_time(breakdown(plan, timeline), timeline.makespan_ps)


def _planted(exchange: Exchange, name: str, rng: np.random.Generator) -> Exchange:
    """Add or take one in one cell of ``name``."""
    wrong: I64 = getattr(exchange, name).copy()
    cell = tuple(int(rng.integers(size)) for size in wrong.shape)
    wrong[cell] += int(rng.choice([-1, 1]))
    return replace(exchange, **{name: wrong})


@pytest.mark.parametrize("name", ["expert_tokens", "rank_tokens", "node_tokens", "copies"])
def test_one_wrong_count_is_caught_every_time(name: str, exchanges: list[Exchange]) -> None:
    """C8: 50 places each, +1 or -1, so that no bound is helped by the size of the error."""
    rng = np.random.default_rng(8)
    caught = 0
    for _ in range(50):
        wrong = _planted(exchanges[rng.integers(len(exchanges))], name, rng)
        try:
            check_exchange(wrong, TOKENS, TOKENS * K)
        except ConservationError:
            caught += 1
    assert caught == 50


def test_bounds_alone_would_not_catch_it(exchanges: list[Exchange]) -> None:
    """Why ``copies`` exists: without it some wrong copies stay within their bounds."""
    rng = np.random.default_rng(8)
    missed = 0
    for _ in range(50):
        wrong = _planted(exchanges[rng.integers(len(exchanges))], "rank_tokens", rng)
        try:
            check_exchange(replace(wrong, copies=None), TOKENS, TOKENS * K)
            missed += 1
        except ConservationError:
            pass
    assert missed > 0


@pytest.mark.parametrize("dropped", [1, -1])
def test_a_wrong_number_of_drops_is_caught(dropped: int, exchanges: list[Exchange]) -> None:
    with pytest.raises(ConservationError, match="C1"):
        check_exchange(exchanges[0], TOKENS, TOKENS * K - dropped)


def test_dropped_choices_are_accounted_for(exchanges: list[Exchange]) -> None:
    """One pair fewer, declared as dropped by its source, is lawful; declared by another source it is not."""
    exchange = next(e for e in exchanges if (e.pairs - e.rank_tokens).max() > 0)
    source, rank = np.argwhere(exchange.pairs > exchange.rank_tokens)[0]
    expert = next(e for e in np.flatnonzero(exchange.expert_rank == rank) if exchange.expert_tokens[source, e] > 0)
    fewer = exchange.expert_tokens.copy()
    fewer[source, expert] -= 1
    wrong = replace(exchange, expert_tokens=fewer)
    pairs = np.full(len(fewer), TOKENS * K)
    pairs[source] -= 1
    check_exchange(wrong, TOKENS, pairs)
    for elsewhere in (np.full(len(fewer), TOKENS * K), np.roll(pairs, 1)):
        with pytest.raises(ConservationError, match="C1"):
            check_exchange(wrong, TOKENS, elsewhere)


def test_padding_only_adds_rows(exchanges: list[Exchange]) -> None:
    exchange = exchanges[0]
    rows = np.full_like(exchange.expert_tokens, exchange.expert_tokens.max())
    check_exchange(replace(exchange, computed_tokens=rows), TOKENS, TOKENS * K)
    with pytest.raises(ConservationError, match="padding"):
        check_exchange(replace(exchange, computed_tokens=rows - 1), TOKENS, TOKENS * K)


@pytest.mark.parametrize("law", ["C1 counts are not negative", "C1 a token's experts are distinct"])
def test_impossible_counts_are_named(law: str, exchanges: list[Exchange]) -> None:
    wrong = exchanges[0].expert_tokens.copy()
    if "negative" in law:
        wrong[0, 0], wrong[0, 1] = -1, wrong[0, 1] + wrong[0, 0] + 1
    else:
        others = wrong[0].sum() - (TOKENS + 1)
        wrong[0] = 0
        wrong[0, 0], wrong[0, 1] = TOKENS + 1, others
    with pytest.raises(ConservationError, match=law):
        check_exchange(replace(exchanges[0], expert_tokens=wrong), TOKENS, TOKENS * K)


def test_one_wrong_picosecond_is_caught_every_time(timed: tuple[Work, Plan, Timeline]) -> None:
    _, plan, timeline = timed
    parts = breakdown(plan, timeline)
    rng = np.random.default_rng(8)
    caught = 0
    for _ in range(50):
        name = str(rng.choice(sorted(parts)))
        wrong = {key: value.copy() for key, value in parts.items()}
        wrong[name][rng.integers(plan.n_ranks)] += int(rng.choice([-1, 1]))
        try:
            check_time(wrong, timeline.makespan_ps)
        except ConservationError:
            caught += 1
    assert caught == 50
    with pytest.raises(ConservationError, match="C7"):
        check_time(parts, timeline.makespan_ps + 1)


def test_one_wrong_moment_is_caught_every_time(timed: tuple[Work, Plan, Timeline]) -> None:
    _, plan, timeline = timed
    rng = np.random.default_rng(8)
    caught = 0
    for _ in range(50):
        name = str(rng.choice(["start_ps", "end_ps", "peer_start_ps"]))
        wrong = getattr(timeline, name).copy()
        wrong[rng.integers(len(plan.ops)), rng.integers(plan.n_ranks)] += int(rng.choice([-1, 1]))
        caught += violations(plan, replace(timeline, **{name: wrong})) != []
    assert caught == 50


def test_wrong_flops_are_caught_every_time() -> None:
    rng = np.random.default_rng(8)
    flops = 6 * 1024 * 512
    for _ in range(50):
        pairs = int(rng.integers(1, 10**9))
        check_flops(pairs * flops, pairs, flops)
        for wrong in ((pairs * flops + 1, pairs), (pairs * flops, pairs + int(rng.choice([-1, 1])))):
            with pytest.raises(ConservationError, match="C4"):
                check_flops(*wrong, flops)


def test_a_plan_that_bills_the_wrong_flops_is_refused(
    timed: tuple[Work, Plan, Timeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer left out of the plan, or billed twice, shows in the FLOPs."""
    from sim.engine import durations

    work = timed[0]
    honest = durations.Durations.experts_ps

    def forgetful(self: Any, exchange: Exchange, backward: bool) -> Any:
        seconds = honest(self, exchange, backward)
        self.billed_expert_flops -= 1
        return seconds

    monkeypatch.setattr(durations.Durations, "experts_ps", forgetful)
    with pytest.raises(ConservationError, match="C4"):
        build_plan(work)
