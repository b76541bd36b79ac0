"""Replica choice: exact token counts under every rule, who is never worse than whom, and tokens in slots; LPLB."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sim.placement import Observed, replica_counts
from sim.placement.eplb import rebalance_experts
from sim.placement.lplb import Lplb, Topology, edges
from sim.plugin import make, members
from sim.replicas import Copies, ReplicaChoice, assign, spread
from sim.replicas.interior import affine_scaling, solve
from sim.replicas.least_loaded import level_plain
from sim.replicas.lp import Lp, rounded
from sim.slots import Slots
from sim.tokens import F64, I16, I32, I64
from tests.strategies import seeds

RULES: dict[str, ReplicaChoice] = {kind: make(ReplicaChoice, kind) for kind in members(ReplicaChoice)}
RULES |= {"lp, exact": Lp(method="highs"), "lp, one step": Lp(iterations=1)}
BOTH = pytest.mark.parametrize("kernels", ["numpy", "numba"])


@dataclass(frozen=True)
class Case:
    """A layer: its slots, the map and the demand [P, E]."""

    slots: Slots
    map: I32
    demand: I64

    def loads(self, rule: ReplicaChoice) -> I64:
        """[P] pairs per rank under a rule."""
        return rank_loads(rule.quotas(self.demand, self.map, self.slots), self.slots)


def rank_loads(quota: I64, slots: Slots) -> I64:
    loads: I64 = quota.sum(axis=0).reshape(slots.ep_size, -1).sum(axis=1)
    return loads


def by_expert(quota: I64, case: Case) -> I64:
    """[P, E] the tokens that the slots of each expert get, by a loop."""
    found = np.zeros_like(case.demand)
    for slot, expert in enumerate(case.map.tolist()):
        if expert >= 0:
            found[:, expert] += quota[:, slot]
    return found


@st.composite
def cases(draw: st.DrawFn, dead: bool = True) -> Case:
    """Any map: replicas on one rank, many of one expert, ranks that are dead, experts nobody asks for."""
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    ranks, per_rank = nodes * per_node, draw(st.integers(1, 4))
    experts = draw(st.integers(1, ranks * per_rank))
    rng = np.random.default_rng(draw(seeds))
    extra = ranks * per_rank - experts
    favoured = draw(st.integers(1, experts))
    held = rng.permutation(np.r_[np.arange(experts), rng.integers(0, favoured, extra)]).astype(np.int32)
    if dead and draw(st.booleans()):
        held.reshape(ranks, per_rank)[rng.random(ranks) < 0.3] = -1
    mean = draw(st.sampled_from([0.3, 4.0, 300.0])) * np.exp(rng.normal(0, 1, experts))
    slots = Slots(experts, ranks, extra, per_node)
    return Case(slots, held, rng.poisson(mean, (ranks, experts)).astype(np.int64))


def eplb_case(seed: int, ranks: int, experts: int, extra: int, tokens: int, noise: float = 0.3) -> Case:
    """Planned by EPLB on log-normal loads, judged on a batch whose loads differ by log-normal ``noise``."""
    rng = np.random.default_rng(seed)
    load = np.exp(rng.normal(0, 1, experts))
    held = rebalance_experts(load[None], experts + extra, 1, 1, ranks)[0][0].astype(np.int32)
    mean = tokens * 8 * load / load.sum() * np.exp(rng.normal(0, noise, experts))
    return Case(Slots(experts, ranks, extra), held, rng.poisson(mean, (ranks, experts)).astype(np.int64))


@given(cases())
def test_every_source_serves_its_demand_exactly(case: Case) -> None:
    hosted = np.isin(np.arange(case.slots.n_routed_experts), case.map)
    before = case.demand.copy(), case.map.copy()
    for name, rule in RULES.items():
        quota = rule.quotas(case.demand, case.map, case.slots)
        assert quota.dtype == np.int64 and quota.shape == (case.slots.ep_size, case.slots.n_slots), name
        assert quota.min(initial=0) >= 0, name
        np.testing.assert_array_equal(by_expert(quota, case), np.where(hosted, case.demand, 0), name)
        assert not quota[:, case.map < 0].any(), name
        np.testing.assert_array_equal(quota, rule.quotas(case.demand, case.map, case.slots), name)
    np.testing.assert_array_equal(case.demand, before[0])
    np.testing.assert_array_equal(case.map, before[1])


def test_the_exactness_check_sees_a_lost_token() -> None:
    """Negative control: shares rounded one by one lose tokens."""
    case = eplb_case(0, 8, 32, 8, 64)
    counts = replica_counts(case.map, 32)
    assert (by_expert(np.rint((case.demand / counts)[:, case.map]).astype(np.int64), case) != case.demand).any()


@given(cases(dead=False))
def test_without_replicas_there_is_nothing_to_choose(case: Case) -> None:
    slots = Slots(case.slots.n_slots, case.slots.ep_size, 0, case.slots.ranks_per_node)
    rng = np.random.default_rng(0)
    held = rng.permutation(slots.n_slots).astype(np.int32)
    demand = rng.integers(0, 9, (slots.ep_size, slots.n_slots))
    for name, rule in RULES.items():
        np.testing.assert_array_equal(rule.quotas(demand, held, slots), demand[:, held], name)


def test_no_slot_and_no_token() -> None:
    slots = Slots(4, 2, 2)
    for name, rule in RULES.items():
        assert not rule.quotas(np.full((2, 4), 7), np.full(6, -1, np.int32), slots).any(), name
        assert not rule.quotas(np.zeros((2, 4), np.int64), np.array([0, 1, 2, 3, 0, 0], np.int32), slots).any(), name


@given(cases())
@settings(max_examples=40)
def test_what_looks_at_the_batch_is_never_worse(case: Case) -> None:
    largest = {name: int(case.loads(rule).max()) for name, rule in RULES.items()}
    for name in ("least_loaded", "lp", "lp, one step", "lp, exact"):
        assert largest[name] <= largest["round_robin"], largest
    assert largest["lp, exact"] == min(largest.values()), largest


@given(seeds)
def test_exact_is_the_best_of_all_splits(seed: int) -> None:
    """Every split of three experts with two slots each, tried one by one."""
    rng = np.random.default_rng(seed)
    slots = Slots(4, 3, 5)
    held = np.r_[rng.permutation([0, 0, 1, 1, 2, 2, 3, 3]), [rng.integers(3)]].astype(np.int32)
    held[-1] = held[-1] if np.count_nonzero(held == held[-1]) == 2 else 3
    demand = rng.integers(0, 4, (3, 4))
    case = Case(slots, held, demand)
    total = demand.sum(axis=0)
    smallest = 10**9
    places = [np.flatnonzero(held == e) // slots.slots_per_rank for e in range(4)]
    splits = [
        [c for c in product(range(int(n) + 1), repeat=len(p)) if sum(c) == n]
        for n, p in zip(total, places, strict=True)
    ]
    for chosen in product(*splits):
        loads = np.zeros(3, int)
        for ranks, tokens in zip(places, chosen, strict=True):
            np.add.at(loads, ranks, tokens)
        smallest = min(smallest, int(loads.max()))
    assert case.loads(RULES["lp, exact"]).max() == smallest


@pytest.mark.parametrize(
    ("ranks", "experts", "extra", "tokens"),
    [(64, 256, 64, 4096), (32, 256, 32, 16384), (144, 256, 32, 128), (8, 64, 16, 512)],
)
def test_few_steps_come_within_five_percent(ranks: int, experts: int, extra: int, tokens: int) -> None:
    """After EPLB, on batches that differ from the plan; `least_loaded` within 2 %. Equal shares are not that good."""
    gaps: dict[str, list[float]] = {"lp": [], "least_loaded": [], "round_robin": []}
    for seed in range(4):
        case = eplb_case(seed, ranks, experts, extra, tokens)
        best = case.loads(RULES["lp, exact"]).max()
        for name, found in gaps.items():
            found.append(case.loads(RULES[name]).max() / best - 1)
    assert max(gaps["lp"]) <= 0.01
    assert max(gaps["least_loaded"]) <= 0.02
    assert ranks == 144 or max(gaps["round_robin"]) > 0.05


@given(cases(), st.integers(1, 60))
@settings(max_examples=30)
def test_more_steps_never_hurt_and_reach_the_optimum(case: Case, iterations: int) -> None:
    """But for rounding, which may move one token per slot of a rank."""
    reached = case.loads(Lp(iterations=100)).max()
    best = case.loads(RULES["lp, exact"]).max()
    assert best <= reached <= best * 1.001 + case.slots.slots_per_rank
    assert reached <= case.loads(Lp(iterations=iterations)).max() + case.slots.slots_per_rank


def test_interior_point_by_hand() -> None:
    """Two ranks with 10 and 0 tokens of their own share 20 of one expert: 5 and 15."""
    found = affine_scaling(np.array([0, 1]), np.array([0, 0]), np.array([20]), np.array([10, 0]), 20)
    np.testing.assert_allclose(found, [5, 15], atol=0.1)


@given(seeds, st.integers(1, 40))
def test_elimination_solves_with_the_same_bits(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    root, right = rng.standard_normal((n, n)), rng.standard_normal(n)
    matrix = root @ root.T + np.eye(n)
    found = solve(matrix, right)
    np.testing.assert_allclose(matrix @ found, right, atol=1e-8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATESIM_KERNELS", "numpy")
        np.testing.assert_array_equal(solve(matrix, right), found)


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4), min_size=1, max_size=6), seeds)
def test_rounding_keeps_sums_and_moves_less_than_one(whole: list[list[int]], seed: int) -> None:
    expert = np.repeat(np.arange(len(whole)), [len(w) for w in whole])
    demand = np.array([sum(w) for w in whole])
    rng = np.random.default_rng(seed)
    weights = rng.random(len(expert)) + 1e-3
    shares = weights / np.bincount(expert, weights)[expert] * demand[expert]
    found = rounded(shares, expert, demand)
    np.testing.assert_array_equal(np.bincount(expert, found, len(whole)), demand)
    assert (np.abs(found - shares) < 1 + 1e-9).all()


@given(cases(), st.sampled_from([0, 1, 3]))
def test_levelling_is_the_same_in_both_languages(case: Case, sweeps: int) -> None:
    from sim.kernels import replicas as compiled

    copies = Copies.of(case.map, case.slots.n_routed_experts)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 30, len(copies.slot))
    rank = copies.slot // case.slots.slots_per_rank
    load = np.bincount(rank, tokens, case.slots.ep_size).astype(np.int64)
    several = np.flatnonzero(copies.counts > 1)
    found = []
    for level in (level_plain, compiled.level):
        mine, loads = tokens.copy(), load.copy()
        level(mine, loads, rank, copies.start, several, sweeps)
        np.testing.assert_array_equal(loads, np.bincount(rank, mine, case.slots.ep_size))
        np.testing.assert_array_equal(
            np.bincount(copies.expert, mine, len(copies.counts)), np.bincount(copies.expert, tokens, len(copies.counts))
        )
        assert loads.max(initial=0) <= load.max(initial=0) and mine.min(initial=0) >= 0
        found.append(mine)
    np.testing.assert_array_equal(found[0], found[1])


@given(cases())
def test_sources_get_their_shares(case: Case) -> None:
    """`spread` keeps rows and columns whole and stays by the proportional share."""
    copies = Copies.of(case.map, case.slots.n_routed_experts)
    rng = np.random.default_rng(2)
    total = np.zeros(len(copies.slot), np.int64)
    for expert, count in enumerate(copies.counts):
        mine = slice(copies.start[expert], copies.start[expert + 1])
        if count:
            total[mine] = rng.multinomial(case.demand[:, expert].sum(), rng.dirichlet(np.ones(count)))
    quota = spread(case.demand, total, copies, case.slots.n_slots)
    np.testing.assert_array_equal(quota.sum(axis=0)[copies.slot], total)
    hosted = copies.counts > 0
    np.testing.assert_array_equal(by_expert(quota, case)[:, hosted], case.demand[:, hosted])
    whole = np.maximum(case.demand.sum(axis=0), 1)[copies.expert]
    share = case.demand[:, copies.expert] * total / whole
    assert (np.abs(quota[:, copies.slot] - share) <= np.minimum(copies.counts[copies.expert], 4)).all()


def test_round_robin_deals_evenly_and_takes_turns() -> None:
    slots, held = Slots(2, 8, 6, 4), np.array([0, 1, 0, 1, 1, 0, 1, 1], np.int32)
    quota = RULES["round_robin"].quotas(np.full((8, 2), 7), held, slots)
    for expert, copies in ((0, 3), (1, 5)):
        mine = quota[:, held == expert]
        assert ((mine == 7 // copies) | (mine == 7 // copies + 1)).all()
    one = RULES["round_robin"].quotas(np.tile([[1, 0]], (8, 1)), held, slots).sum(axis=0)
    assert one[held == 0].tolist() == [3, 3, 2]  # eight sources with one token each, three slots


@given(cases())
def test_nearest_stays_as_near_as_it_can(case: Case) -> None:
    slots, node = case.slots, np.arange(case.slots.ep_size) // case.slots.ranks_per_node
    crossing = node[:, None] != node[slots.slot_rank]
    elsewhere = np.arange(slots.ep_size)[:, None] != slots.slot_rank
    quota = {name: rule.quotas(case.demand, case.map, slots) for name, rule in RULES.items()}
    for name, other in quota.items():
        assert quota["nearest"][crossing].sum() <= other[crossing].sum(), name
        assert quota["nearest"][elsewhere].sum() <= other[elsewhere].sum(), name
    for name in ("nearest", "static"):
        for source in range(slots.ep_size):
            used = case.map[quota[name][source] > 0]
            assert len(set(used.tolist())) == len(used), "one slot per source and expert"


def test_nearest_shares_a_nodes_slots_among_its_sources() -> None:
    """Two nodes of four ranks; expert 0 has two slots in node 0, on ranks 0 and 1, and expert 1 one on rank 2."""
    slots = Slots(6, 8, 2, 4)
    held = np.array([0, 0, 1, 2, 3, 4, 5, 1], np.int32)
    to = RULES["nearest"].quotas(np.tile(np.eye(1, 6, dtype=np.int64), (8, 1)), held, slots).argmax(axis=1)
    assert to.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


def test_static_by_hand() -> None:
    held = np.array([0, 1, -1, 0, 1, 0], np.int32)
    found = RULES["static"].quotas(np.array([[5, 1], [4, 2], [3, 3]]), held, Slots(2, 3, 4))
    assert found.tolist() == [[5, 1, 0, 0, 0, 0], [0, 0, 0, 4, 2, 0], [0, 3, 0, 0, 0, 3]]


def test_only_the_solver_takes_time_and_only_with_replicas() -> None:
    for name, rule in RULES.items():
        assert rule.seconds(Slots(8, 4, 4)) == (100e-6 if name.startswith("lp") else 0.0)
        assert rule.seconds(Slots(8, 4)) == 0.0
    assert Lp.model_validate({"solve_s": "250 us"}).seconds(Slots(8, 4, 4)) == 250e-6


def assign_slowly(topk_ids: I16, quota: I64, held: I32) -> I16:
    """Every token takes the slot of its expert whose next turn is due first, in exact fractions."""
    given: dict[int, int] = {}
    found = np.full(topk_ids.shape, -1, np.int16)
    for at, expert in np.ndenumerate(topk_ids):
        turns = [
            (Fraction(2 * given.get(s, 0) + 1, 2 * int(quota[s])), s)
            for s in np.flatnonzero(held == expert).tolist()
            if expert >= 0 and given.get(s, 0) < quota[s]
        ]
        if turns:
            slot = min(turns)[1]
            given[slot] = given.get(slot, 0) + 1
            found[at] = slot
    return found


@st.composite
def batches(draw: st.DrawFn) -> tuple[I16, I64, I32]:
    """Choices [T, k] with gaps, a map, and quotas that meet the demand, fall short of it or exceed it."""
    experts, slots, k = draw(st.integers(1, 12)), draw(st.integers(1, 24)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(seeds))
    ids = rng.integers(-1, experts, (draw(st.integers(0, 40)), k)).astype(np.int16)
    held = rng.integers(-1, draw(st.integers(1, experts)), slots).astype(np.int32)
    asked = np.bincount(ids[ids >= 0].ravel(), minlength=experts)
    quota = np.zeros(slots, np.int64)
    for expert in range(experts):
        mine = np.flatnonzero(held == expert)
        if len(mine):
            quota[mine] = rng.multinomial(asked[expert], rng.dirichlet(np.full(len(mine), 0.7)))
    return ids, np.maximum(quota + draw(st.sampled_from([0, 0, 0, -1, 2])), 0), held


@BOTH
@given(batches())
@example((np.zeros((0, 2), np.int16), np.array([1]), np.array([0], np.int32)))
@example((np.array([[3]], np.int16), np.array([1]), np.array([0], np.int32)))
def test_tokens_take_turns(kernels: str, batch: tuple[I16, I64, I32]) -> None:
    ids, quota, held = batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATESIM_KERNELS", kernels)
        found = assign(ids, quota, held)
    assert found.dtype == np.int16 and found.shape == ids.shape
    np.testing.assert_array_equal(found, assign_slowly(ids, quota, held))
    assert (found[ids < 0] == -1).all()
    assert (held[found[found >= 0]] == ids[found >= 0]).all()
    used = np.bincount(found[found >= 0].ravel(), minlength=len(quota))
    assert (used <= quota).all()


@BOTH
@given(cases(), st.sampled_from(sorted(RULES)))
@settings(max_examples=30)
def test_tokens_fill_the_quotas_exactly_in_any_order(kernels: str, case: Case, rule: str) -> None:
    """Counts depend on how many tokens there are, not on their order; any run is shared nearly in proportion."""
    quotas = RULES[rule].quotas(case.demand, case.map, case.slots)
    rng = np.random.default_rng(3)
    source = int(case.demand.sum(axis=1).argmax())
    ids = np.repeat(np.arange(case.slots.n_routed_experts), case.demand[source]).astype(np.int16)
    hosted = np.isin(ids, case.map)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATESIM_KERNELS", kernels)
        for order in (np.arange(len(ids)), rng.permutation(len(ids))):
            found = assign(ids[order, None], quotas[source], case.map).ravel()
            np.testing.assert_array_equal(found < 0, ~hosted[order])
            np.testing.assert_array_equal(np.bincount(found[found >= 0], minlength=case.slots.n_slots), quotas[source])
    for expert in np.unique(ids[hosted]).tolist():
        mine = np.flatnonzero(case.map == expert)
        taken = found[ids[order] == expert]
        given_ = np.cumsum(taken[:, None] == mine, axis=0)
        even = np.arange(1, len(taken) + 1)[:, None] * quotas[source][mine] / len(taken)
        assert np.abs(given_ - even).max(initial=0) <= (1 if len(mine) <= 2 else 2)


def test_the_turns_check_sees_blocks() -> None:
    """Negative control: slots filled one after the other have the counts but not the evenness."""
    blocks = np.repeat([0, 1], 20)
    assert np.abs(np.cumsum(blocks == 0) - np.arange(1, 41) / 2).max() == 10


# LPLB


def shapes_of(topology: Topology) -> Slots:
    return {
        "cube": Slots(64, 16, 64),
        "hypercube": Slots(64, 16, 32),
        "torus": Slots(64, 16, 32, 4),
        "ring": Slots(64, 16, 32, 8),
    }[topology]


TOPOLOGIES = pytest.mark.parametrize("topology", ["cube", "hypercube", "torus", "ring"])


@TOPOLOGIES
def test_edges_join_every_rank_to_others_of_its_group(topology: Topology) -> None:
    slots = shapes_of(topology)
    found = edges(topology, slots)
    ranks = np.arange(16)
    assert (found != ranks[:, None]).all()
    for column in found.T:
        assert sorted(column.tolist()) == ranks.tolist()
    size = {"cube": 8, "hypercube": 16, "torus": 16, "ring": 8}[topology]
    assert (found // size == ranks[:, None] // size).all()
    if topology == "hypercube":  # the rings of four hold the edges of a square: two of four bits change, in all 16 x 2
        neighbours = {frozenset((v, int(u))) for v in ranks.tolist() for u in found[v]}
        assert len(neighbours) == 32
    if topology == "torus":
        assert (found[:, 0] // 4 != ranks // 4).all() and (found[:, 1] // 4 == ranks // 4).all()


@TOPOLOGIES
@given(seeds, st.booleans())
@settings(max_examples=10)
def test_lplb_replicates_the_heaviest_along_the_edges(topology: Topology, seed: int, grouped: bool) -> None:
    slots = shapes_of(topology)
    slots = Slots(64, 16, slots.num_redundant_experts, slots.ranks_per_node, slots.n_nodes if grouped else 1)
    rng = np.random.default_rng(seed)
    load = rng.integers(0, 50, (1, 3, 64)).astype(np.float64)
    rule = Lplb(topology=topology, num_redundant_experts=slots.num_redundant_experts)
    maps = rule.place(slots, Observed(load), rng)
    assert maps.dtype == np.int32 and maps.shape == (3, slots.n_slots)
    counts = replica_counts(maps, 64)
    assert counts.min() >= 1 and counts.max() == 2
    source, extra = edges(topology, slots), slots.num_redundant_experts // 16
    for held, weight in zip(maps.reshape(3, 16, -1), load[0], strict=True):
        own, replicas = held[:, :4], held[:, 4:]
        assert sorted(own.ravel().tolist()) == list(range(64))
        assert (np.diff(weight[own], axis=1) <= 0).all()
        for rank, d in product(range(16), range(extra)):
            assert replicas[rank, d] == own[source[rank, d % source.shape[1]], d]


def test_lplb_without_traffic_keeps_the_order() -> None:
    found = Lplb(num_redundant_experts=16).place(Slots(16, 8, 16), Observed.nothing(1, 16), np.random.default_rng(0))
    assert found.reshape(8, 4)[:, :2].ravel().tolist() == list(range(16))


@pytest.mark.parametrize(
    ("topology", "slots", "message"),
    [
        ("cube", Slots(24, 12, 24), "multiple of 8 ranks"),
        ("hypercube", Slots(24, 8, 16), "multiple of 16 ranks"),
        ("cube", Slots(20, 8, 20), "n_routed_experts = 20 to be a multiple of 8 ranks"),
        ("cube", Slots(16, 8, 8), "2 edge.* must be a positive multiple of 16"),
        ("cube", Slots(16, 8, 0), "must be a positive multiple of 16"),
        ("cube", Slots(8, 8, 16), "2 redundant slots per rank, 1 experts"),
        ("torus", Slots(16, 8, 16, 8), "two or more nodes"),
        ("torus", Slots(16, 8, 16, 1), "two or more ranks in a node"),
        ("ring", Slots(16, 8, 8, 1), "two or more ranks in a node"),
    ],
)
def test_lplb_refuses_what_does_not_fit(topology: Topology, slots: Slots, message: str) -> None:
    rule = Lplb(topology=topology, num_redundant_experts=slots.num_redundant_experts)
    with pytest.raises(ValueError, match=message):
        rule.place(slots, Observed.nothing(1, slots.n_routed_experts), np.random.default_rng(0))


def cuda_normals(seed: int, call: int, n: int) -> F64:
    """The n <= 256 standard normals of PyTorch's ``torch.randn(n, device="cuda")``, call 0, 1, ... after seeding.

    Philox-4x32-10 (Salmon et al. 2011), one subsequence per element, then Box-Muller; float64 where CUDA has float32.
    """
    low = np.uint64(0xFFFFFFFF)
    zero: np.ndarray = np.zeros(n, np.uint64)
    counter, key = [zero + np.uint64(call), zero, np.arange(n, dtype=np.uint64), zero], [seed, 0]
    for _ in range(10):
        a, b = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (b >> np.uint64(32)) ^ counter[1] ^ np.uint64(key[0]),
            b & low,
            (a >> np.uint64(32)) ^ counter[3] ^ np.uint64(key[1]),
            a & low,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    u, v = ((c.astype(np.float64) + 0.5) / 2**32 for c in counter[:2])
    return np.asarray(np.sqrt(-2 * np.log(u)) * np.sin(2 * np.pi * v))


def test_cuda_normals_are_those_seen_in_the_wild() -> None:
    """Values that PyTorch prints for seeds 0 and 42, and for the second draw after seed 42."""
    np.testing.assert_allclose(cuda_normals(0, 0, 9)[[0, 1, 2, 8]], [-0.9247, -0.4253, -2.6438, -1.0745], atol=5e-5)
    np.testing.assert_allclose(cuda_normals(42, 0, 3), [0.1940, 2.1614, -0.1721], atol=5e-5)
    np.testing.assert_allclose(cuda_normals(42, 1, 3), [0.1391, -0.1082, -0.7174], atol=5e-5)


@pytest.mark.parametrize("method", ["interior_point", "highs"])
@pytest.mark.parametrize(
    ("topology", "ranks", "per_rank", "ranks_per_node", "reordered", "bar"),
    [
        ("cube", 32, 2, 8, True, 1.07),
        ("cube", 32, 4, 8, False, 1.07),
        ("cube", 64, 2, 8, True, 1.10),
        ("ring", 32, 1, 8, True, 1.07),
        ("hypercube", 16, 2, 8, True, 1.03),
        ("torus", 32, 2, 4, False, 1.01),
    ],
)
def test_lplbs_own_bars_hold_on_its_own_draws(
    topology: Topology, ranks: int, per_rank: int, ranks_per_node: int, reordered: bool, bar: float, method: str
) -> None:
    """Max over mean rank load in the cases of LPLB's test suite: 256 experts, loads max(0, 1 + 0.3 N) with seed 42, the
    placement from other loads max(0, 1 + 0.15 N) or none, one expert group per graph, nodes of 8 devices."""
    groups = ranks // {"cube": 8, "ring": 8, "hypercube": 16, "torus": 32}[topology]
    slots = Slots(256, ranks, ranks * per_rank, ranks_per_node, groups)
    history = np.floor(np.maximum(1 + 0.15 * cuda_normals(42, 0, 256), 0) * 2**20) if reordered else np.zeros(256)
    batch = np.floor(np.maximum(1 + 0.3 * cuda_normals(42, int(reordered), 256), 0) * 2**12).astype(np.int64)
    rule = Lplb(topology=topology, num_redundant_experts=ranks * per_rank)
    held = rule.place(slots, Observed(history[None, None]), np.random.default_rng(0))[0]
    case = Case(slots, held, np.r_[batch[None], np.zeros((ranks - 1, 256), np.int64)])
    loads = case.loads(Lp.model_validate({"method": method}))
    assert loads.max() / loads.mean() < bar
    even = case.loads(RULES["round_robin"])
    assert even.max() / even.mean() > bar  # the bars are not met without the solver
