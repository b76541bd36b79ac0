"""Iteration times of a serving group: the pool of routed tokens, the program of two streams, and the times that come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sim.cluster import build_network
from sim.cost.collectives import all_reduce_s
from sim.deployment import Unit
from sim.engine import Op, Plan, maxplus
from sim.engine.iteration import Work
from sim.engine.routed import COMBINE, DISPATCH, EXPERTS, grid
from sim.engine.served import Served
from sim.engine.serving_program import EVEN, Layer, Program, makespan_plain, program
from sim.exchange import token_bytes
from sim.gating.select.balanced import balanced_ids, groups_used
from sim.loading import load
from sim.pool import Pool
from sim.scenario import Scenario
from sim.tokens import I64
from sim.units import to_ps
from sim.validation import Inputs, serving
from tests.iteration_model import SCENARIOS, tiny, unit_of, work_of

# --- balanced routing ---


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(0, 200))
def test_balanced_tokens_have_distinct_experts_in_few_groups_and_even_loads(
    n_group: int, size: int, k: int, topk_group: int, n_tokens: int
) -> None:
    topk_group = min(topk_group, n_group)
    limit = groups_used(k, size, topk_group)
    assume(limit)
    experts = n_group * size
    ids = balanced_ids(n_tokens, n_experts=experts, k=k, n_group=n_group, topk_group=topk_group)
    assert ids.shape == (n_tokens, k)
    for row in ids.tolist():
        assert len(set(row)) == k and 0 <= min(row) <= max(row) < experts
        assert len({e // size for e in row}) == limit
    longer = balanced_ids(n_tokens + 7, n_experts=experts, k=k, n_group=n_group, topk_group=topk_group)
    np.testing.assert_array_equal(longer[:n_tokens], ids)
    whole = balanced_ids(experts * n_group, n_experts=experts, k=k, n_group=n_group, topk_group=topk_group)
    loads = np.bincount(whole.ravel(), minlength=experts)
    assert (loads == loads[0]).all()


# --- the pool ---


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return tiny()


@pytest.fixture(scope="module")
def pool(scenario: Scenario) -> Pool:
    return Pool.of(scenario, scenario.policies[3], 0, sampled_layers=2, pool_tokens=1024)


def test_a_batch_is_the_beginning_of_a_larger_one(pool: Pool) -> None:
    shares = np.array([0.5, 0.25, 0.25])
    for kind in ("decode", "prefill"):
        large = pool.batch(kind, shares, 1, 8, 300)  # type: ignore[arg-type]
        assert large.shape == (2, 8, 300, 4)
        np.testing.assert_array_equal(pool.batch(kind, shares, 1, 8, 70), large[:, :, :70])  # type: ignore[arg-type]
        assert (pool.batch(kind, shares, 2, 8, 300) != large).any()  # type: ignore[arg-type]


def test_batches_mix_topics_as_asked(pool: Pool) -> None:
    assert pool.n_topics == 3
    for kind, shelf in (("decode", pool.decode), ("prefill", pool.prefill)):
        first = shelf.first
        marked = np.repeat(np.arange(3), np.diff(first)).astype(np.int16)
        labelled = Pool(
            pool.layers,
            3,
            *(type(shelf)(marked[None, :, None], first, shelf.starts, shelf.run) for _ in range(2)),
            seed=0,
        )
        for shares in ([1.0, 0, 0], [0, 0, 1.0], [0.5, 0.3, 0.2]):
            topics = labelled.batch(kind, np.array(shares), 0, 8, 1024)  # type: ignore[arg-type]
            found = np.bincount(topics.ravel(), minlength=3) / topics.size
            np.testing.assert_allclose(found, shares, atol=0.02 if kind == "decode" else 0.05)


def test_prefill_takes_runs_and_decode_single_tokens(pool: Pool) -> None:
    shelf = pool.prefill
    numbered = type(shelf)(
        np.arange(shelf.ids.shape[1], dtype=np.int16)[None, :, None], shelf.first, shelf.starts, shelf.run
    )
    labelled = Pool(pool.layers, 1, numbered, numbered, seed=0)
    runs = labelled.batch("prefill", np.array([1.0, 0, 0]), 0, 4, 256)[0, :, :, 0].astype(int)
    assert (np.diff(runs.reshape(4, -1, shelf.run), axis=2) % shelf.first[1] == 1).all()
    assert np.isin(runs[:, :: shelf.run], shelf.starts).all()
    singles = labelled.batch("decode", np.array([1.0, 0, 0]), 0, 4, 256)[0, :, :, 0].astype(int)
    assert (np.diff(singles, axis=1) == 1).mean() < 0.05


def test_a_pool_keeps_what_the_gate_chose(scenario: Scenario) -> None:
    """Group-limited tokens stay in one of two groups; every policy's pool holds as many tokens of each topic."""
    limited = Pool.of(scenario, scenario.policies[2], 0, sampled_layers=3, pool_tokens=256)
    assert (limited.decode.ids // 16 == limited.decode.ids[..., :1] // 16).all()
    assert np.diff(limited.decode.first).tolist() == [256] * 3
    free = Pool.of(scenario, scenario.policies[0], 0, sampled_layers=3, pool_tokens=256)
    assert not (free.decode.ids // 16 == free.decode.ids[..., :1] // 16).all()


# --- the program ---

LAYERS: tuple[Layer, ...] = ("dense", "moe", "moe", "moe", "head")


@st.composite
def programs(draw: st.DrawFn) -> tuple[Program, I64]:
    kinds: list[Layer] = draw(st.lists(st.sampled_from(["dense", "moe"]), min_size=1, max_size=5))
    layers: tuple[Layer, ...] = (*kinds, "head", *draw(st.sampled_from([(), ("moe", "head")])))
    sampled = draw(st.integers(1, 3))
    flags = {name: draw(st.booleans()) for name in ("staged", "exchanges", "shared", "reduces")}
    found = program(layers, sampled, halves=draw(st.sampled_from([1, 2])), **flags)
    size = found.parts.shape[1]
    return found, np.array(draw(st.lists(st.integers(0, 9), min_size=size, max_size=size)), dtype=np.int64)


@given(programs())
def test_a_program_takes_as_long_as_its_plan_and_its_parts_fit_in(case: tuple[Program, I64]) -> None:
    from sim.kernels.streams import makespan

    found, duration = case
    line = maxplus.simulate(found.plan(duration))
    at = duration[found.value]
    assert makespan_plain(found.communicates, found.after, at) == line.makespan_ps
    assert makespan(found.communicates, found.after, at) == line.makespan_ps
    busy = int((found.parts @ duration).sum())
    assert busy == int(at[~found.communicates].sum()) <= line.makespan_ps
    # Every operation of a half waits for all that its layer's inputs need: layers do not overtake each other.
    for i, step in enumerate(found.steps):
        for j in found.after[i][found.after[i] >= 0]:
            assert found.steps[j].half == step.half and found.steps[j].layer <= step.layer


def _durations(sampled: int, halves: int = 2, **seconds: int) -> I64:
    half = [seconds.get(phase, 0) for phase in EVEN]
    for phase in ("dispatch", "experts", "combine"):
        half += [seconds.get(phase, 0)] * sampled
    return np.array(halves * half, dtype=np.int64)


def _length(found: Program, duration: I64) -> int:
    return makespan_plain(found.communicates, found.after, duration[found.value])


def test_one_batch_waits_for_its_exchange_but_for_shared_experts() -> None:
    times = {"before": 2, "core": 5, "shared": 4, "dense": 7, "head": 3, "dispatch": 9, "experts": 6, "combine": 8}
    found = program(LAYERS, 2, halves=1, staged=False, exchanges=True, shared=True, reduces=False)
    assert _length(found, _durations(2, **times)) == (2 + 5 + 7) + 3 * (2 + 5 + 9 + 6 + 8) + 3
    hidden = times | {"dispatch": 1}
    assert _length(found, _durations(2, **hidden)) == (2 + 5 + 7) + 3 * (2 + 5 + 4 + 6 + 8) + 3
    alone = program(LAYERS, 2, halves=1, staged=False, exchanges=False, shared=True, reduces=False)
    assert _length(alone, _durations(2, **times)) == (2 + 5 + 7) + 3 * (2 + 5 + 4 + 6) + 3


@pytest.mark.parametrize("staged", [False, True])
def test_two_halves_hide_short_exchanges_and_long_ones_set_the_pace(staged: bool) -> None:
    layers: tuple[Layer, ...] = ("moe",) * 20
    found = program(layers, 1, halves=2, staged=staged, exchanges=True, shared=True, reduces=False)
    times = {"before": 40, "core": 60, "shared": 10, "experts": 30}
    work = 2 * 20 * (40 + 60 + 10 + 30)
    short = _length(found, _durations(1, **times, dispatch=20, combine=25))
    assert work <= short <= work + 2 * 45  # only the ends of the program are bare
    long = _length(found, _durations(1, **times, dispatch=300, combine=500))
    assert 2 * 20 * 800 <= long <= 2 * 20 * 800 + 2 * 140 + (0 if not staged else 20 * 2 * 200)


def test_stages_leave_the_experts_bare_and_normal_kernels_do_not() -> None:
    """A combine longer than the other half's attention shows; beside normal kernels it has experts to hide behind too."""
    layers: tuple[Layer, ...] = ("moe",) * 20
    times = _durations(1, before=10, core=30, experts=100, dispatch=5, combine=90)
    spans = [
        _length(program(layers, 1, halves=2, staged=s, exchanges=True, shared=False, reduces=False), times)
        for s in (False, True)
    ]
    assert spans[0] < spans[1]


# --- times ---


def _maps(scenario: Scenario, pool: Pool, extra: int = 0) -> Any:
    experts = pool.n_routed_experts
    return np.tile((np.arange(experts + extra) % experts).astype(np.int32), (len(pool.layers), 1))


def _served(scenario: Scenario, pool: Pool, unit: Unit, **state: Any) -> Served:
    return Served(scenario, scenario.policies[3], unit, pool, _maps(scenario, pool), **state)


UNITS = [
    unit_of(role="decode"),
    unit_of(role="decode", micro_batches=2),
    unit_of(role="prefill"),
    unit_of(role="prefill", micro_batches=2, host_overhead_s=1e-3),
]


@pytest.mark.parametrize("unit", UNITS, ids=lambda u: f"{u.role}-{u.micro_batches}")
def test_parts_sum_to_the_duration_and_equal_work_takes_equal_time(scenario: Scenario, pool: Pool, unit: Unit) -> None:
    served, again = _served(scenario, pool, unit), _served(scenario, pool, unit)
    tokens = np.array([40, 41, 30, 38, 44, 40, 39, 37])
    for number in range(6):
        work = work_of(tokens + number, prompts=np.array([0, 1, 0, 0, 2, 0, 0, 0]) * (number % 2))
        timed = served.time(work, number)
        parts = timed.attention_ps, timed.experts_ps, timed.communication_ps, timed.other_ps
        assert sum(parts) == timed.duration_ps and min(parts) >= 0 and timed.imbalance >= 1
        assert served.time(work, number) == timed
    assert again.time(work, number) == timed  # whatever was asked before


def test_times_do_not_depend_on_what_was_asked_before(scenario: Scenario, pool: Pool) -> None:
    works = [(work_of(np.full(8, n), 100 * n), n) for n in (1, 2, 3, 5, 8, 24, 31, 32, 33, 47, 48, 64, 96)]
    works += [(work_of(np.full(8, n), prompts=np.full(8, n % 3), length=700), n) for n in (1, 4, 5)]
    one, two = (_served(scenario, pool, UNITS[1]) for _ in range(2))
    forth = [one.time(work, number) for work, number in works]
    back = [two.time(work, number) for work, number in works[::-1]]
    assert forth == back[::-1]


def test_numba_takes_over_with_the_same_times(scenario: Scenario, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.engine.served._WORTH_COMPILING", 2)
    monkeypatch.setenv("GATESIM_KERNELS", "numba")
    served, work = _served(scenario, pool, UNITS[1]), work_of(np.full(8, 40))
    assert len({served.time(work, 0) for _ in range(4)}) == 1


@pytest.mark.parametrize("unit", [UNITS[0], UNITS[2]], ids=["low_latency", "normal"])
def test_between_the_sizes_of_the_grid_times_are_near_those_of_the_batch_itself(
    scenario: Scenario, pool: Pool, unit: Unit
) -> None:
    routed = _served(scenario, pool, unit).whole.routed
    assert routed is not None
    for kind, sizes in (("decode", (20, 28, 80)), ("prefill", (300, 700, 900))):
        for n in sizes:
            low, high = grid(n)
            assert low < n < high
            routed.at(kind, 0, 0, low, low)  # type: ignore[arg-type]  # what was asked before does not matter
            direct = routed.direct(kind, routed.mixtures[0], 0, n)  # type: ignore[arg-type]
            between = routed.at(kind, 0, 0, n, n)  # type: ignore[arg-type]
            np.testing.assert_allclose(between.seconds.mean(axis=1), direct.seconds.mean(axis=1), rtol=0.02)


@pytest.mark.parametrize("unit", [UNITS[0], UNITS[2]], ids=["low_latency", "normal"])
def test_uneven_ranks_take_as_long_as_their_batch_itself(scenario: Scenario, pool: Pool, unit: Unit) -> None:
    routed = _served(scenario, pool, unit).whole.routed
    assert routed is not None
    tokens = np.array([600, 1800, 640, 500, 700, 620, 580, 640])
    big = routed.pool.batch("decode", routed.mixtures[0], 0, 8, int(tokens.max()))
    cut = [[big[layer][rank][: tokens[rank]] for rank in range(8)] for layer in range(2)]
    direct = routed.timed(cut).seconds.mean(axis=1)
    ours = routed.at("decode", 0, 0, tokens.mean(), tokens.max()).seconds.mean(axis=1)
    np.testing.assert_allclose(ours, direct, rtol=0.04)
    even = routed.at("decode", 0, 0, tokens.mean(), tokens.mean()).seconds.mean(axis=1)
    assert even[DISPATCH] < 0.9 * direct[DISPATCH] and even[COMBINE] < 0.9 * direct[COMBINE]


def test_the_mixture_of_topics_decides_which_experts_are_hot(scenario: Scenario, pool: Pool) -> None:
    routed = _served(scenario, pool, UNITS[2]).whole.routed
    assert routed is not None
    assert routed.mixture(np.array([300, 310, 290])) == routed.mixture(np.zeros(3, dtype=np.int64)) == 0
    alone = [routed.mixture(1000 * one) for one in np.eye(3, dtype=np.int64)]
    np.testing.assert_array_equal(routed.mixtures[alone], np.eye(3))
    times = [routed.at("decode", mixture, 0, 200, 200) for mixture in (0, *alone)]
    assert min(one.imbalance for one in times[1:]) > times[0].imbalance  # topics prefer experts; their mixture less so


def test_decode_attention_between_its_contexts_is_the_law(scenario: Scenario, pool: Pool) -> None:
    trunk = _served(scenario, pool, UNITS[0]).whole.trunk
    requests, context = np.array([1, 7, 64, 0, 200]), np.array([100, 900, 4989, 0, 77_777])
    found = trunk.decode_core(requests, 1, requests * context, np.zeros(5, bool))
    for i in (0, 1, 2, 4):
        law = trunk._attention("decode", np.ones(requests[i]), np.full(requests[i], float(context[i])))
        assert found[i] == pytest.approx(float(law), rel=0.01)
    assert found[3] == 0


def _ranks_plan(served: Served, work: Work, number: int) -> int:
    """The makespan of the same program with every rank's own durations and every pair's own transfer."""
    way = served.overlapping if served.unit.micro_batches == 2 else served.whole
    routed, trunk, ops = way.routed, way.trunk, []
    assert routed is not None and routed.network is not None
    tokens, context = -(-work.decode_tokens // way.halves), -(-work.decode_kv_tokens // way.halves)
    most = int(tokens.max())
    core = trunk.decode_core(tokens, 1, context, np.zeros(8, bool)) + trunk.absorbed.upto(most)[tokens]
    before, gate, shared = (part.upto(most)[tokens] for part in (trunk.before, trunk.gate, trunk.shared))
    rest = trunk.layer.upto(most)[tokens] - before - gate - shared
    ranks = {
        "before": before, "core": core + rest, "gate": gate, "shared": shared, "dense": trunk.dense.upto(most)[tokens],
        "head": trunk.head.upto(most)[tokens],
    }  # fmt: skip
    law, cost, counted = served.scenario.cost.communication, served.scenario.cost, {}
    for half in range(way.halves):
        draw = (number + half) % served.draws
        big = routed.pool.batch("decode", routed.mixtures[routed.mixture(work.topic_tokens)], draw, 8, most)
        for layer in range(2):
            ids = [big[layer][r][: tokens[r]] for r in range(8)]
            counted[half, layer] = routed._counted(ids, routed.group.maps[layer])
    for i, step in enumerate(way.program.steps):
        width = way.program.parts.shape[1] // way.halves
        layer = 0 if step.phase in EVEN else int((way.program.value[i] % width - len(EVEN)) % 2)
        stream, duration, transfer = "compute", np.zeros(8), None
        sent, nodes, loads = counted[step.half, layer]
        if step.phase in ("dispatch", "combine"):
            stream = "communication"
            seconds, reaches = law.pair_times_s(
                routed.network,
                rank_tokens=sent,
                node_tokens=nodes,
                bytes_per_token=token_bytes(
                    served.model.dispatch_hidden_size,
                    cost.dispatch_dtype if step.phase == "dispatch" else cost.combine_dtype,
                ),
                mode=served.mode,
                direction=step.phase,  # type: ignore[arg-type]
                slowdown=law.overlap_slowdown(step.phase, served.mode) if way.halves == 2 else 1.0,  # type: ignore[arg-type]
            )
            if step.phase == "combine":
                seconds, reaches = seconds.T, reaches.T
            transfer = np.where(reaches, to_ps(seconds), np.int64(-1))
        elif step.phase == "experts":
            duration = routed.experts_s(loads)
        else:
            duration = ranks[step.phase]
        after = tuple(sorted(int(j) for j in way.program.after[i] if j >= 0))
        ops.append(Op(step.phase, step.layer, 0, False, stream, after, to_ps(duration), transfer))  # type: ignore[arg-type]
    return maxplus.simulate(Plan(8, tuple(ops))).makespan_ps


@pytest.mark.parametrize(
    "unit", [*UNITS[:3], unit_of(role="prefill", micro_batches=2)], ids=lambda u: f"{u.role}-{u.micro_batches}"
)
def test_one_device_stands_for_all_ranks(scenario: Scenario, pool: Pool, unit: Unit) -> None:
    """Against a plan of eight ranks, each with its own tokens, contexts and peers."""
    served = _served(scenario, pool, unit)
    rng = np.random.default_rng(0)
    for number in range(4):
        work = work_of(rng.integers(100, 140, 8), 3000)
        whole, ours = _ranks_plan(served, work, number), served.time(work, number).duration_ps
        assert 0.99 < ours / whole < 1.03


def test_slow_and_dead_ranks(scenario: Scenario, pool: Pool) -> None:
    work = work_of(np.full(8, 64))
    factor = np.ones(8)
    factor[3] = 2.0
    for unit in UNITS[:2]:
        healthy = _served(scenario, pool, unit).time(work, 0)
        slow = _served(scenario, pool, unit, compute=factor).time(work, 0)
        assert 1.9 * healthy.attention_ps < slow.attention_ps <= 2.01 * healthy.attention_ps
        assert healthy.experts_ps <= slow.experts_ps <= 2.01 * healthy.experts_ps
        ports = _served(scenario, pool, unit, ports=4 * factor**2).time(work, 0)
        assert ports.communication_ps > healthy.communication_ps and ports.experts_ps == healthy.experts_ps
    alive = np.arange(8) != 3
    maps = _maps(scenario, pool).copy()
    maps[:, 12:16] = -1
    left = work.decode_tokens * alive
    dead = Served(scenario, scenario.policies[3], UNITS[0], pool, maps, alive=alive).time(work_of(left), 0)
    assert dead.duration_ps < _served(scenario, pool, UNITS[0]).time(work_of(left + left // 7), 0).duration_ps


def test_replicas_relieve_the_hottest_rank(scenario: Scenario, pool: Pool) -> None:
    placed = tiny("policies.0.placement={kind: linear, num_redundant_experts: 32}", "policies.0.replicas=round_robin")
    unit, work = unit_of(role="prefill"), work_of(np.full(8, 64), prompts=np.full(8, 2))
    single = Served(placed, placed.policies[1], unit, pool, _maps(scenario, pool)).time(work, 0)
    twice = np.tile(np.r_[np.arange(32), np.roll(np.arange(32), 16)].astype(np.int32), (2, 1))
    double = Served(placed, placed.policies[0], unit, pool, twice).time(work, 0)
    assert 1 <= double.imbalance < single.imbalance
    assert double.experts_ps != single.experts_ps


def test_a_dense_model_with_tensor_parallelism() -> None:
    """No experts, no exchange: layers follow each other, two all-reduces in each."""
    given_ = tiny(
        "model={name: dense, num_hidden_layers: 3, hidden_size: 1024, intermediate_size: 4096, vocab_size: 32000, "
        "num_attention_heads: 16, num_key_value_heads: 4}",
        "parallel={ep_size: 4, tp_size: 4}",
        "policies=[{name: dense, select: dense}]",
        "steps.warmup={}",
        "cost.gemm_dtype=bf16",
    )
    unit = unit_of(parallel={"ep_size": 4, "tp_size": 4})
    served = Served(given_, given_.policies[0], unit, None, None)
    work = work_of(np.array([32]), prompts=np.array([1]))
    timed = served.time(work, 0)
    reduce = float(all_reduce_s(given_.cluster, 4, (32 + 512) * 1024 * 2.0, 4))
    assert timed.communication_ps == 6 * int(to_ps(reduce)) and timed.experts_ps == 0 and timed.imbalance == 1
    assert sum((timed.attention_ps, timed.communication_ps, timed.other_ps)) == timed.duration_ps


def test_proposed_tokens_cost_a_layer_and_two_products_each(scenario: Scenario, pool: Pool) -> None:
    """Beside what further queries of the same requests cost in attention."""
    parts = [
        _served(scenario, pool, unit_of(role="decode", speculative_tokens=n)).time(work_of(np.full(8, 32)), 0)
        for n in (0, 1, 2)
    ]
    for name in ("experts_ps", "communication_ps", "other_ps"):
        none, one, two = (getattr(timed, name) for timed in parts)
        assert two - one == one - none > 0
    trunk = _served(scenario, pool, unit_of(role="decode")).whole.trunk
    behind = trunk.head.at(32) + trunk.merge.at(32)
    assert parts[1].other_ps - parts[0].other_ps == pytest.approx(behind * 1e12, abs=2)


def test_more_work_takes_longer(scenario: Scenario, pool: Pool) -> None:
    served = _served(scenario, pool, UNITS[1])
    times = [
        served.time(work_of(np.full(8, n), context), 0).duration_ps
        for n, context in ((16, 500), (32, 500), (32, 5000), (256, 5000))
    ]
    assert times == sorted(times) and len(set(times)) == 4
    skewed = served.time(work_of(np.array([200, *[32] * 7]), 500), 0).duration_ps
    assert skewed > times[1]


def test_the_published_profile() -> None:
    rows = list(serving._profile(Inputs(SCENARIOS)))
    assert len(rows) == 2 and all(row.passed for row in rows)


@given(st.floats(0.1, 1e5))
def test_sizes_of_the_grid_enclose(tokens: float) -> None:
    low, high = grid(tokens)
    assert 1 <= low <= max(tokens, 1) <= high or low == high == tokens
    assert high <= 2 * low and {low.bit_count(), high.bit_count()} <= {1, 2}


def test_slowed_ports_leave_other_links_alone(scenario: Scenario) -> None:
    from sim.engine.routed import slowed_network

    network = build_network(scenario.cluster, 8)
    ports = np.ones(8)
    ports[5] = 4.0
    slow = slowed_network(network, ports)
    changed = [
        name
        for name, a, b in zip(
            network.link_names, network.link_bandwidth_bytes_per_s, slow.link_bandwidth_bytes_per_s, strict=True
        )
        if a != b
    ]
    assert changed and all("gpu:5" in name for name in changed)
    assert EXPERTS == 1


def test_a_recorded_trace_fills_a_pool_as_far_as_it_goes(tmp_path: Path) -> None:
    ids = np.stack([balanced_ids(700, n_experts=32, k=4, n_group=1, topk_group=1)] * 3)
    np.savez(tmp_path / "trace.npz", topk_ids=ids)
    recorded = load(
        SCENARIOS / "tiny.yaml",
        [
            "schedule={phase: forward}",
            "steps={count: 1}",
            f"traffic={{kind: replay, path: {tmp_path / 'trace.npz'}, tokens_per_rank: 8}}",
            "policies=[{name: recorded, select: recorded}]",
        ],
        allow_outside=True,
    )
    pool = Pool.of(recorded, recorded.policies[0], 0, sampled_layers=2, pool_tokens=512)
    assert pool.n_topics == 1 and pool.decode.first.tolist() == [0, 512]
    np.testing.assert_array_equal(pool.decode.ids[0], ids[0, :512])
    small = Pool.of(recorded, recorded.policies[0], 0, sampled_layers=2, pool_tokens=4096)
    assert small.decode.first.tolist() == [0, 640]  # ten pieces of 64


def test_decode_skips_the_template_of_all_prompts() -> None:
    """With 100 common tokens at the start of every sequence, few of the tokens decoded are alike."""
    given_ = tiny("traffic.prefix_length=100", "traffic.sequence_length=128", "steps.warmup={}")
    pool = Pool.of(given_, given_.policies[0], 0, sampled_layers=1, pool_tokens=256)
    kinds = [len(np.unique(shelf.ids[0, : shelf.first[1]], axis=0)) for shelf in (pool.decode, pool.prefill)]
    assert kinds[0] > 1.5 * kinds[1]
