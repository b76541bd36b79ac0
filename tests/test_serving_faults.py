"""Ranks that are slow, die and come back, alone and together, while experts move and caches are handed over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.deployment import Fault
from sim.engine.serving import Finished, Move, Repair
from sim.engine.serving.experts import Experts, holders, without
from sim.engine.serving.tables import Tables
from sim.loading import load
from sim.placement import replica_counts
from sim.rng import stream
from sim.settings import Rebalance
from sim.tokens import F64, I32
from sim.units import PS_PER_S
from tests.serving_model import US, Clock, Fake, requests_of, serve, sizes_of, unit, world

MS = 1000 * US
FOREVER = {"recovery_s": 0.0, "load_bytes_per_s": 1e15}


def slow(at_s: float, until_s: float | None, rank: int, factor: float, kind: str = "slow_device") -> Fault:
    return Fault.model_validate(
        {"at_s": at_s, "until_s": until_s, "unit": "u", "rank": rank, "kind": kind, "factor": factor}
    )


def dead(at_s: float, until_s: float | None = None, rank: int = 0, name: str = "u", **more: object) -> Fault:
    fields = {"at_s": at_s, "until_s": until_s, "unit": name, "rank": rank, "kind": "dead_rank", **FOREVER, **more}
    return Fault.model_validate(fields)


def tables_of(found: Finished, run: object) -> dict[str, dict[str, list[float]]]:
    return Tables(found, run.serving, ("a", "b", "c"), None, {}).all()  # type: ignore[attr-defined]


# One at a time


def test_a_slow_device_slows_iterations_while_it_lasts() -> None:
    policy = Fake()
    fault = Fault(at_s=0.1, until_s=0.3, unit="u", rank=1, kind="slow_device", factor=3)
    found = serve(requests_of([0], [10], [40]), sizes_of(unit(ranks=2)), policy=policy, faults=(fault,))
    log = found.log.columns()
    lasts = (log["end_ps"] - log["start_ps"]) / 20e9
    inside = (log["start_ps"] > 0.12 * PS_PER_S) & (log["end_ps"] < 0.3 * PS_PER_S)
    outside = (log["start_ps"] > 0.38 * PS_PER_S) | (log["end_ps"] < 0.1 * PS_PER_S)
    assert (lasts[inside] > 2.9).all() and inside.any() and (lasts[outside] < 1.1).all()
    assert [state.slow_devices for state in policy.states] == [(), ((1, 3.0),), ()]


def test_a_death_stops_the_group_and_its_requests_are_computed_again() -> None:
    fault = Fault(at_s=0.1, unit="u", rank=1, kind="dead_rank", recovery_s=2.0, load_bytes_per_s=4e9)
    one = unit(ranks=2, load_balance_method="round_robin")
    found = serve(requests_of([0, 0], [10, 10], [40, 40]), sizes_of(one), faults=(fault,))
    stayed, moved = found.requests
    assert (stayed.retries, moved.retries, moved.place) == (0, 1, 0)
    (row,) = found.faults
    assert (row["paused_s"], row["retried"], row["alive_share"], row["loaded_experts"]) == (3.0, 1, 0.75, 2)
    log = found.log.columns()
    assert int(np.diff(np.stack([log["end_ps"][:-1], log["start_ps"][1:]]), axis=0).max()) == 3 * PS_PER_S
    assert stayed.end_ps > 3 * PS_PER_S


def test_a_group_that_recovers_gets_no_requests_while_others_serve() -> None:
    dies = Fault(at_s=0.0, unit="u", rank=0, kind="dead_rank", recovery_s=5.0)
    one = unit(ranks=2, count=2)
    found = serve(requests_of([10**11, 2 * 10**11], [5, 5], [40, 40]), sizes_of(one), faults=(dies,))
    assert [request.place for request in found.requests] == [2, 3]


# Faults that overlap


def test_a_rank_is_as_slow_as_its_worst_fault() -> None:
    policy = Fake()
    faults = slow(0.01, 0.5, 0, 8), slow(0.1, 0.2, 0, 2), slow(0.3, 0.4, 1, 3)
    serve(requests_of([0], [10], [40]), sizes_of(unit(ranks=2)), policy=policy, faults=faults)
    eight = (0, 8.0)
    assert [s.slow_devices for s in policy.states] == [(), *[(eight,)] * 3, (eight, (1, 3.0)), (eight,), ()]


def test_under_tensor_parallelism_a_link_stays_slow_while_one_device_of_the_rank_has_a_slow_one() -> None:
    sizes = replace(sizes_of(unit(ranks=4)), n_ranks=2)
    faults = slow(0.01, 0.3, 0, 8, "slow_link"), slow(0.05, 0.1, 1, 4, "slow_link"), slow(0.0, None, 2, 2, "slow_link")
    run = world(requests_of([0], [10], [30]), (sizes,), faults=faults)
    seen: list[tuple[float, float]] = []
    times = run.policy.times

    def looked(*arguments: object) -> object:
        seen.append(tuple(run.fleet.slow.tolist()))
        return times(*arguments)  # type: ignore[arg-type]

    run.policy.times = looked  # type: ignore[method-assign, assignment]
    run.run()
    assert seen == [(1.0, 2.0), (8.0, 2.0), (8.0, 2.0), (8.0, 2.0), (1.0, 2.0)]


def test_a_rank_is_dead_while_any_of_its_faults_lasts() -> None:
    policy = Fake()
    policy.loading_bytes = 1e9
    faults = dead(0.01, 10.0), dead(0.1, 0.2), dead(0.15, 0.3, rank=1, load_bytes_per_s=1e10)
    found = serve(requests_of([0], [10], [90]), sizes_of(unit(ranks=3)), policy=policy, faults=faults)
    # rank 1 is back when its experts have been loaded, 0.1 s after the end of its fault
    assert [state.dead for state in policy.states] == [(), (0,), (0, 1), (0,)]
    assert [(row["kind"], row["rank"]) for row in found.faults] == [
        ("dead_rank", 0), ("dead_rank", 1), ("revived_rank", 1),
    ]  # fmt: skip
    assert found.faults[2]["load_s"] == pytest.approx(0.1)


def test_under_tensor_parallelism_a_rank_needs_all_its_devices() -> None:
    sizes = replace(sizes_of(unit(ranks=4, load_balance_method="round_robin")), n_ranks=2)
    faults = dead(0.1, 0.3, rank=0), dead(0.15, 0.6, rank=1)
    arrivals = [0, 4 * 10**11, 45 * 10**10, 9 * 10**11, 95 * 10**10]
    found = serve(requests_of(arrivals, [10] * 5, [3] * 5), sizes, faults=faults)
    assert [request.place for request in found.requests] == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("again", [False, True])
def test_a_rank_comes_back_when_it_has_loaded_its_experts(again: bool) -> None:
    """Until 0.2 s, and 0.3 s of loading, which a second death puts off."""
    policy = Fake()
    policy.lost_bytes, policy.loading_bytes = 0.0, 3e9
    faults = (dead(0.1, 0.2, rank=1, load_bytes_per_s=1e10),)
    if again:
        faults = (*faults, dead(0.3, 0.35, rank=1, load_bytes_per_s=1e10))
    arrivals = [0, *range(45 * 10**10, 8 * 10**11, 10**10)]
    n = len(arrivals)
    one = unit(ranks=2, load_balance_method="round_robin")
    found = serve(requests_of(arrivals, [10] * n, [2] * n), sizes_of(one), policy=policy, faults=faults)
    back = 0.65 if again else 0.5
    for request in found.requests[1:]:
        arrival_s = request.arrival_ps / PS_PER_S
        assert request.place == 0 or arrival_s >= back
        if arrival_s > back + 0.05 and request.number + 1 < n:  # after the iteration, they take turns
            assert request.place != found.requests[request.number + 1].place


# Nobody left


def test_with_nobody_left_requests_are_refused_until_somebody_is_back() -> None:
    """A unit of one rank; its experts are loaded anew."""
    policy = Fake()
    policy.loading_bytes = 1e9
    faults = (dead(0.05, 0.2, load_bytes_per_s=1e10),)
    arrivals = [0, 10**11, 25 * 10**10, 5 * 10**11]
    found = serve(requests_of(arrivals, [10] * 4, [20] * 4), sizes_of(unit()), policy=policy, faults=faults)
    assert [request.refused for request in found.requests] == [True, True, True, False]
    died, back = found.faults
    assert (died["alive_share"], back["paused_s"], back["load_s"]) == (0.0, 0.0, pytest.approx(0.1))
    assert died["time_s"] + died["paused_s"] == pytest.approx(0.3)
    assert len(policy.states) == 2  # nobody asks for times of nobody
    run = world(
        requests_of(arrivals, [10] * 4, [20] * 4), (sizes_of(unit(ranks=2)),), faults=(dead(0.05), dead(0.06, rank=1))
    )
    gone = run.run()
    assert all(request.refused for request in gone.requests)
    assert tables_of(gone, run)["service"]["refused"] == [4]
    assert gone.faults[1]["time_s"] + gone.faults[1]["paused_s"] == pytest.approx(0.5)  # the last request's arrival


def test_others_take_over_from_a_group_of_which_nobody_is_left() -> None:
    found = serve(requests_of([0, 0], [10, 10], [20, 20]), sizes_of(unit(count=2)), faults=(dead(0.05),))
    assert [(r.place, r.refused, r.retries) for r in found.requests] == [(1, False, 1), (1, False, 0)]


@pytest.mark.parametrize("arrival", [0, 2 * 10**11])
def test_without_a_decode_unit_prompts_are_not_computed_for_ever(arrival: int) -> None:
    sizes = sizes_of(unit("p", role="prefill"), rate=1e6), sizes_of(unit("d", role="decode"), rate=1e6)
    (request,) = serve(requests_of([arrival], [50], [9]), *sizes, faults=(dead(0.1, name="d"),)).requests
    assert request.refused and request.end_ps < 3 * 10**11


# Caches handed over


def test_a_death_during_a_transfer_sends_the_cache_elsewhere() -> None:
    prefill, decode = unit("p", role="prefill"), unit("d", 2, role="decode")
    sizes = sizes_of(prefill, rate=1e6), sizes_of(decode, rate=1e6)  # 50 ms for 50 tokens
    dies = Fault(at_s=0.03, unit="d", rank=0, kind="dead_rank", recovery_s=0.0, load_bytes_per_s=1e15)
    (request,) = serve(requests_of([0], [50], [2]), *sizes, faults=(dies,)).requests
    assert (request.place, request.retries) == (2, 0)
    assert request.end_ps - request.first_ps > 2 * 50 * MS
    lost = Fault(at_s=0.03, until_s=0.04, unit="p", rank=0, kind="dead_rank", recovery_s=0.0, load_bytes_per_s=1e15)
    (request,) = serve(requests_of([0], [50], [2]), *sizes, faults=(lost,)).requests
    assert (request.retries, request.generated) == (1, 2)


def test_a_cache_that_stands_on_shared_prefixes_is_lost_with_its_rank() -> None:
    prefill = sizes_of(unit("p", role="prefill", prefix_cache="rank", block_size=4, count=2))
    decode = sizes_of(unit("d", role="decode", block_size=4, max_num_seqs=1))
    requests = requests_of([0, 1, 2, 3], [40] * 4, [30] * 4, [0] * 4, [32] * 4)
    run = world(requests, (prefill, decode), faults=(dead(0.12, 0.13, name="p", **FOREVER),))
    found = run.run()
    assert [request.retries for request in found.requests] == [0, 0, 1, 0]
    assert all(request.generated == 30 for request in found.requests)


def test_room_freed_by_a_cache_lost_on_its_way_goes_to_the_next() -> None:
    """Request 0's cache, on its way to the only seat, is lost; request 1's has been waiting for that seat."""
    prefill = sizes_of(unit("p", role="prefill", count=2, block_size=4), bytes_per_token=1e6)
    decode = sizes_of(unit("d", role="decode", block_size=4, max_num_seqs=1))
    found = serve(requests_of([0, 1], [40, 44], [3, 3]), prefill, decode, faults=(dead(0.03, name="p"),))
    late, early = found.requests
    assert (late.retries, early.retries) == (1, 0)
    arrived = late.first_ps + 40 * MS  # when request 0's cache would have arrived, 40 MB at 1 GB/s
    assert early.end_ps == pytest.approx(arrived + (44 + 2 * 20) * MS, abs=MS)
    assert late.end_ps > early.end_ps


def test_room_freed_where_nothing_else_goes_on_is_given_away() -> None:
    """As above, but request 0 fits nowhere else and is refused: nothing ever happens at the decode unit again."""
    large, small = (
        sizes_of(unit(name, role="prefill", block_size=4), blocks, bytes_per_token=1e6)
        for name, blocks in (("p", 1000), ("q", 12))
    )
    decode = sizes_of(unit("d", role="decode", block_size=4, max_num_seqs=1))
    found = serve(requests_of([0, 1], [60, 30], [3, 3]), large, small, decode, faults=(dead(0.03, name="p"),))
    assert [request.refused for request in found.requests] == [True, False]


# Experts that move


def test_a_move_stalls_every_iteration_by_one_chunk() -> None:
    policy = Fake(rebalance=Rebalance(interval_s=0.1, solver_s=0.01))
    policy.chunks_ps = (3 * MS, 4 * MS)
    clock = Clock()
    found = serve(requests_of([0], [10], [9]), sizes_of(unit()), policy=policy)
    plain = serve(requests_of([0], [10], [9]), sizes_of(unit()), policy=Fake(clock))
    assert found.requests[0].end_ps - plain.requests[0].end_ps == (10 + 3 + 4) * MS
    (row,) = found.rebalances
    assert row["done"] and row["added_s"] == pytest.approx(0.017) and row["transfer_s"] == pytest.approx(0.007)
    tokens, ages = policy.plans[0]
    assert tokens.shape == (1, 3) and ages.tolist() == [0.0]
    assert tokens[0, 0] == 10 + 4  # the prompt, and a decode in each of the four iterations begun since


def test_a_move_in_the_background_shares_the_ports() -> None:
    policy = Fake(rebalance=Rebalance(interval_s=0.1, transfer="background"))
    policy.chunks_ps = (30 * MS,)
    found = serve(requests_of([0], [10], [9]), sizes_of(unit()), policy=policy)
    plain = serve(requests_of([0], [10], [9]), sizes_of(unit()))
    # half of an iteration communicates, and that takes twice as long for 30 ms of iterations
    assert found.requests[0].end_ps - plain.requests[0].end_ps == pytest.approx(15 * MS, rel=1e-6)


class Placing(Fake):
    """Four experts on two of three ranks each, moved round by every plan, over links that take 10 ms a slot."""

    def __init__(self, transfer: str = "stall") -> None:
        super().__init__(rebalance=Rebalance.model_validate({"interval_s": 0.2, "transfer": transfer}))
        self.moves: list[tuple[I32, I32]] = []
        self.timed: list[I32 | None] = []

    def first(self, unit: int) -> I32:
        return np.array([[0, 1, 2, 3, 0, 1]], np.int32)

    def plan(self, unit: int, topic_tokens: F64, ages_s: F64, maps: I32) -> I32:
        return np.roll(maps, 3, axis=1)

    def move(self, unit: int, before: I32, after: I32) -> Move:
        self.moves.append((before, after))
        n = int((holders(after, 3, 4) & ~holders(before, 3, 4)).sum())
        return Move(n, 1.0 * n, (10 * MS,) * n)

    def repair(self, unit: int, maps: I32 | None, dead: tuple[int, ...], held: I32 | None) -> Repair:
        assert maps is not None and held is not None
        found = without(maps, dead, 3, 4) if dead else maps
        there = holders(held, 3, 4)
        there[:, list(dead)] = False
        n = int((holders(found, 3, 4) & ~there).sum())
        return Repair(found, 1.0, n, n * 1e8)

    def times(self, unit, maps, state):  # type: ignore[no-untyped-def]
        if maps is not None:
            held = maps.reshape(3, -1)
            assert (held[list(state.dead)] == -1).all() and set(range(4)) <= set(held.ravel().tolist())
        self.timed.append(maps)
        return super().times(unit, maps, state)


@pytest.mark.parametrize("transfer", ["stall", "background"])
def test_a_plan_moves_nothing_to_dead_ranks_and_a_rank_that_returns_loads_it(transfer: str) -> None:
    policy = Placing(transfer)
    fault = dead(0.05, 0.5, rank=1, load_bytes_per_s=1e9)
    found = serve(requests_of([0], [10], [60]), sizes_of(unit(ranks=3)), policy=policy, faults=(fault,))
    lost, back = found.faults
    assert lost["load_s"] == pytest.approx(0.2)  # experts 2 and 3
    first, second, *others = policy.moves
    for before, after in (first, second):
        assert (before.reshape(3, -1)[1] == -1).all() and (after.reshape(3, -1)[1] == -1).all()
        assert set(after[after >= 0].tolist()) == set(range(4))
    assert back["loaded_experts"] >= 2 and back["load_s"] == pytest.approx(0.1 * back["loaded_experts"])
    assert (others[-1][1] >= 0).all() and any(maps is not None and (maps >= 0).all() for maps in policy.timed[3:])
    done = [row for row in found.rebalances if row["done"]]
    assert done[0]["moved_slots"] == int((holders(first[1], 3, 4) & ~holders(first[0], 3, 4)).sum()) > 0


def test_a_rank_that_returns_follows_a_plan_that_others_went_over_to_meanwhile() -> None:
    """Loading from 0.3 s on; the plan of 0.4 s is in effect long before it ends."""
    policy = Placing("background")
    fault = dead(0.05, 0.3, rank=1, load_bytes_per_s=1e9)
    found = serve(requests_of([0], [10], [30]), sizes_of(unit(ranks=3)), policy=policy, faults=(fault,))
    back = found.faults[1]
    assert 0.48 < back["time_s"] + back["load_s"] < 0.59
    plan = np.roll(policy.first(0), 2 * 3, axis=1)
    whole = [maps for maps in policy.timed if maps is not None and (maps >= 0).all()]
    assert np.array_equal(whole[1], plan) and not np.array_equal(np.roll(plan, 3, axis=1), plan)


def test_a_plan_moves_nothing_where_nobody_is_left() -> None:
    policy = Placing()
    faults = tuple(dead(0.05, rank=rank) for rank in range(3))
    found = serve(
        requests_of([0, 5 * 10**11], [10] * 2, [90] * 2), sizes_of(unit(ranks=3)), policy=policy, faults=faults
    )
    assert not policy.moves and [row["moved_slots"] for row in found.rebalances] == [0, 0]


def test_a_death_during_a_move_begins_it_anew() -> None:
    policy = Placing("background")
    found = serve(requests_of([0], [10], [30]), sizes_of(unit(ranks=3)), policy=policy, faults=(dead(0.21, rank=2),))
    (_, old), (_, new) = policy.moves[:2]
    assert (old >= 0).all() and (new.reshape(3, -1)[2] == -1).all()
    assert found.rebalances[0]["moved_slots"] == sum(
        int((holders(after, 3, 4) & ~holders(before, 3, 4)).sum()) for before, after in policy.moves[:2]
    )


def test_what_a_plan_moved_and_cost_is_that_of_all_groups() -> None:
    policy = Fake(rebalance=Rebalance(interval_s=0.2))
    policy.chunks_ps = (MS, 2 * MS)
    found = serve(requests_of([0] * 4, [40] * 4, [20] * 4), sizes_of(unit(count=2)), policy=policy)
    row = found.rebalances[0]
    assert (row["moved_slots"], row["moved_bytes"]) == (6, 10.0)
    assert row["added_s"] == pytest.approx(0.006) and row["transfer_s"] == pytest.approx(0.003)


@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(1, 3), st.integers(0, 2), st.data())
def test_what_a_death_leaves_is_placed_again(seed: int, ranks: int, per: int, extra: int, data: st.DataObject) -> None:
    draw = stream(seed, "test", "without")
    experts = ranks * per
    maps = np.stack([draw.permutation(np.arange(ranks * (per + extra)) % experts) for _ in range(3)]).astype(np.int32)
    dead = tuple(sorted(data.draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=ranks - 1))))
    found, missing = without(maps, dead, ranks, experts), 0
    held = found.reshape(3, ranks, -1)
    assert (held[:, list(dead)] == -1).all()
    for layer, before in zip(held, maps.reshape(3, ranks, -1), strict=True):
        assert set(layer[layer >= 0].tolist()) == set(range(experts))
        alive = np.delete(before, list(dead), axis=0)
        missing += experts - len(set(alive.ravel().tolist()))
    there = holders(maps, ranks, experts)
    there[:, list(dead)] = False
    assert int((holders(found, ranks, experts) & ~there).sum()) == missing  # nothing else is loaded
    if not extra:
        assert missing == 3 * per * len(dead)
    assert np.array_equal(without(found, dead, ranks, experts), found)
    assert (replica_counts(np.where(found < 0, experts, found), experts + 1)[:, :experts] >= 1).all()


TOY = Path(__file__).resolve().parents[1] / "scenarios/tiny.yaml"
SERVING = (
    "serving={{duration_s: 2, sampled_layers: 2, pool_tokens: 128, draws: 1, "
    "requests: {{kind: poisson, rate_per_s: 20, input_tokens: 300, output_tokens: 20}}, "
    "units: [{{name: u, parallel: {{ep_size: {ranks}}}, kv_cache_tokens: 4096}}]}}"
)


def toy(ranks: int, extra: int = 0) -> Experts:
    placement = f"{{kind: eplb, num_redundant_experts: {extra}}}" if extra else "{kind: linear}"
    policies = f"policies=[{{name: a, placement: {placement}, rebalance: {{interval_s: 0.1, threshold: 1.0}}}}]"
    changes = ["schedule={phase: forward}", "replicas=1", SERVING.format(ranks=ranks), policies]
    scenario = load(TOY, changes)
    return Experts(scenario, scenario.policies[0], 0)


def test_experts_are_repaired_moved_and_loaded_as_they_are_held() -> None:
    experts = toy(8, extra=8)
    first = experts.first(0)
    assert first is not None
    repair = experts.repair(0, first, (3,), first)
    maps = repair.maps
    assert maps is not None
    there = holders(first, 8, 32)
    there[:, 3] = False
    share = there.any(axis=1).mean()
    assert repair.alive_share == pytest.approx(share)
    assert repair.loaded == round((1 - share) * 32 * experts.model.n_moe_layers)
    back = experts.repair(0, first, (), maps)
    assert back.maps is first and back.loaded >= round(
        experts.per_layer * 5 * 2
    )  # rank 3 holds 5 experts of each layer
    planned = experts.plan(0, np.array([[5000.0, 10.0, 10.0]]), np.array([0.0]), first)
    assert planned is not None and not np.array_equal(planned, first)
    target = experts.repair(0, planned, (3,), maps).maps
    assert target is not None
    moved = experts.move(0, maps, target)
    new = (holders(target, 8, 32) & ~holders(maps, 8, 32)).sum()
    assert moved.slots == round(int(new) * experts.per_layer) > 0
    assert not holders(target, 8, 32)[:, 3].any()
    emptied = maps.copy()
    emptied[:, 0] = -1
    assert experts.move(0, maps, emptied).slots == 0  # empty slots of rank 3 fill none of rank 0


def test_one_device_that_dies_leaves_no_experts() -> None:
    experts = toy(1)
    first = experts.first(0)
    assert first is not None
    nothing = np.full_like(first, -1)
    back = experts.repair(0, first, (), nothing)
    assert (back.loaded, back.alive_share) == (32 * 3, 0.0) and back.maps is first
    with pytest.raises(ValueError, match="no rank is left"):
        without(first, (0,), 1, 32)
    run = world(
        requests_of([0, 5 * 10**11], [10] * 2, [20] * 2), (sizes_of(unit()),), experts, faults=(dead(0.0001, 0.1),)
    )  # type: ignore[arg-type]
    assert [request.refused for request in run.run().requests] == [True, False]
