"""``python -m sim.advise placement``: the verdicts on made traffic, what they are made of, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sim.advise
from sim.advice import Setup, costs, simulated
from sim.advice.batches import cut, fitting_tokens, spread_layers
from sim.advice.bench import Bench
from sim.advice.clock import Clock, chain_s
from sim.advice.evidence import Interval, ratio
from sim.advice.guess import cost_of, ep_size_of, load, model_of
from sim.advice.options import BASELINE, check_redundant, fitting_redundant, options
from sim.advice.placement import REPAID, _every, _inside_a, _replanned, _tail, _trend, judge
from sim.advice.report import section
from sim.advice.rest import rest_s
from sim.advice.verdict import verdict
from sim.cluster import Cluster
from sim.exchange import dispatch_layout
from sim.kernels.choose import choose
from sim.model import Model
from sim.placement import Observed, moved_slots, moves, replica_counts
from sim.placement.biased import Biased
from sim.placement.eplb import Eplb
from sim.placement.linear import Linear
from sim.slots import Slots
from sim.statistics import MIN_TIMES, autocorrelation_time
from sim.tokens import I16
from sim.traces import RecordedTrace, checked
from sim.validation import Inputs
from sim.validation import placement as rows

ROOT = Path(__file__).resolve().parents[1]
SCENARIOS = ROOT / "scenarios"
EXPERTS, K, EP = 64, 6, 8


def drawn(preference: Any, n_tokens: int, seed: int) -> I16:
    """Return [L, n, k] the best experts of ``preference`` [L, E] plus noise of each token's own."""
    rng = np.random.Generator(np.random.Philox(seed))
    noise = rng.gumbel(size=(len(preference), n_tokens, EXPERTS)).astype(np.float32)
    return np.argsort(-(noise + preference[:, None]), axis=2, kind="stable")[..., :K].astype(np.int16)


@functools.cache
def traffic(batches: int, tokens_per_rank: int, *, skew: float, change_every: int | None = None) -> RecordedTrace:
    """Return two layers of traffic whose popularities are drawn anew every ``change_every`` batches."""
    rng, parts = np.random.Generator(np.random.Philox(7)), []
    span = change_every or batches
    for start in range(0, batches, span):
        preference = skew * rng.standard_normal((2, EXPERTS)).astype(np.float32)
        parts.append(drawn(preference, min(span, batches - start) * EP * tokens_per_rank, start))
    return checked("made", np.concatenate(parts, axis=1), n_routed_experts=EXPERTS)


def saved(trace: RecordedTrace, path: Path) -> str:
    np.savez(path, topk_ids=trace.topk_ids, n_routed_experts=EXPERTS)
    return str(path)


def setup(**changes: Any) -> Setup:
    cluster = load(Cluster, "h100", SCENARIOS / "clusters", "--cluster")
    model = load(Model, "deepseek_moe_16b", SCENARIOS / "models", "--model")
    return Setup(
        **(
            {"model": model, "cluster": cluster, "cost": cost_of(cluster.device), "ep_size": EP, "other_s": 0.0}
            | changes
        )
    )


@functools.cache
def advised(
    batches: int, tokens: int, skew: float, change_every: int | None = None, **changes: Any
) -> tuple[str, str, Any]:
    """Return verdict, reason and what they rest on, from one layer of `traffic` in decode."""
    trace = traffic(batches, tokens, skew=skew, change_every=change_every)
    made = cut(trace, ep_size=EP, tokens_per_rank=tokens, phase="decode", layers=1, shuffle=False, seed=0)
    found = judge(setup(**changes), made, "decode", [0, 8])
    return *verdict(setup(**changes), made, found), found


# The verdicts ----------------------------------------------------------------------------------------------------


def test_steady_skew_is_worth_balancing() -> None:
    answer, reason, found = advised(162, 32, 1.0)
    # A stalling rebalance repays itself long after window B, of which plans of these two thirds know nothing.
    assert answer == "worth it if plans keep" and found.chosen.option.name in reason
    assert found.interval > found.span == 108 and f"if plans keep: window B spans {found.span} steps" in reason
    assert found.trend.low < 0 < found.trend.high
    assert found.net.low > 0.05 and found.times >= 50
    assert found.base_imbalance > 2 * found.chosen.imbalance
    # A plan is as good at the end of window B as at its beginning, so the interval is what costs say.
    assert found.tail == pytest.approx(found.aged[0].saving, rel=0.1)
    cost = found.chosen.rebalance_s / found.base_s
    assert found.interval == math.ceil(REPAID * cost / found.tail)
    assert found.chosen.break_even.mean == pytest.approx(cost / found.chosen.saving.mean)
    assert found.chosen.break_even.low < found.chosen.break_even.mean < found.chosen.break_even.high


def test_what_window_b_has_seen_repaid_needs_no_condition() -> None:
    answer, reason, found = advised(162, 32, 1.0, solver_s=0.0, stall=False)
    assert answer == "worth it" and "keep" not in reason
    assert found.interval <= found.span and found.chosen.break_even.high < found.span
    # The same at an interval asked for, which window B must span.
    cheap = {"solver_s": 0.0, "stall": False}
    assert advised(162, 32, 1.0, interval=54, **cheap)[0] == "worth it"
    assert advised(162, 32, 1.0, interval=109, **cheap)[0] == "worth it if plans keep"


def test_plans_that_age_slowly_are_not_trusted_beyond_what_was_seen() -> None:
    # Popularity turns a little with every batch: a plan saves most of what a new one does until window B ends.
    rng, parts = np.random.Generator(np.random.Philox(7)), []
    start, end = rng.standard_normal((2, 1, EXPERTS)).astype(np.float32)
    for batch in range(162):
        angle = 0.5 * batch / 162
        parts.append(drawn((np.cos(angle) * start + np.sin(angle) * end).astype(np.float32), EP * 32, batch))
    trace = checked("made", np.concatenate(parts, axis=1), n_routed_experts=EXPERTS)
    batches = cut(trace, ep_size=EP, tokens_per_rank=32, phase="decode", layers=1, shuffle=False, seed=0)
    found = judge(setup(), batches, "decode", [0])
    assert found is not None and found.trend.high < 0 and found.tail > 0.5 * found.aged[0].saving
    if found.times < MIN_TIMES:  # what fades correlates: count its batches as independent
        found = dataclasses.replace(found, times=float(MIN_TIMES))
    answer, reason = verdict(setup(), batches, found)
    assert answer == "not enough evidence" and "only if plans keep" in reason
    asked_for = int(reason.split("record about ")[1].split(" ")[0].replace(",", ""))
    assert 2 / 3 * asked_for / batches.size >= found.chosen.break_even.mean > found.span


def test_an_interval_that_reaches_below_zero_is_no_yes() -> None:
    trace = traffic(162, 32, skew=1.0)
    batches = cut(trace, ep_size=EP, tokens_per_rank=32, phase="decode", layers=1, shuffle=False, seed=0)
    found = dataclasses.replace(advised(162, 32, 1.0)[2], interval=50, net=Interval(0.05, -0.01, 0.11))
    assert verdict(setup(), batches, found)[0] == "not enough evidence"
    assert verdict(setup(), batches, dataclasses.replace(found, net=Interval(0.05, 0.01, 0.11)))[0] == "worth it"


def test_options_are_chosen_on_traffic_that_their_plans_have_not_seen() -> None:
    # Every window has popularities of its own: what is planned on one says nothing of the next.
    trace = traffic(162, 32, skew=1.0, change_every=18)
    batches = cut(trace, ep_size=EP, tokens_per_rank=32, phase="decode", layers=1, shuffle=False, seed=0)
    bench, a = Bench(setup(), batches, "decode"), range(3)
    row = judge(setup(), batches, "decode", [0]).rows[0]  # type: ignore[union-attr]
    base_s = bench.times(bench.baseline, bench.plan(bench.baseline, a), a[-1:]).step_s
    for known in (a[-1:], a):  # the window that is judged, alone or among others
        times = bench.times(row.option, bench.plan(row.option, known), a[-1:])
        cheated = float(bench.saved_s(row.option, times.step_s, base_s).mean())
        assert cheated > 0.02 * base_s.mean() and _inside_a(bench, row, a) < 0.5 * cheated


def test_one_rank_has_nothing_to_save() -> None:
    trace, alone = traffic(81, 8, skew=1.0), setup(ep_size=1)
    batches = cut(trace, ep_size=1, tokens_per_rank=64, phase="decode", layers=1, shuffle=False, seed=0)
    found = judge(alone, batches, "decode", [0, 1])
    assert found is not None
    answer, reason = verdict(alone, batches, found)
    assert answer == "not worth it" and "no option saves anything" in reason and "-0.0" not in reason
    assert all(row.saving.mean <= 0 for row in found.rows) and found.rows[0].saving == Interval(0.0, 0.0, 0.0)


def test_the_trace_that_is_asked_for_is_long_enough() -> None:
    trace = traffic(2, 16, skew=1.0)
    batches = cut(trace, ep_size=EP, tokens_per_rank=16, phase="decode", layers=1, shuffle=False, seed=0)
    assert "record about 10,368 tokens" in verdict(setup(), batches, None)[1]
    assert "--batches 81 --tokens-per-rank 16" in verdict(setup(simulated=True), batches, None)[1]
    enough = cut(
        traffic(81, 16, skew=1.0), ep_size=EP, tokens_per_rank=16, phase="decode", layers=1, shuffle=False, seed=0
    )
    assert enough.n_batches * enough.size == 10_368
    assert (enough.n_windows - enough.n_planned) * enough.per_window >= MIN_TIMES


def test_trend_is_of_age_and_not_of_when() -> None:
    # Savings that depend on the window alone do not fade; those that lose 0.1 per window of age do.
    when = [[np.full(4, 10.0 * (first + age)) for age in range(6 - first)] for first in range(6)]
    assert _trend(when, 100.0, 0).mean == pytest.approx(0, abs=1e-12)
    fading = [[each - 0.1 * age for age, each in enumerate(row)] for row in when]
    assert _trend(fading, 100.0, 0) == pytest.approx(Interval(*[-0.006] * 3))


def test_uniform_traffic_is_not() -> None:
    answer, reason, found = advised(162, 32, 0.0)
    assert answer == "not worth it" and "less than 1 %" in reason
    assert abs(found.chosen.saving.mean) < 0.02


def test_traffic_that_changes_faster_than_a_rebalance_pays_is_not() -> None:
    # Popularities are drawn anew for every batch: plans know nothing of what comes.
    answer, _, found = advised(162, 32, 1.0, 1)
    assert answer != "worth it" and found.net.low < 0.01
    assert found.tail < 0.3 * advised(162, 32, 1.0)[2].tail


def test_slow_drift_asks_for_shorter_intervals() -> None:
    # Windows of 13 batches; popularities change with every third window, so that a plan is good for at most three.
    trace = traffic(117, 64, skew=1.0, change_every=39)
    batches = cut(trace, ep_size=EP, tokens_per_rank=64, phase="decode", layers=1, shuffle=False, seed=0)
    # Free rebalances: the best interval is the shortest, and it saves more than one plan for all of window B.
    free = setup(solver_s=0.0, stall=False)
    found = judge(free, batches, "decode", [0])
    by_steps = {one.steps: one.saving for one in found.every}
    assert by_steps[13] > by_steps[78] + 0.01
    assert found.aged[0].saving > found.aged[-1].saving


def test_too_short_traffic_is_no_evidence() -> None:
    for batches in (2, 5, 40):
        answer, reason, found = advised(batches, 16, 1.0)
        assert answer == "not enough evidence" and "record" in reason
        assert (found is None) == (batches < 3)


def test_costs_decide_at_a_given_interval() -> None:
    often, seldom = (advised(162, 32, 1.0, interval=steps) for steps in (100, 1_000_000))
    assert (often[0], seldom[0]) == ("not worth it", "worth it if plans keep")
    assert often[2].net.mean < 0 < seldom[2].net.mean
    beside = advised(162, 32, 1.0, interval=3000, stall=False)[2]
    assert beside.chosen.rebalance_s < 0.1 * often[2].chosen.rebalance_s
    # What else a step holds makes the same seconds a smaller share.
    diluted = advised(162, 32, 1.0, interval=1_000_000, other_s=0.5)
    assert diluted[0] == "not worth it" and 0 < diluted[2].net.mean < 0.01


def test_replaying_intervals_over_a_known_grid() -> None:
    # Plans save 10 - age seconds in windows of two batches; six windows.
    grid = [[np.full(2, 10.0 - age) for age in range(6 - first)] for first in range(6)]
    assert _replanned(grid, 1).tolist() == [10.0] * 12
    assert _replanned(grid, 6).tolist() == [10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5]
    assert _replanned(grid, 4).tolist() == [10, 10, 9, 9, 8, 8, 7, 7, 10, 10, 9, 9]
    assert _tail(grid) == pytest.approx((6 + 6 + 5) / 3)
    once = _every(24, grid, 2, 100.0, 0.05, 1.2)
    assert once.saving == pytest.approx((0.075 * 12 + 0.05 * 12) / 24)
    assert once.net == pytest.approx(once.saving - 1.2 / 24)
    assert _every(2, grid, 2, 100.0, 0.05, 0.0).saving == pytest.approx(0.1)


# What they are made of -------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), ranks=st.integers(1, 5))
def test_a_chain_lies_between_its_parts_and_their_sum(seed: int, ranks: int) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    there = rng.random((ranks, ranks)) < 0.7
    out, back = (np.where(there, rng.random((ranks, ranks)), -np.inf) for _ in range(2))
    experts = rng.random(ranks)
    total = float(chain_s(out, experts, back))
    tops = [max(out.max(), 0.0), experts.max(), max(back.max(), 0.0)]
    assert max(tops) <= total <= sum(tops) + 1e-12


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_counts_are_those_of_deepep(phase: Any) -> None:
    clock = Clock(setup(), phase)
    slots = Slots(EXPERTS, EP)
    ids = traffic(1, 16, skew=1.0).topk_ids[0].reshape(EP, 16, K)
    there = Linear().place(slots, Observed.nothing(1, EXPERTS), np.random.default_rng(0))[0]
    sent, nodes, tokens = clock._counts(ids, there, slots, BASELINE.replicas)
    assert np.array_equal(tokens, np.bincount(ids.ravel(), minlength=EXPERTS))
    for rank in range(EP):
        layout = dispatch_layout(ids[rank], slots.slot_rank, EP, 8, EXPERTS, choose(0))
        if phase == "prefill":
            assert np.array_equal(sent[rank], layout.num_tokens_per_rank)
            assert np.array_equal(nodes[rank], layout.num_tokens_per_rdma_rank)
        else:
            assert np.array_equal(sent[rank], layout.num_tokens_per_expert.reshape(EP, -1).sum(axis=1))


def test_replicas_take_all_tokens_and_few_of_them_cost_time() -> None:
    trace = traffic(18, 8, skew=1.0)
    batches = cut(trace, ep_size=EP, tokens_per_rank=8, phase="prefill", layers=2, shuffle=False, seed=0)
    clock = Clock(setup(), "prefill")
    like = Slots(EXPERTS, EP)
    for option in options([0, 8, 16]):
        maps = option.plan(like, batches.loads, 0)
        timed = clock.step(batches.batch(0), maps, option.slots(like), option.replicas)
        assert (timed.pairs.sum(axis=1) == batches.size * K).all()
        assert (timed.layer_s > timed.experts_s).all() and (timed.experts_s > 0).all()


def test_moves_come_from_ranks_that_have_the_expert() -> None:
    slots, clock, where = Slots(EXPERTS, EP, 8), Clock(setup(), "decode"), setup()
    rng = np.random.Generator(np.random.Philox(3))
    loads = rng.random((2, 1, 3, EXPERTS))
    before, after = (Eplb(num_redundant_experts=8).place(slots, Observed(each), rng) for each in loads)
    moved = costs.move(where, clock, before, after, slots)
    sent = np.stack([moves(a, b, slots) for a, b in zip(before, after, strict=True)])
    assert moved.slots == pytest.approx(sent.sum() / 3 * where.model.n_moe_layers)
    assert moved.bytes == pytest.approx(moved.slots * where.model.expert_parameters)  # fp8: a byte each
    assert moved.seconds > 0 and costs.move(where, clock, before, before, slots).bytes == 0
    # A rank that gets two copies of an expert is sent one.
    alone = np.tile(np.arange(EXPERTS, dtype=np.int32), (3, 1))
    twice = np.concatenate([alone.reshape(3, EP, 8), np.full((3, EP, 2), EXPERTS - 1, np.int32)], axis=2).reshape(3, -1)
    sixteen = Slots(EXPERTS, EP, 16)
    assert moved_slots(twice[:, ::-1], twice, sixteen).sum() > moves(twice[0, ::-1], twice[0], sixteen).sum()
    assert costs.move(where, clock, alone, twice, sixteen).slots == (EP - 1) * where.model.n_moe_layers
    # From no redundant experts every copy has to come from somewhere.
    single = Linear().place(Slots(EXPERTS, EP), Observed.nothing(3, EXPERTS), rng)
    assert costs.move(where, clock, single, after, slots).slots >= 3 * 8


def test_replicas_displace_cache_and_cache_holds_requests() -> None:
    where = setup(context=4096)
    alone, more = costs.cache(where, 0, 128), costs.cache(where, 32, 128)
    lost = (alone.tokens - more.tokens) * where.model.kv_cache_bytes_per_token()
    assert more.replica_bytes == pytest.approx(lost)
    assert more.replica_bytes == 4 * where.model.expert_parameters * where.model.n_moe_layers
    assert more.batch_share <= alone.batch_share <= 1
    crowded = costs.cache(where, 32, 10_000)
    assert crowded.batch_share == pytest.approx(crowded.tokens / (10_000 * 4096))
    assert costs.cache(where, 32, 0).batch_share == 1


def test_displaced_requests_count_against_an_option() -> None:
    roomy, crowded = (advised(18, 64, 1.0, context=context)[2] for context in (64, 60_000))
    by_name = {row.option.name: row for row in crowded.rows}
    for row in roomy.rows:
        other = by_name[row.option.name]
        share = other.cache.batch_share / crowded.rows[0].cache.batch_share
        assert 1 - other.saving.mean == pytest.approx((1 - row.saving.mean) / share)
        assert (share < 1) == (row.option.redundant > 0)


def test_a_model_that_does_not_fit_is_said_to() -> None:
    big = load(Model, "deepseek_v3", SCENARIOS / "models", "--model")
    tokens = np.random.Generator(np.random.Philox(0)).random((1, 18 * EP * 4, 256)).argsort(axis=2)[..., :8]
    made = cut(
        checked("made", tokens, n_routed_experts=256), ep_size=EP, tokens_per_rank=4, phase="decode", layers=1, shuffle=False, seed=0
    )  # fmt: skip
    where = setup(model=big)
    found = judge(where, made, "decode", [0, 8])
    assert found is not None and found.base_cache.tokens < 0
    assert all(math.isfinite(row.saving.mean) for row in found.rows)
    assert "does not fit on these ranks" in section(where, made, "decode", found, verdict(where, made, found))
    # Replicas alone may be what is too much.
    roomy = load(Cluster, "mi300x", SCENARIOS / "clusters", "--cluster")
    where = setup(model=big, cluster=roomy, cost=cost_of(roomy.device))
    found = judge(where, made, "decode", [0, 256])
    assert found is not None and found.chosen.option.redundant == 0
    assert [math.isnan(row.saving.mean) for row in found.rows] == [False, True, True, True]
    assert "does not fit" in section(where, made, "decode", found, verdict(where, made, found))


def test_the_rest_of_a_step_grows_with_tokens_and_context() -> None:
    model = load(Model, "deepseek_v3", SCENARIOS / "models", "--model")
    short, long = (setup(model=model, context=context) for context in (1024, 8192))
    for phase in ("decode", "prefill"):
        assert rest_s(short, phase, 64) < rest_s(long, phase, 64) or phase == "prefill"  # type: ignore[arg-type]
        assert rest_s(long, phase, 64) < rest_s(long, phase, 8192)  # type: ignore[arg-type]
    # 8,192 tokens: some 30 GFLOP each outside the routed experts, at 40 to 100 % of a PFLOP/s and a half.
    assert 0.15 < rest_s(long, "prefill", 8192) < 1.0
    stated, by_law = (advised(18, 64, 1.0, other_s=value)[2] for value in (0.01, None))
    assert stated.other_s == 0.01 and by_law.other_s == pytest.approx(rest_s(setup(), "decode", 64))
    assert stated.base_s - 0.01 == pytest.approx(by_law.base_s - by_law.other_s)


def test_batches_use_every_token_once_and_windows_keep_theirs() -> None:
    trace = traffic(20, 8, skew=1.0)
    for phase in ("prefill", "decode"):
        made = cut(trace, ep_size=EP, tokens_per_rank=8, phase=phase, layers=2, shuffle=False, seed=0)  # type: ignore[arg-type]
        assert (made.n_windows, made.per_window, made.n_planned, made.n_batches) == (
            9,
            2,
            3,
            20 if phase == "prefill" else 18,
        )
        for window in range(made.n_windows):
            span = slice(window * 2 * made.size, (window + 1) * 2 * made.size)
            rows_of = [sorted(map(tuple, ids[:, span][1].tolist())) for ids in (made.ids, trace.topk_ids)]
            assert rows_of[0] == rows_of[1]
            assert np.array_equal(
                made.loads[window, 1], np.bincount(trace.topk_ids[1, span].ravel(), minlength=EXPERTS)
            )
    # In decode, a rank's request goes on in the next batch where it was.
    first, second = made.batch(0), made.batch(1)
    assert np.array_equal(first[0, 0, 0], trace.topk_ids[0, 0]) and np.array_equal(
        second[0, 0, 0], trace.topk_ids[0, 1]
    )
    shuffled = cut(trace.part(), ep_size=EP, tokens_per_rank=8, phase="prefill", layers=2, shuffle=True, seed=0)
    assert shuffled.ids.shape == trace.topk_ids.shape


def test_long_traces_are_thinned_evenly() -> None:
    trace = traffic(9 * 60, 1, skew=0.0)
    made = cut(trace, ep_size=EP, tokens_per_rank=1, phase="prefill", layers=1, shuffle=False, seed=0)
    judged = made.judged(1)
    assert len(judged) == 24 and judged.min() == 60 and judged.max() < 120 and len(set(judged.tolist())) == 24
    assert made.loads.sum() == made.n_windows * made.per_window * made.size * K


@pytest.mark.parametrize("a", [0.0, 0.5, 0.9])
def test_autocorrelation_time_of_an_autoregression(a: float) -> None:
    rng = np.random.Generator(np.random.Philox(1))
    x = rng.standard_normal(50_000)
    for t in range(1, len(x)):
        x[t] += a * x[t - 1]
    assert autocorrelation_time(x) == pytest.approx((1 + a) / (1 - a), rel=0.2)


def test_intervals_cover_and_refuse() -> None:
    rng = np.random.Generator(np.random.Philox(5))
    hits = 0
    for _ in range(100):
        base = 10 + rng.standard_normal(120)
        found = ratio(1.0 + rng.standard_normal(120), base, 0)
        hits += found.low <= 0.1 <= found.high
    assert 88 <= hits <= 100
    short = ratio(np.array([1.0, 2.0]), np.array([10.0, 10.0]), 0)
    assert short.mean == pytest.approx(0.15) and math.isnan(short.low) and math.isnan(short.high)
    assert ratio(np.ones(9), np.full(9, 4.0), 0) == Interval(0.25, 0.25, 0.25)


@given(seed=st.integers(0, 2**32), ranks=st.sampled_from([1, 2, 4]), each=st.integers(1, 4), extra=st.integers(0, 4))
def test_biased_puts_the_hottest_everywhere_and_everyone_somewhere(
    seed: int, ranks: int, each: int, extra: int
) -> None:
    slots = Slots(ranks * each, ranks, min(extra, each) * ranks)
    load = np.random.Generator(np.random.Philox(seed)).random((1, 2, ranks * each))
    maps = Biased(num_redundant_experts=slots.num_redundant_experts).place(
        slots, Observed(load), np.random.default_rng(0)
    )
    counts = replica_counts(maps, slots.n_routed_experts)
    assert maps.shape == (2, slots.n_slots) and (counts >= 1).all()
    again = Biased(num_redundant_experts=slots.num_redundant_experts)
    assert np.array_equal(again.place(slots, Observed(2 * load), np.random.default_rng(1)), maps)
    for layer in range(2):
        by_rank = maps[layer].reshape(ranks, -1)
        for expert in np.argsort(-load[0, layer])[: slots.num_redundant_experts // ranks]:
            assert (by_rank == expert).any(axis=1).all()


def test_what_a_trace_does_not_say_is_guessed_and_said() -> None:
    folder = SCENARIOS / "models"
    exact, note = model_of(256, 8, 58, folder)
    assert exact.name == "deepseek_v3" and "256 experts" in note
    near, note = model_of(48, 3, 5, folder)
    assert (near.n_routed_experts, near.num_experts_per_tok, near.n_moe_layers) == (
        48,
        3,
        5,
    ) and "no shipped model" in note
    h100 = load(Cluster, "h100", SCENARIOS / "clusters", "--cluster")
    assert [ep_size_of(n, h100) for n in (256, 12, 7, 11)] == [8, 6, 7, 1]
    a100 = load(Cluster, "a100", SCENARIOS / "clusters", "--cluster")
    assert (cost_of(h100.device).gemm_dtype, cost_of(a100.device).gemm_dtype) == ("fp8", "bf16")
    assert fitting_redundant(16, 8) == [0, 8, 16] and spread_layers(1, 8) == [0]
    assert fitting_tokens(3 * 10**6, 8, "prefill") == 2048
    check_redundant([0, 16], 64, 8)


# The front door --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(traffic(162, 16, skew=1.0), tmp_path_factory.mktemp("traces") / "steady.npz")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(traffic(54, 16, skew=1.0), tmp_path_factory.mktemp("traces") / "short.npz")


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = sim.advise.main(["placement", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_text_begins_with_the_verdict(steady: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = asked(
        capsys,
        steady,
        "--phase",
        "decode",
        "--tokens-per-rank",
        "16",
        "--redundant",
        "0,8",
        "--layers",
        "1",
        "--other-ms",
        "0",
    )
    lines = out.splitlines()
    assert status == 0 and err == ""
    assert lines[0] == "decode, 16 tokens per rank: worth it if plans keep"
    assert "saves" in lines[1] and "95" in out and "assumed:" in out
    assert "deepseek_moe_16b, guessed" in out and "cluster h100, the default" in out
    assert sum(line.strip().startswith(("no balancer", "eplb", "biased")) for line in lines[3:]) >= 5


def test_json_says_the_same_and_the_same_again(short: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (short, "--json", "--redundant", "8", "--layers", "1")
    status, out, _ = asked(capsys, *arguments)
    assert status == 0 and asked(capsys, *arguments)[1] == out
    data = json.loads(out)
    assert set(data) == {"question", "traffic", "tokens", "phases", "assumptions"}
    assert [one["phase"] for one in data["phases"]] == ["decode", "prefill"]
    decode = data["phases"][0]
    assert set(decode) == {
        "phase", "verdict", "reason", "condition", "ep_size", "seen_steps", "saving_trend", "tokens_per_rank", "batch_tokens", "planned_batches", "judged_batches",
        "independent_batches", "baseline", "chosen", "interval_steps", "net_saving", "options", "aged", "every",
    }  # fmt: skip
    assert decode["verdict"] in ("worth it", "worth it if plans keep", "not worth it", "not enough evidence")
    assert (decode["condition"] is not None) == (decode["verdict"] == "worth it if plans keep")
    assert decode["chosen"] in [option["option"] for option in decode["options"]]
    for option in decode["options"]:
        assert set(option["policy"]) == {"placement", "replicas"}
        assert set(option["saving"]) == set(option["break_even_steps"]) == {"mean", "low", "high"}
        assert option["moved_bytes"] >= 0 and 0 < option["batch_share"] <= 1
    other = json.loads(asked(capsys, *arguments, "--seed", "1", "--phase", "decode")[1])["phases"][0]
    assert [one["saving"]["mean"] for one in other["options"]] == [one["saving"]["mean"] for one in decode["options"]]
    assert "NaN" not in out and "Infinity" not in out


def test_options_it_names_run_in_a_scenario(short: str, capsys: pytest.CaptureFixture[str]) -> None:
    from sim.settings import Policy

    data = json.loads(asked(capsys, short, "--json", "--phase", "decode", "--redundant", "8", "--layers", "1")[1])
    for option in data["phases"][0]["options"]:
        policy = Policy.model_validate({"name": "it"} | option["policy"])
        assert policy.placement.num_redundant_experts == 8


def test_a_scenario_brings_its_traffic_and_gate(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = str(SCENARIOS / "tiny.yaml")
    arguments = ("--phase", "decode", "--tokens-per-rank", "4", "--layers", "1", "--redundant", "0", "--json")
    status, out, _ = asked(capsys, tiny, *arguments, "--policy", "top-k + bias")
    assert status == 0
    biased, plain = json.loads(out), json.loads(asked(capsys, tiny, *arguments)[1])
    assert "'top-k + bias' of scenario tiny" in biased["assumptions"][0] and "'top-k' of" in plain["assumptions"][0]
    assert biased["phases"][0]["judged_batches"] >= 100
    assert biased["phases"][0]["baseline"] != plain["phases"][0]["baseline"]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of `record`, which gives a few tokens instead."""
    calls: list[Any] = []

    def few(scenario: Any, policy: Any, layers: Any, n_tokens: int, run: int | None = None) -> RecordedTrace:
        calls.append((scenario.parallel.ep_size, layers, n_tokens, run))
        model = scenario.model_of(policy)
        ids = np.tile(np.arange(model.num_experts_per_tok, dtype=np.int16), (len(layers), 8, 1))
        return checked("few", ids, n_routed_experts=model.n_routed_experts)

    monkeypatch.setattr(simulated, "record", few)
    return calls


def of_scenario(name: str, **changes: Any) -> Any:
    given = {"phases": None, "policy": None, "model": None, "cluster": None, "ep_size": None, "tokens_per_rank": None}
    return simulated.of_scenario(
        str(SCENARIOS / f"{name}.yaml"), SCENARIOS, **(given | {"layers": 8, "batches": None} | changes)
    )


def test_a_serving_scenario_is_asked_about_its_units(recorded: list[Any]) -> None:
    found = of_scenario("redundancy")
    assert set(found) == {"decode"}  # there is no other unit
    decode = found["decode"]
    assert (decode.ep_size, decode.tokens_per_rank, decode.mode) == (32, 256, "low_latency")
    assert [(ranks, len(layers), *rest) for ranks, layers, *rest in recorded] == [(32, 8, 12_000_000 // 8, 256)]
    from sim.loading import load as load_scenario
    from sim.unitmemory import kv_cache_tokens

    whole = load_scenario(str(SCENARIOS / "redundancy.yaml"))
    assert whole.serving is not None
    for policy in whole.policies:
        room = decode.cache_tokens(policy.placement.num_redundant_experts)
        assert room == kv_cache_tokens(whole, policy, whole.serving.units[0])
    # A unit that does both has two batches and its own kernels; the cluster is the policy's.
    both = of_scenario("hardware", policy="H20", batches=18)
    assert {phase: (one.tokens_per_rank, one.mode) for phase, one in both.items()} == {
        "decode": (64, "normal"),
        "prefill": (2048, "normal"),
    }
    assert {one.cluster.name for one in both.values()} == {"h20"} and both["decode"].cluster.n_devices == 32
    assert [(call[0], call[2], call[3]) for call in recorded[1:]] == [
        (32, 18 * 32 * 64, 256),
        (32, 18 * 32 * 2048, None),
    ]


def test_a_policy_brings_its_own_split(recorded: list[Any]) -> None:
    assert of_scenario("ep_size", policy="EP16 x 20")["decode"].ep_size == 16
    assert of_scenario("ep_size", policy="EP16 x 20", ep_size=8)["decode"].ep_size == 8
    # 256 experts on 144 ranks need 32 redundant ones. Routing that is balanced by itself is not asked about unasked.
    decode = of_scenario("v3_decode")["decode"]
    assert decode.ep_size == 144 and "'in order'" in decode.notes[0]
    other = of_scenario("redundancy", cluster="h20", ep_size=16)["decode"]
    assert (other.cluster.name, other.ep_size) == ("h20", 16) and other.cluster.n_devices >= 32


def test_ranks_that_do_not_divide_the_experts_have_redundant_ones_anyway() -> None:
    assert fitting_redundant(EXPERTS, 7) == [6, 13, 20, 34]
    trace = traffic(54, 16, skew=1.0)
    batches = cut(trace, ep_size=7, tokens_per_rank=16, phase="decode", layers=1, shuffle=False, seed=0)
    found = judge(setup(ep_size=7), batches, "decode", [6])
    assert found is not None and found.base_cache.replica_bytes == found.rows[0].cache.replica_bytes > 0
    assert found.chosen.imbalance < found.base_imbalance


def test_redundancy_gets_options_for_its_32_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(SCENARIOS / "redundancy.yaml")
    arguments = ("--tokens-per-rank", "4", "--layers", "1", "--redundant", "0,32", "--json")
    status, out, _ = asked(capsys, path, *arguments)
    (decode,) = json.loads(out)["phases"]
    assert status == 0 and decode["ep_size"] == 32 and decode["batch_tokens"] == 128
    assert decode["judged_batches"] >= 100 and decode["baseline"]["rank_imbalance"] > 0.2
    assert {one["policy"]["placement"]["num_redundant_experts"] for one in decode["options"]} == {0, 32}
    assert [one["moved_slots"] > 0 for one in decode["options"]] == [True] * 4


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("nothing.npz",), "nothing.npz: expected a trace file, found none"),
        (("TRACE", "--cluster", "h1000"), "--cluster must be a file, or one of a100"),
        (("TRACE", "--model", "v3"), "--model must be a file, or one of deepseek_67b"),
        (("TRACE", "--model", "deepseek_v3"), "expected 256 experts, found 64"),
        (("TRACE", "--ep-size", "12"), "--ep-size: ep_size 12 must be at most 8 or a multiple of it"),
        (("TRACE", "--ep-size", "7", "--redundant", "7"), "--redundant must be different numbers, 6 plus multiples"),
        (
            ("TRACE", "--tokens-per-rank", "1000000"),
            "8 ranks x 1,000,000 tokens = 8,000,000 tokens; the traffic has 6,912",
        ),
        (("TRACE", "--batches", "9"), "--batches is for scenarios"),
        (("REDUNDANCY", "--tokens-per-rank", "1000000"), "3 batches of 32 ranks x 1,000,000 tokens = 96,000,000"),
        (("REDUNDANCY", "--batches", "100000"), "100,000 x 32 ranks x 256 tokens x 8 layers = 6,553,600,000 choices"),
        (("REDUNDANCY", "--phase", "prefill"), "--phase prefill: scenario redundancy has no unit for it"),
        (
            ("REDUNDANCY", "--ep-size", "64"),
            "--ep-size 64: serving.units: count x ep_size of all units need 64 devices",
        ),
        (("TRACE", "--ep-size", "0"), "--ep-size must be at least 1 [got 0]"),
        (("TRACE", "--redundant", "8,few"), "--redundant must be numbers separated by commas"),
        (("TRACE", "--redundant", "4"), "--redundant must be different numbers, multiples of the EP size 8"),
        (("TRACE", "--redundant", "8,8"), "--redundant must be different numbers"),
        (("TRACE", "--tokens-per-rank", "-1"), "--tokens-per-rank must be at least 1"),
        (("TRACE", "--interval", "0"), "--interval must be at least 1"),
        (("TRACE", "--other-ms", "nan"), "--other-ms must be a number of at least 0"),
        (("TRACE", "--policy", "top-k"), "--policy is for scenarios"),
        (("TINY", "--policy", "no"), "--policy must be one of top-k, top-k + bias"),
        (("TINY", "--model", "deepseek_v3"), "--model is for traces"),
        (("TINY", "--experts", "8"), "--experts is for traces"),
        (("TINY", "--ep-size", "1000"), "parallel.ep_size"),
        (("missing.yaml",), "missing.yaml"),
    ],
)
def test_bad_calls_are_refused_in_a_line(
    arguments: tuple[str, ...], words: str, short: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"TRACE": short, "TINY": str(SCENARIOS / "tiny.yaml"), "REDUNDANCY": str(SCENARIOS / "redundancy.yaml")}
    status, out, err = asked(capsys, *(known.get(word, word) for word in arguments))
    assert status == 2 and out == "" and words in err
    assert err.startswith("python -m sim.advise: ") and "Traceback" not in err


def test_help_names_the_question(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        sim.advise.main(["--help"])
    assert end.value.code == 0 and "placement" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        sim.advise.main(["weather", "x"])
    assert end.value.code == 2


def test_two_batches_give_no_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = saved(traffic(3, 16, skew=1.0), tmp_path / "few.npz")
    arguments = (few, "--phase", "prefill", "--tokens-per-rank", "16", "--redundant", "0", "--layers", "1")
    status, out, _ = asked(capsys, *arguments)
    assert status == 0 and "nan" not in out and "not enough evidence" in out
    (option,) = json.loads(asked(capsys, *arguments, "--json")[1])["phases"][0]["options"]
    assert option["saving"]["low"] is option["saving"]["high"] is None and option["saving"]["mean"] is not None


def test_real_traces_get_an_answer(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = str(shared / "data" / "gptoss20b_fingerprint" / "mmlu_test_decode.npz")
    status, out, _ = asked(capsys, trace, "--phase", "decode", "--layers", "2", "--redundant", "0", "--json")
    decode = json.loads(out)["phases"][0]
    assert status == 0 and decode["verdict"] == "not enough evidence" and decode["tokens_per_rank"] == 16
    # Subjects come one after the other: plans made on some age on others.
    assert decode["aged"][0]["saving"] > decode["aged"][-1]["saving"] > 0


def test_validation_rows_on_few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LAYERS", 3)
    found = list(rows._r1(Inputs(SCENARIOS)))
    assert all(row.passed for row in found if row.kind == "prediction")
    assert found[2].ours > 5 * found[3].ours
