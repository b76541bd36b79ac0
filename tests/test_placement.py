"""Placement rules: EPLB against a plain port of its own, laws over every rule, and what each rule promises besides.

Plans are judged by closed forms, by an independent partitioner (networkx) and on recorded routing of DeepSeek-V2-Lite.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.placement import Observed, Placement, moved_slots, per_slot_load, replica_counts
from sim.placement.annealed import Annealed
from sim.placement.biased import Biased
from sim.placement.coactivation import Coactivation
from sim.placement.eplb import Eplb, balanced_packing, rebalance_experts, replicate_experts
from sim.placement.greedy import Greedy
from sim.placement.incremental import Incremental
from sim.placement.linear import Linear
from sim.placement.random import RandomPlacement
from sim.placement.round_robin import RoundRobin
from sim.rng import stream
from sim.slots import Slots
from sim.tokens import F64, I32, I64
from tests.strategies import seeds

README = (
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    16,
    4,
    2,
    8,
)

# --- EPLB, layer by layer, as one would write it down ---


def plain_packs(weight: np.ndarray, num_packs: int) -> list[list[int]]:
    room = len(weight) // num_packs
    if room == 1:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    load = [weight.dtype.type(0)] * num_packs
    for item in np.argsort(-weight, kind="stable").tolist():
        pack = min((p for p in range(num_packs) if len(packs[p]) < room), key=load.__getitem__)
        packs[pack].append(item)
        load[pack] += weight[item]
    return packs


def plain_eplb(
    weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, dtype: type = np.float32
) -> list[list[tuple[int, int]]]:
    """Return the slots of every layer: (expert, which of its replicas)."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    found = []
    for load in np.asarray(weight).astype(dtype):
        size, slots = len(load) // num_groups, []
        for groups in plain_packs(load.reshape(num_groups, size).sum(axis=-1), num_nodes):
            experts = [group * size + i for group in groups for i in range(size)]
            mine, count = load[experts], np.ones(len(experts), dtype=dtype)
            replicas = [(i, 0) for i in range(len(experts))]
            for _ in range(num_replicas // num_nodes - len(experts)):
                hottest = int((mine / count).argmax())
                replicas.append((hottest, int(count[hottest])))
                count[hottest] += 1
            share = (mine / count)[[i for i, _ in replicas]]
            for gpu in plain_packs(share, num_gpus // num_nodes):
                slots += [(experts[replicas[r][0]], replicas[r][1]) for r in gpu]
        found.append(slots)
    return found


def assert_as_plain(weight: Any, *sizes: int) -> None:
    physical, logical, count = rebalance_experts(weight, *sizes)
    for layer, slots in enumerate(plain_eplb(weight, *sizes)):
        assert physical[layer].tolist() == [expert for expert, _ in slots]
        for slot, (expert, replica) in enumerate(slots):
            assert logical[layer, expert, replica] == slot
    assert (count == replica_counts(physical, count.shape[1])).all()
    assert ((logical >= 0).sum(axis=-1) == count).all() and logical.shape == (*count.shape, count.max())
    assert physical.dtype == logical.dtype == count.dtype == np.int64


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int, int]:
    """Loads and sizes of one rebalance, hierarchical or not; whole loads with and without ties, and real ones."""
    num_nodes, gpus_per_node = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    num_groups = draw(st.one_of(st.integers(1, 3).map(lambda k: k * num_nodes), st.integers(1, 7)))
    experts = num_groups * draw(st.integers(1, 8))
    num_gpus = num_nodes * gpus_per_node
    least = -(-experts // num_gpus)
    num_replicas = num_gpus * draw(st.integers(least, least + 3))
    rng = stream(draw(seeds), "test")
    kind = draw(st.sampled_from(["tied", "whole", "real", "zeros"]))
    shape = (draw(st.integers(1, 4)), experts)
    weight = {
        "tied": lambda: rng.integers(0, 6, shape),
        "whole": lambda: rng.integers(0, 2_000_000, shape),
        "real": lambda: rng.lognormal(0, 1.5, shape) * 1e3,
        "zeros": lambda: np.zeros(shape),
    }[kind]()
    return weight, num_replicas, num_groups, num_nodes, num_gpus


@given(problems())
def test_eplb_is_the_plain_port_on_every_shape(problem: tuple[np.ndarray, int, int, int, int]) -> None:
    assert_as_plain(*problem)


@pytest.mark.parametrize(
    "sizes", [(320, 8, 8, 64), (320, 8, 4, 32), (288, 1, 18, 144), (288, 8, 4, 32), (256, 8, 4, 32)]
)
def test_eplb_is_the_plain_port_at_v3_sizes(sizes: tuple[int, int, int, int]) -> None:
    assert_as_plain(np.round(stream(3, "v3").lognormal(0, 0.7, (4, 256)) * 1000), *sizes)


def test_the_readme_of_upstream() -> None:
    assert_as_plain(*README)
    physical, logical, count = rebalance_experts(*README)
    assert physical[0].tolist() == [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]
    assert physical[1].tolist() == [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]
    assert count[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert sorted(logical[0, 5].tolist()) == [0, 2]


def test_float32_decides_as_upstream_does() -> None:
    """Two loads per replica that only float64 tells apart tie, and the first gets the replica."""
    weight = np.array([[2**24 / 2, (2**24 + 1) / 2, 1.0]])
    assert weight[0, 0] < weight[0, 1]
    assert rebalance_experts(weight, 4, 1, 1, 1)[2].tolist() == [[2, 1, 1]]
    assert [e for e, _ in plain_eplb(weight, 4, 1, 1, 1, np.float64)[0]].count(1) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight": [1.0, 2.0]}, "weight"),
        ({"weight": np.zeros((0, 4))}, "weight"),
        ({"weight": [[1.0, -1.0, 1.0, 1.0]]}, "weight"),
        ({"weight": [[1.0, np.nan, 1.0, 1.0]]}, "weight"),
        ({"weight": [[1.0, np.inf, 1.0, 1.0]]}, "weight"),
        ({"weight": [[3e38, 3e38, 1.0, 1.0]]}, "weight"),
        ({"num_replicas": 2}, "num_replicas"),
        ({"num_replicas": 7}, "num_gpus"),
        ({"num_groups": 0}, "num_groups"),
        ({"num_groups": 3, "num_nodes": 1}, "num_groups"),
        ({"num_nodes": -1}, "num_nodes"),
        ({"num_groups": 4, "num_nodes": 4}, "num_nodes"),
        ({"num_gpus": 0}, "num_gpus"),
    ],
)
def test_eplb_names_the_argument_that_is_wrong(change: dict[str, Any], named: str) -> None:
    given_: dict[str, Any] = {
        "weight": [[1.0, 2, 3, 4]],
        "num_replicas": 6,
        "num_groups": 2,
        "num_nodes": 2,
        "num_gpus": 2,
    }
    rebalance_experts(**given_)
    with pytest.raises(ValueError, match=named):
        rebalance_experts(**given_ | change)


def test_packing_and_replication_by_hand() -> None:
    """9 | 7 first, then 5 joins 7, 4 joins 9, 3 and 1 fill; the hottest per replica gets the next one."""
    assert balanced_packing(np.array([[1.0, 9, 5, 4, 7, 3]]), 2).tolist() == [[1, 3, 0, 4, 2, 5]]
    expert, made, count = replicate_experts(np.array([[12.0, 7, 1]]), 6)
    assert (expert.tolist(), made.tolist(), count.tolist()) == ([[0, 1, 2, 0, 1, 0]], [[0, 0, 0, 1, 1, 2]], [[3, 2, 1]])
    assert replicate_experts(np.array([[12.0, 7, 1]]), 6, most=2)[2].tolist() == [[2, 2, 2]]


def test_policies_of_eplb() -> None:
    slots = Slots(32, 8, 8, ranks_per_node=4, n_group=4)
    skewed = Observed(np.repeat([[[40.0, 1, 1, 1]]], 8, axis=-1).reshape(1, 1, 32))
    auto, tree, flat = (Eplb(policy=p).place(slots, skewed, stream(0)) for p in ("auto", "hierarchical", "global"))
    assert (auto == tree).all() and (auto != flat).any()
    assert peak(flat, skewed.load, slots) <= peak(tree, skewed.load, slots)
    # A group stays inside a node under the first, not under the second.
    homes = [{int(n) for n in np.arange(40)[tree[0] // 8 == g] // 20} for g in range(4)]
    assert all(len(home) == 1 for home in homes)
    odd = Slots(30, 6, ranks_per_node=2, n_group=5)
    with pytest.raises(ValueError, match="n_group"):
        Eplb(policy="hierarchical").place(odd, Observed.nothing(1, 30), stream(0))
    loads = Observed(stream(1).random((1, 1, 30)))
    assert (Eplb().place(odd, loads, stream(0)) == Eplb(policy="global").place(odd, loads, stream(0))).all()


# --- laws of every rule ---

Law = Callable[[Placement, Slots, Observed], None]
RULES: list[Placement] = [
    Linear(),
    RoundRobin(),
    RandomPlacement(),
    Biased(),
    Eplb(),
    Eplb(policy="global"),
    Greedy(),
    Incremental(),
    Annealed(steps=20),
    Coactivation(),
]
BY_LOAD = RULES[4:]  # what is balanced by load alone; `biased` is by design not


def named(rule: Placement) -> str:
    return rule.kind


def rank_load(placed: I32, load: F64, slots: Slots) -> F64:
    """[L, P]"""
    return per_slot_load(load, placed).reshape(len(placed), slots.ep_size, -1).sum(axis=-1)


def peak(placed: I32, load: F64, slots: Slots) -> float:
    """Largest over mean rank load, averaged over layers."""
    total = rank_load(placed, load, slots)
    return float((total.max(axis=-1) / total.mean(axis=-1)).mean())


def traffic(seed: int, slots: Slots, layers: int = 3, windows: int = 2, previous: bool = False) -> Observed:
    """Traffic without ties: loads, pairs and, if asked for, a random map in force."""
    rng, experts = stream(seed, "traffic"), slots.n_routed_experts
    pairs = rng.random((layers, experts, experts))
    before = RandomPlacement().place(slots, Observed.nothing(layers, experts), rng) if previous else None
    tokens = rng.lognormal(0, 1, (windows, layers, experts))
    return Observed(tokens, coactivation=pairs + pairs.transpose(0, 2, 1), previous=before)


@st.composite
def layouts(draw: st.DrawFn) -> Slots:
    ranks_per_node, nodes, n_group = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    experts, ep_size = n_group * draw(st.integers(1, 8)), ranks_per_node * nodes
    redundant = -experts % ep_size + ep_size * draw(st.integers(0, 3))
    return Slots(experts, ep_size, redundant, ranks_per_node, n_group)


def law_every_expert_has_a_slot(rule: Placement, slots: Slots, observed: Observed) -> None:
    placed = rule.place(slots, observed, stream(0, "rule"))
    assert placed.shape == (observed.expert_tokens.shape[1], slots.n_slots) and placed.dtype == np.int32
    assert placed.min() >= 0 and placed.max() < slots.n_routed_experts
    assert (replica_counts(placed, slots.n_routed_experts) >= 1).all()


def law_repeatable(rule: Placement, slots: Slots, observed: Observed) -> None:
    once, again = (rule.place(slots, observed, stream(7, "rule")) for _ in range(2))
    assert (once == again).all()


def law_nothing_touched(rule: Placement, slots: Slots, observed: Observed) -> None:
    arrays = [a for a in (observed.expert_tokens, observed.coactivation, observed.previous) if a is not None]
    before = [a.copy() for a in arrays]
    rule.place(slots, observed, stream(0, "rule"))
    assert all((a == b).all() for a, b in zip(arrays, before, strict=True))


LAWS = [law_every_expert_has_a_slot, law_repeatable, law_nothing_touched]


@pytest.mark.parametrize("rule", RULES, ids=named)
@given(slots=layouts(), seed=seeds, previous=st.booleans())
def test_laws_of_every_rule(rule: Placement, slots: Slots, seed: int, previous: bool) -> None:
    for law in LAWS:
        law(rule, slots, traffic(seed, slots, previous=previous))


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_every_rule_can_start_before_any_traffic(rule: Placement) -> None:
    slots = Slots(12, 4, 4, ranks_per_node=2, n_group=2)
    nothing = Observed(np.zeros((0, 2, 12)), coactivation=np.zeros((2, 12, 12)))
    law_every_expert_has_a_slot(rule, slots, nothing)
    if rule in BY_LOAD:
        counts = replica_counts(rule.place(slots, nothing, stream(0)), 12)
        assert counts.max() == 2, "nothing seen counts as even load"


@pytest.mark.parametrize("rule", [r for r in RULES if r.kind not in ("random", "annealed")], ids=named)
@given(slots=layouts(), seed=seeds)
def test_layers_do_not_influence_each_other(rule: Placement, slots: Slots, seed: int) -> None:
    seen = traffic(seed, slots)
    together = rule.place(slots, seen, stream(0))
    assert seen.coactivation is not None
    for layer in range(3):
        one = Observed(seen.expert_tokens[:, [layer]], coactivation=seen.coactivation[[layer]])
        assert (rule.place(slots, one, stream(0))[0] == together[layer]).all()


class _Broken(Linear):
    kind: str = "broken"  # type: ignore[assignment]
    law: str

    def place(self, slots: Slots, observed: Observed, rng: np.random.Generator) -> I32:
        placed = super().place(slots, observed, rng)
        if self.law == law_every_expert_has_a_slot.__name__:
            placed[placed == slots.n_routed_experts - 1] = 0
        elif self.law == law_repeatable.__name__:
            placed = np.random.default_rng().permuted(placed, axis=1)
        elif self.law == law_nothing_touched.__name__:
            observed.expert_tokens[:] = 0
        return placed


@pytest.mark.parametrize("law", LAWS)
def test_every_law_catches_a_rule_that_breaks_it(law: Law) -> None:
    slots = Slots(64, 8)
    law(Linear(), slots, traffic(0, slots))
    with pytest.raises(AssertionError):
        law(_Broken(law=law.__name__), slots, traffic(0, slots))


@pytest.mark.parametrize("rule", BY_LOAD, ids=named)
@given(slots=layouts(), seed=seeds, previous=st.booleans())
def test_twice_the_tokens_are_the_same_plan(rule: Placement, slots: Slots, seed: int, previous: bool) -> None:
    seen = traffic(seed, slots, previous=previous)
    assert seen.coactivation is not None
    double = Observed(2 * seen.expert_tokens, 2 * seen.coactivation, seen.previous)
    assert (rule.place(slots, seen, stream(0)) == rule.place(slots, double, stream(0))).all()


@pytest.mark.parametrize("rule", BY_LOAD, ids=named)
@given(seed=seeds, redundant=st.sampled_from([0, 8, 16]), previous=st.booleans())
def test_other_names_for_the_experts_of_a_group_change_no_load(
    rule: Placement, seed: int, redundant: int, previous: bool
) -> None:
    slots = Slots(24, 8, redundant, ranks_per_node=4, n_group=4)
    seen = traffic(seed, slots, previous=previous)
    rng = stream(seed, "names")
    old = np.concatenate([group * 6 + rng.permutation(6) for group in range(4)])  # the old name of each new one
    new = np.argsort(old)
    assert seen.coactivation is not None
    renamed = Observed(
        seen.expert_tokens[..., old],
        seen.coactivation[:, old][:, :, old],
        None if seen.previous is None else new[seen.previous].astype(np.int32),
    )
    loads = [rank_load(rule.place(slots, given_, stream(0)), given_.load, slots) for given_ in (seen, renamed)]
    np.testing.assert_allclose(*loads, rtol=1e-9)


@pytest.mark.parametrize("rule", [Eplb(), Eplb(policy="global"), Greedy()], ids=named)
@given(seed=seeds)
def test_more_redundant_experts_never_raise_the_load_of_a_replica(rule: Placement, seed: int) -> None:
    before = np.full(3, np.inf)
    for redundant in range(0, 33, 8):
        slots = Slots(32, 8, redundant, ranks_per_node=4, n_group=4)
        seen = traffic(seed, slots)
        now = per_slot_load(seen.load, rule.place(slots, seen, stream(0))).max(axis=-1)
        assert (now <= before * (1 + 1e-6)).all()
        before = now


def test_redundancy_does_what_is_published() -> None:
    """Log-normal loads (sigma 0.7), 58 x 256 experts on 4 nodes of 8: max/mean 1.775 -> 1.046 with 32 spare slots."""
    load = stream(0, "lognormal").lognormal(0, 0.7, (58, 256))
    seen, spare, none = Observed(load[None]), Slots(256, 32, 32, 8, 8), Slots(256, 32, 0, 8, 8)
    assert peak(Linear().place(none, seen, stream(0)), load, none) == pytest.approx(1.775, rel=0.03)
    assert peak(Eplb().place(spare, seen, stream(0)), load, spare) == pytest.approx(1.046, abs=0.01)
    assert peak(Eplb(policy="global").place(spare, seen, stream(0)), load, spare) < 1.015


# --- rules without evidence ---


def test_round_robin_deals_and_linear_does_not() -> None:
    slots = Slots(10, 4, 6)
    nothing = Observed.nothing(2, 10)
    dealt, straight = (rule.place(slots, nothing, stream(0)) for rule in (RoundRobin(), Linear()))
    for rank in range(4):
        assert {e % 4 for e in dealt[0, rank * 4 : rank * 4 + 2].tolist()} == {rank}
    assert (straight == np.arange(16) % 10).all()


def test_random_is_uniform_and_repeats_no_expert_more_than_it_must() -> None:
    slots = Slots(6, 3, 3)
    placed = RandomPlacement().place(slots, Observed.nothing(6000, 6), stream(0, "uniform"))
    assert sorted(set(replica_counts(placed, 6).ravel().tolist())) == [1, 2]
    seen = np.stack([(placed == e).sum(axis=0) for e in range(6)])  # 54 cells of 1000 expected, 53 deg. at most
    assert ((seen - 1000.0) ** 2 / 1000).sum() < 100
    assert len(np.unique(RandomPlacement().place(Slots(6, 3), Observed.nothing(6000, 6), stream(1)), axis=0)) == 720


# --- greedy ---


@given(seed=seeds, redundant=st.integers(0, 6))
def test_greedy_keeps_replicas_of_an_expert_apart(seed: int, redundant: int) -> None:
    slots = Slots(24, 8, 8 * redundant)
    seen = traffic(seed, slots)
    by_rank = np.sort(Greedy().place(slots, seen, stream(0)).reshape(-1, slots.slots_per_rank), axis=-1)
    assert (np.diff(by_rank, axis=-1) > 0).all()


def test_greedy_doubles_up_only_where_experts_are_fewer_than_slots_of_a_rank() -> None:
    placed = Greedy().place(Slots(2, 2, 4), Observed(np.array([[[9.0, 1.0]]])), stream(0)).reshape(2, 3)
    assert all(set(rank) == {0, 1} for rank in placed.tolist())


@given(seed=seeds)
def test_greedy_is_within_grahams_bound_of_the_optimum(seed: int) -> None:
    """LPT with as much room as it wants ends within 4/3 of the mean or of the largest job."""
    slots = Slots(32, 4)
    seen = traffic(seed, slots)
    load = seen.load
    total = rank_load(Greedy().place(slots, seen, stream(0)), load, slots)
    assert (
        total.max(axis=-1) <= 4 / 3 * np.maximum(load.mean(axis=-1) * 8, load.max(axis=-1)) + load.max(axis=-1)
    ).all()


# --- incremental ---


@given(slots=layouts(), seed=seeds, max_moves=st.integers(0, 12))
def test_incremental_keeps_its_promise_of_moves_and_never_worsens(slots: Slots, seed: int, max_moves: int) -> None:
    seen = traffic(seed, slots, previous=True)
    assert seen.previous is not None
    after = Incremental(max_moves=max_moves).place(slots, seen, stream(0))
    assert (moved_slots(seen.previous, after, slots) <= max_moves).all()
    before = rank_load(seen.previous, seen.load, slots).max(axis=-1)
    assert (rank_load(after, seen.load, slots).max(axis=-1) <= before * (1 + 1e-9)).all()


def test_incremental_follows_drift_with_few_moves() -> None:
    """A day old plan: 16 moves of 288 slots undo most of the drift for which EPLB moves nearly all."""
    slots = Slots(256, 32, 32, 8, 8)
    load = stream(0, "old").lognormal(0, 0.7, (4, 256))
    before = Eplb().place(slots, Observed(load[None]), stream(0))
    load = load * stream(0, "drift").lognormal(0, 0.3, load.shape)
    seen = Observed(load[None], previous=before)
    stale, fresh = peak(before, load, slots), Eplb().place(slots, seen, stream(0))
    peaks = [peak(Incremental(max_moves=m).place(slots, seen, stream(0)), load, slots) for m in (4, 8, 16)]
    assert stale > peaks[0] > peaks[1] > peaks[2] and peaks[2] - 1 < 0.3 * (stale - 1)
    assert moved_slots(before, fresh, slots).min() > 200


def test_incremental_leaves_an_even_plan_alone_and_starts_as_eplb() -> None:
    slots = Slots(8, 4)
    even = Observed(np.ones((1, 2, 8)), previous=RandomPlacement().place(slots, Observed.nothing(2, 8), stream(0)))
    assert (Incremental().place(slots, even, stream(0)) == even.previous).all()
    first = traffic(0, slots)
    assert (Incremental().place(slots, first, stream(0)) == Eplb().place(slots, first, stream(0))).all()
    with pytest.raises(ValueError, match=r"observed\.previous"):
        Incremental().place(slots, Observed(np.ones((1, 2, 8)), previous=np.zeros((2, 9), np.int32)), stream(0))


def test_incremental_moves_a_replica_where_swaps_cannot_help() -> None:
    """The spare copy of a cold expert becomes the second of the hot one: 12 | 3 3 -> 6 3 | 6 3."""
    slots = Slots(3, 2, 1)
    seen = Observed(np.array([[[12.0, 3.0, 3.0]]]), previous=np.array([[0, 1, 2, 1]], np.int32))
    after = Incremental(max_moves=1).place(slots, seen, stream(0))
    assert after.tolist() == [[0, 1, 2, 0]] and rank_load(after, seen.load, slots).tolist() == [[9.0, 9.0]]


# --- annealed ---


def slow(tokens: F64) -> F64:
    """Seconds of a rank: every busy expert costs as much as 3 tokens; rank 0 is slower."""
    return (tokens + 3.0 * (tokens > 0)).sum(axis=-1) * np.where(np.arange(tokens.shape[-2]) == 0, 1.3, 1.0)


def mean_peak(placed: I32, seen: Observed, slots: Slots) -> F64:
    loads = np.stack([per_slot_load(window, placed) for window in seen.expert_tokens])
    by_rank = loads.reshape(len(loads), len(placed), slots.ep_size, -1)
    times = by_rank.sum(axis=-1) if seen.rank_times_s is None else seen.rank_times_s(by_rank)
    return times.max(axis=-1).mean(axis=0)


@given(slots=layouts(), seed=seeds, timed=st.booleans(), heat=st.sampled_from([0.0, 0.1]))
def test_annealed_is_never_worse_than_its_start(slots: Slots, seed: int, timed: bool, heat: float) -> None:
    drawn = traffic(seed, slots)
    seen = Observed(drawn.expert_tokens, rank_times_s=slow if timed else None)
    start = Eplb().place(slots, seen, stream(0))
    assert (Annealed(steps=0).place(slots, seen, stream(0)) == start).all()
    after = Annealed(steps=40, start_temperature=heat).place(slots, seen, stream(0))
    assert (mean_peak(after, seen, slots) <= mean_peak(start, seen, slots) * (1 + 1e-9)).all()


def test_annealed_sees_windows_that_their_sum_hides() -> None:
    """Experts 0-3 are busy in one window, 4-7 in the other; EPLB sees eight equal ones and puts 0 with 4, or not."""
    slots, tokens = Slots(8, 4), np.zeros((2, 1, 8))
    tokens[0, 0, [0, 4, 1, 5]] = tokens[1, 0, [2, 6, 3, 7]] = 1.0
    seen = Observed(tokens)
    assert mean_peak(Eplb().place(slots, seen, stream(0)), seen, slots) == 2.0
    assert mean_peak(Annealed(steps=200, start_temperature=0.1).place(slots, seen, stream(0)), seen, slots) == 1.0


def test_annealed_finds_more_than_greedy_rules_at_v3_sizes() -> None:
    slots, load = Slots(256, 32, 32, 8, 8), stream(0, "v3").lognormal(0, 0.7, (3, 256))
    seen = Observed(load[None])
    found = peak(Annealed(steps=1500).place(slots, seen, stream(0)), load, slots)
    assert found < peak(Greedy().place(slots, seen, stream(0)), load, slots)


# --- co-activation ---


def pairs_of(topk_ids: I64, n_experts: int) -> F64:
    chosen = np.zeros((len(topk_ids), n_experts))
    np.put_along_axis(chosen, topk_ids, 1.0, axis=-1)
    return chosen.T @ chosen


def fan_out(topk_ids: I64, placed: I32, slots: Slots) -> float:
    """Mean distinct nodes of a token's experts; one replica each."""
    node = np.empty(slots.n_routed_experts, dtype=np.int64)
    node[placed] = np.arange(slots.n_slots) // (slots.n_slots // slots.n_nodes)
    return float(1 + (np.diff(np.sort(node[topk_ids], axis=-1), axis=-1) > 0).sum(axis=-1).mean())


def clustered(seed: int, n_experts: int = 64, n_clusters: int = 4, k: int = 6, pull: float = 3.0) -> tuple[I64, I64]:
    """Tokens of hidden clusters that prefer their cluster's experts; the clusters are strewn over all indices."""
    rng = stream(seed, "clusters")
    cluster = rng.permutation(n_experts) % n_clusters
    topic = rng.integers(n_clusters, size=4000)
    logits = rng.gumbel(size=(4000, n_experts)) + pull * (cluster == topic[:, None])
    return np.argsort(-logits, axis=-1, kind="stable")[:, :k], cluster


def seen_in(topk_ids: I64, n_experts: int) -> Observed:
    return Observed(
        np.bincount(topk_ids.ravel(), minlength=n_experts)[None, None] * 1.0, pairs_of(topk_ids, n_experts)[None]
    )


@pytest.mark.parametrize("seed", range(3))
def test_coactivation_finds_hidden_clusters(seed: int) -> None:
    ids, cluster = clustered(seed)
    slots, seen = Slots(64, 16, ranks_per_node=4), seen_in(ids[::2], 64)
    placed = Coactivation().place(slots, seen, stream(0))
    fans = {
        rule.kind: fan_out(ids[1::2], rule.place(slots, seen, stream(0)), slots)
        for rule in (Linear(), RandomPlacement())
    }
    found = fan_out(ids[1::2], placed, slots)
    assert found < 0.7 * min(fans.values())
    assert all(len(set(cluster[node])) == 1 for node in placed.reshape(4, 16))
    load = rank_load(placed, seen.load, slots).reshape(4, 4).sum(axis=-1)
    assert load.max() <= 1.1 * load.mean()


def test_coactivation_is_no_worse_than_networkx() -> None:
    """One cut in two, without a limit of load, against networkx's Kernighan-Lin bisection: within 3 % of the cut."""
    ids, _ = clustered(5, n_clusters=6, pull=1.5)
    slots, seen = Slots(64, 2, ranks_per_node=1), seen_in(ids, 64)
    assert seen.coactivation is not None
    graph = nx.from_numpy_array(np.where(np.eye(64), 0.0, seen.coactivation[0]))
    rival = nx.cut_size(graph, nx.community.kernighan_lin_bisection(graph, seed=0)[0], weight="weight")
    ours = Coactivation(load_tolerance=10).place(slots, seen, stream(0))[0, :32]
    assert nx.cut_size(graph, ours.tolist(), weight="weight") <= 1.03 * rival


@given(slots=layouts(), seed=seeds, tolerance=st.sampled_from([0.0, 0.1, 0.5]))
def test_coactivation_keeps_to_its_limit_of_load(slots: Slots, seed: int, tolerance: float) -> None:
    """Without spare slots no node is heavier than the limit, or than what packing by load alone gives."""
    even = Slots(slots.n_slots, slots.ep_size, 0, slots.ranks_per_node)
    seen = traffic(seed, even)
    nodes = rank_load(Coactivation(load_tolerance=tolerance).place(even, seen, stream(0)), seen.load, even)
    packed = balanced_packing(seen.load, even.n_nodes).reshape(3, even.n_nodes, -1)
    start = seen.load[np.arange(3)[:, None, None], packed].sum(axis=-1).max(axis=-1)
    heaviest = nodes.reshape(3, even.n_nodes, -1).sum(axis=-1).max(axis=-1)
    limit = (1 + tolerance) * seen.load.sum(axis=-1) / even.n_nodes
    assert (heaviest <= np.maximum(limit, start) * (1 + 1e-9)).all()


def test_spare_slots_copy_hot_experts_to_nodes_that_lack_them() -> None:
    ids, _ = clustered(1)
    slots, seen = Slots(64, 16, 32, ranks_per_node=4), seen_in(ids, 64)
    by_node = Coactivation().place(slots, seen, stream(0)).reshape(4, -1)
    assert all(len(set(node)) == len(node) for node in by_node.tolist())
    unseen = Coactivation().place(slots, Observed(seen.expert_tokens), stream(0))
    assert sorted(set(unseen[0].tolist())) == list(range(64))


def test_recorded_routing_needs_fewer_nodes(shared: Path) -> None:
    """DeepSeek-V2-Lite on 4 nodes, planned on the first half of the tokens of a task, judged on the second."""
    slots = Slots(64, 32, ranks_per_node=8)
    for task in ("law", "intent", "summary"):
        with np.load(shared / "data" / "esft_deepseek_v2_lite" / f"{task}_layers1-16.npz") as archive:
            ids = archive["topk_ids"][::5].astype(np.int64)
        half = ids.shape[1] // 2
        for layer in ids:
            seen = seen_in(layer[:half], 64)
            fans = [
                fan_out(layer[half:], rule.place(slots, seen, stream(0)), slots) for rule in (Linear(), Coactivation())
            ]
            assert fans[1] < 0.85 * fans[0]
