"""The routed part of a serving iteration, and how the parts of one are put together: each term against its law."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cost.collectives import all_reduce_s
from sim.cost.elementwise import permute_s
from sim.engine.routed import COMBINE, DISPATCH, EXPERTS, LOOKED_AT, RoutedTimes
from sim.engine.routed_counts import demand, reach, scaled
from sim.engine.served import Served
from sim.engine.serving_program import EVEN
from sim.exchange import token_bytes
from sim.pool import Pool
from sim.replicas import assign
from sim.replicas.least_loaded import LeastLoaded
from sim.replicas.round_robin import RoundRobin
from sim.scenario import Scenario
from sim.slots import Slots
from sim.tokens import F64, I16, I32, I64
from tests.iteration_model import tiny, unit_of, work_of

# --- counts of all sources at once ---


@st.composite
def batches(draw: st.DrawFn) -> tuple[I16, I64, I64, I32, Slots]:
    """Tokens of some sources with experts of -1 here and there, quotas by a rule, some cut, some slots empty."""
    ranks, each, experts = draw(st.integers(2, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    slots = Slots(experts, ranks, ranks * max(each, experts) - experts, ranks_per_node=draw(st.sampled_from([1, 2, 3])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    held = rng.integers(-1, experts, slots.n_slots).astype(np.int32)
    sizes = rng.integers(0, 20, draw(st.integers(1, ranks)))
    first = np.cumsum([0, *sizes])
    k = draw(st.integers(1, experts))
    order = np.argsort(rng.random((int(first[-1]), experts)), axis=1)[:, :k]
    ids = np.where(rng.random(order.shape) < 0.1, -1, order).astype(np.int16)
    asked: I64 = np.zeros((ranks, experts), dtype=np.int64)
    asked[: len(sizes)] = demand(ids, first, experts, compiled=False)
    quota = draw(st.sampled_from([RoundRobin(), LeastLoaded()])).quotas(asked, held, slots)[: len(sizes)]
    return ids, first, np.maximum(quota - draw(st.integers(0, 1)), 0), held, slots


@given(batches())
def test_all_sources_at_once_are_each_source_alone(case: tuple[I16, I64, I64, I32, Slots]) -> None:
    ids, first, quota, held, slots = case
    asked = demand(ids, first, slots.n_routed_experts, compiled=True)
    np.testing.assert_array_equal(asked, demand(ids, first, slots.n_routed_experts, compiled=False))
    found = [reach(ids, first, quota, held, slots, compiled=compiled) for compiled in (False, True)]
    for source in range(len(first) - 1):
        own = ids[first[source] : first[source + 1]]
        for expert in range(slots.n_routed_experts):
            assert asked[source, expert] == np.count_nonzero(own == expert)
        ranks, nodes = np.zeros(slots.ep_size), np.zeros(slots.n_nodes)
        for row in assign(own, quota[source], held).tolist():
            there = {slot // slots.slots_per_rank for slot in row if slot >= 0}
            ranks[list(there)] += 1
            nodes[list({rank // slots.ranks_per_node for rank in there})] += 1
        for by_rank, by_node in found:
            np.testing.assert_array_equal(by_rank[source], ranks)
            np.testing.assert_array_equal(by_node[source], nodes)


def test_quotas_of_some_tokens_are_in_the_shares_of_all() -> None:
    quota, held = np.array([[30, 10, 7, 0]]), np.array([0, 0, 1, -1], dtype=np.int32)
    all_of_them = scaled(quota, np.array([[40, 7]]), np.array([[40, 7]]), held)
    np.testing.assert_array_equal(all_of_them, quota)
    np.testing.assert_array_equal(scaled(quota, np.array([[40, 7]]), np.array([[10, 0]]), held), [[8, 3, 0, 0]])


# --- times ---


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    """Normal kernels lend SMs and slow down beside compute; dispatch and combine differ in dtype."""
    law = "{kind: port, num_sms: 24, dispatch_contention: 1.5, combine_contention: 2.5}"
    policies = "[{name: p, select: group_limited}]"
    return tiny(f"cost.communication={law}", f"policies={policies}")


@pytest.fixture(scope="module")
def pool(scenario: Scenario) -> Pool:
    return Pool.of(scenario, scenario.policies[0], 0, sampled_layers=2, pool_tokens=1024)


def _served(scenario: Scenario, pool: Pool, *, dead: tuple[int, ...] = (), unit: Any = None, **state: Any) -> Served:
    maps = np.tile(np.arange(32, dtype=np.int32), (2, 1))
    alive = ~np.isin(np.arange(8), dead)
    maps[:, ~np.repeat(alive, 4)] = -1
    return Served(scenario, scenario.policies[0], unit or unit_of(role="prefill"), pool, maps, alive=alive, **state)


def _routed(scenario: Scenario, pool: Pool, halves: int = 1, **state: Any) -> RoutedTimes:
    served = _served(scenario, pool, **state)
    routed = (served.overlapping if halves == 2 else served.whole).routed
    assert routed is not None
    return routed


def _counts(routed: RoutedTimes, n: int) -> tuple[F64, F64, F64]:
    ids = routed.pool.batch("decode", routed.mixtures[0], 0, len(routed.sources), n)
    ranks, nodes, loads = zip(
        *(routed._counted(ids[i], routed.group.maps[i]) for i in range(len(routed.layers))), strict=True
    )
    return np.stack(ranks), np.stack(nodes), np.stack(loads)


def test_a_long_batch_is_counted_from_some_of_its_tokens(scenario: Scenario, pool: Pool) -> None:
    routed = _routed(scenario, pool)
    ids = pool.batch("decode", routed.mixtures[0], 0, 8, 2 * LOOKED_AT)[0]
    ranks, nodes, loads = routed._counted(ids, routed.group.maps[0])
    first = np.arange(9) * 2 * LOOKED_AT
    asked = demand(np.concatenate(ids), first, 32, compiled=False)
    exact = reach(np.concatenate(ids), first, asked, routed.group.maps[0], routed.group.slots, compiled=False)
    np.testing.assert_array_equal(loads.ravel(), asked.sum(axis=0))
    np.testing.assert_allclose(ranks, exact[0], rtol=0.25)
    assert nodes.sum() == pytest.approx(exact[1].sum(), rel=0.02)


def test_kernels_load_numba_when_they_have_counted_enough(scenario: Scenario, pool: Pool, monkeypatch: Any) -> None:
    slow = _routed(scenario, pool).direct("prefill", np.ones(3) / 3, 0, 48)
    monkeypatch.setattr("sim.engine.routed._WORTH_COMPILING", 0)
    monkeypatch.setenv("GATESIM_KERNELS", "numba")
    fast = _routed(scenario, pool).direct("prefill", np.ones(3) / 3, 0, 48)
    np.testing.assert_array_equal(slow.seconds, fast.seconds)
    assert slow.imbalance == fast.imbalance


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
@pytest.mark.parametrize("halves", [1, 2])
def test_each_way_is_timed_in_its_dtype_and_slowed_by_compute_beside_it(
    scenario: Scenario, pool: Pool, mode: Any, halves: int
) -> None:
    routed = _routed(scenario, pool, halves, unit=unit_of(role="prefill", mode=mode, micro_batches=halves))
    ranks, nodes, _ = _counts(routed, 64)
    found = routed.direct("decode", routed.mixtures[0], 0, 64).seconds
    cost, slower = scenario.cost, {"dispatch": 1.5, "combine": 2.5}
    assert cost.dispatch_dtype != cost.combine_dtype and routed.network is not None
    ways: tuple[Any, ...] = ((DISPATCH, "dispatch", cost.dispatch_dtype), (COMBINE, "combine", cost.combine_dtype))
    for place, direction, dtype in ways:
        seconds, _ = cost.communication.pair_times_s(
            routed.network,
            rank_tokens=ranks,
            node_tokens=nodes,
            bytes_per_token=token_bytes(1024, dtype),
            mode=mode,
            direction=direction,
            slowdown=slower[direction] if halves == 2 and mode == "normal" else 1.0,
        )
        np.testing.assert_allclose(found[place], seconds.max(axis=(1, 2)), rtol=1e-12)


def test_only_normal_kernels_leave_tokens_to_be_permuted(scenario: Scenario, pool: Pool) -> None:
    loads = np.array([[[5.0, 0, 9, 70]], [[0.0, 0, 0, 0]]])
    normal, low = (_routed(scenario, pool, unit=unit_of(role="prefill", mode=m)) for m in ("normal", "low_latency"))
    assert normal.sm_fraction == low.sm_fraction == 1
    moved = permute_s(
        scenario.cost.compute,
        scenario.cluster.device,
        pairs=84.0,
        hidden_size=1024,
        dtype=scenario.cost.gemm_dtype,
    )
    difference = normal.experts_s(loads) - low.experts_s(loads)
    np.testing.assert_allclose(difference, [[float(moved)], [0]], rtol=1e-9)


def test_a_slow_device_slows_its_experts(scenario: Scenario, pool: Pool) -> None:
    factor = np.ones(8)
    factor[3] = 50.0
    healthy, slow = _routed(scenario, pool), _routed(scenario, pool, compute=factor)
    own = healthy.experts_s(_counts(healthy, 64)[2])
    found = slow.direct("decode", slow.mixtures[0], 0, 64).seconds
    np.testing.assert_allclose(found[EXPERTS], 50 * own[:, 3], rtol=1e-12)
    assert (own.max(axis=1) < found[EXPERTS]).all()
    others = healthy.direct("decode", healthy.mixtures[0], 0, 64).seconds
    np.testing.assert_array_equal(found[[DISPATCH, COMBINE]], others[[DISPATCH, COMBINE]])


def test_dead_ranks_count_in_no_mean(scenario: Scenario, pool: Pool) -> None:
    routed = _routed(scenario, pool, dead=(2, 5))
    pairs = _counts(routed, 64)[2].sum(axis=-1)
    assert not pairs[:, [2, 5]].any()
    live = np.delete(pairs, [2, 5], axis=1)
    expected = (live.max(axis=1) / live.mean(axis=1)).mean()
    assert routed.direct("decode", routed.mixtures[0], 0, 64).imbalance == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_a_leading_rank_sends_all_it_has_to_the_ranks_alive(
    scenario: Scenario, pool: Pool, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed = _routed(scenario, pool, dead=(2, 5), unit=unit_of(role="prefill", mode=mode))
    sent: list[F64] = []
    monkeypatch.setattr(routed, "_transfers", lambda *tokens: sent.extend(tokens) or np.zeros(2))
    routed._led(400, 4)
    copies, at_nodes = routed._reach
    expected = np.where(routed.group.alive, 200.0, 0.0)
    expected[0] = 400
    np.testing.assert_allclose(sent[0].sum(axis=1), expected * copies)
    np.testing.assert_allclose(sent[1].sum(axis=1), expected * at_nodes)
    assert not sent[0][:, [2, 5]].any() and (mode == "normal") == (at_nodes > 0)


# --- how an iteration is put together ---


def _asked(served: Served, work: Any, number: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Return kind, mixture, draws, mean and most that `RoutedTimes.each` is asked for."""
    way = served.overlapping if served.unit.micro_batches == 2 else served.whole
    asked: list[tuple[Any, ...]] = []
    each = way.routed.each  # type: ignore[union-attr]
    monkeypatch.setattr(way.routed, "each", lambda *args: asked.append(args) or each(*args))
    served.time(work, number)
    return asked[0]


@pytest.mark.parametrize("halves", [1, 2])
def test_what_is_asked_of_the_routed_layers(
    scenario: Scenario, pool: Pool, halves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.array([64, 96, 64, 32])
    unit = unit_of(role="decode", micro_batches=halves, parallel={"ep_size": 8, "tp_size": 2})
    served = _served(scenario, pool, unit=unit)
    kind, _, draws, mean, most = _asked(served, work_of(tokens), 7, monkeypatch)
    assert kind == "decode" and (mean, most) == (256 / 8 / halves, 96 / 2 / halves)
    assert served.draws == 4 and list(draws) == [3, 0][:halves]


def test_a_batch_is_of_the_kind_of_most_of_its_tokens(
    scenario: Scenario, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, prompts = _served(scenario, pool), np.eye(8, dtype=np.int64)[0]
    for length, kind in ((80, "decode"), (81, "prefill")):
        work = work_of(np.full(8, 10), prompts=prompts, length=length)
        assert _asked(served, work, 0, monkeypatch)[0] == kind


def test_kernels_beside_compute_take_their_sms(scenario: Scenario, pool: Pool) -> None:
    sms = scenario.cluster.device.n_sm
    for mode, lent in (("normal", 24), ("low_latency", 0)):
        served = _served(scenario, pool, unit=unit_of(role="prefill", micro_batches=2, mode=mode))
        for way, share in ((served.whole, 1.0), (served.overlapping, (sms - lent) / sms)):
            assert way.routed is not None
            assert way.trunk.sm_fraction == way.routed.sm_fraction == share


def test_the_choice_of_replicas_takes_its_time_in_every_moe_layer() -> None:
    policies = (
        "[{{name: p, select: random, replicas: {{kind: lp, solve_s: {}}}, "
        "placement: {{kind: linear, num_redundant_experts: 32}}}}]"
    )
    found = []
    for solve_s in (0.0, 1e-3):
        given_ = tiny(f"policies={policies.format(solve_s)}", "steps.warmup={}")
        pool = Pool.of(given_, given_.policies[0], 0, sampled_layers=1, pool_tokens=256)
        maps = np.tile(np.arange(64, dtype=np.int32) % 32, (1, 1))
        served = Served(given_, given_.policies[0], unit_of(role="prefill"), pool, maps)
        found.append(served.time(work_of(np.full(8, 32)), 0))
    assert found[1].attention_ps - found[0].attention_ps == pytest.approx(3 * 10**9, abs=9)  # not in the dense layer
    assert found[1].communication_ps == found[0].communication_ps


def test_the_largest_rank_sets_the_all_reduce_and_the_slowest_the_rest(scenario: Scenario, pool: Pool) -> None:
    """Rank 0 has few tokens and long contexts, rank 3 many tokens and short ones."""
    served = _served(scenario, pool, unit=unit_of(role="decode", parallel={"ep_size": 8, "tp_size": 2}))
    tokens = np.array([16, 16, 16, 48])
    work = replace(work_of(tokens), decode_kv_tokens=tokens * np.array([60_000, 100, 100, 100]))
    named = dict(zip(EVEN, served._trunk(served.whole, work, tokens, 48).tolist(), strict=True))
    trunk = served.whole.trunk
    assert named["before"] == trunk.before.at(16) != trunk.before.at(48)
    reduce = float(all_reduce_s(scenario.cluster, 2, 48 * 1024 * 2.0, 2))
    assert named["all_reduce"] == named["ffn_reduce"] == reduce


@pytest.mark.parametrize("proposed", [0, 2])
def test_padding_attends_to_nothing(scenario: Scenario, pool: Pool, proposed: int) -> None:
    """Rows up to the size of a CUDA graph are multiplied; attention sees the requests and their proposed tokens."""
    served = _served(scenario, pool, unit=unit_of(role="decode", speculative_tokens=proposed))
    trunk, requests = served.whole.trunk, np.full(8, 85)
    tokens = requests * (1 + proposed) + 43
    padded = replace(work_of(requests, 5000), decode_tokens=tokens)
    named = dict(zip(EVEN, served._trunk(served.whole, padded, tokens, int(tokens[0])).tolist(), strict=True))
    core = trunk.decode_core(requests, 1 + proposed, requests * 5000)[0]
    n = int(tokens[0])
    rest = trunk.layer.at(n) - trunk.before.at(n) - trunk.gate.at(n) - trunk.shared.at(n)
    assert named["core"] == pytest.approx(core + rest, rel=1e-12)
