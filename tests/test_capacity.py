"""Capacity: the published dropping rules written out token by token, bounds, and the closed form of what chance drops."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sim
from sim.gating import Gate, Gating
from sim.gating.capacity import Asked
from sim.gating.capacity.device_budget import DeviceBudget
from sim.gating.capacity.expert_capacity import ExpertCapacity, place_in_line
from sim.gating.select.expert_choice import ExpertChoice
from sim.gating.select.gshard import GShard
from sim.gating.select.random import Random
from sim.metrics.balance import uniform_drop_rate
from sim.rng import stream
from sim.tokens import F32, I16, Tokens
from tests.strategies import KERNELS, candidates, dyadic, seeds, toy_model

POLICIES = ("probs", "position", "batch_prioritized")
Kept = list[list[int]]


def _asked(
    rng: np.random.Generator, n_tokens: int, n_experts: int, k: int, *, holes: bool = False, more: int = 0
) -> Asked:
    """Skewed random choices; with ``holes`` some tokens have fewer than k, with ``more`` the width is not the model's K."""
    skew = np.arange(n_experts) / n_experts
    scores = dyadic(rng, n_tokens, n_experts, 30) + skew.astype(np.float32)
    ids = KERNELS["numpy"].topk(scores, np.ones(n_experts, np.float32), np.zeros(n_experts, np.float32), k + more)
    if holes:
        width = rng.integers(0, k + more + 1, n_tokens)
        ids[np.arange(k + more) >= width[:, None]] = -1
    affinity = KERNELS["numpy"].picked(scores, ids)
    sequence = np.sort(rng.integers(0, 12, n_tokens)).astype(np.int32)
    return Asked(ids, affinity, sequence, n_experts, lambda: stream(3, "gate"), k)


def _drops(asked: Asked, kept: I16) -> int:
    return int(np.count_nonzero(asked.topk_ids >= 0) - np.count_nonzero(kept >= 0))


def _loads(ids: I16, n_experts: int) -> list[int]:
    return KERNELS["numpy"].expert_tokens(ids, n_experts).tolist()


# --- the published rules, token by token ---


def algorithm_1(gates: F32, capacity: int, draws: list[float]) -> tuple[Kept, list[list[float]]]:
    """GShard (arXiv 2006.16668), Algorithm 1, as listed: both passes advance the counter whatever happens."""
    counter = [0] * gates.shape[1]
    top2 = [sorted(range(len(g)), key=lambda e, g=g: (-g[e], e))[:2] for g in gates]
    kept, weights = [[-1, -1] for _ in gates], [[0.0, 0.0] for _ in gates]
    for s, (e1, e2) in enumerate(top2):
        g1, g2 = float(gates[s][e1]), float(gates[s][e2])
        if counter[e1] < capacity:
            kept[s][0], weights[s][0] = e1, g1 / (g1 + g2)
        counter[e1] += 1
    for s, (e1, e2) in enumerate(top2):
        g1, g2 = float(gates[s][e1]), float(gates[s][e2])
        second = g2 / (g1 + g2)
        if counter[e2] < capacity and 2 * second > draws[s]:
            kept[s][1], weights[s][1] = e2, second
        counter[e2] += 1
    return kept, weights


def mesh_tensorflow(gates: F32, capacity: int, draws: list[float], threshold: float) -> Kept:
    """Mesh-TensorFlow's `_top_2_gating`, policy random: U < g2' / threshold, before places are counted."""
    first, second = [0] * gates.shape[1], [0] * gates.shape[1]
    kept = [[-1, -1] for _ in gates]
    top2 = [sorted(range(len(g)), key=lambda e, g=g: (-g[e], e))[:2] for g in gates]
    for s, (e1, _) in enumerate(top2):
        if first[e1] < capacity:
            kept[s][0] = e1
            first[e1] += 1
    for s, (e1, e2) in enumerate(top2):
        g1, g2 = float(gates[s][e1]), float(gates[s][e2])
        if draws[s] < g2 / (g1 + g2) / threshold:
            if first[e2] + second[e2] < capacity:
                kept[s][1] = e2
            second[e2] += 1
    return kept


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_gshard_is_algorithm_1(seed: int, factor: float) -> None:
    """Experts, weights and drops of the composed gate, on skewed gates where places run out."""
    n_tokens, n_experts = 300, 8
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-8, 9, (n_tokens, n_experts)) / 4 + np.linspace(0, 1, n_experts)).astype(np.float32)
    draws = stream(seed, "gate").random(n_tokens).tolist()
    capacity = ExpertCapacity(capacity_factor=factor, drop_policy="position")
    places = math.ceil(2 * n_tokens / n_experts * factor)  # 2N / (G E) with N / G tokens in a group
    model = toy_model(n_experts, 2, scoring_func="softmax", norm_topk_prob=True)
    tokens = Tokens(0, logits, np.zeros(n_tokens, np.int32))

    gate = Gate(Gating.model_validate({"select": "gshard", "capacity": capacity}), model)
    gates = gate.score.scores(logits, gate.kernels)
    routing = gate.route(tokens, lambda: stream(seed, "gate"))
    kept, weights = algorithm_1(gates, places, draws)
    np.testing.assert_array_equal(routing.topk_ids, kept)
    np.testing.assert_allclose(routing.topk_weights, weights, atol=1e-6)

    select = {"kind": "gshard", "second_policy_threshold": 0.2}
    other = Gate(Gating.model_validate({"select": select, "capacity": capacity}), model)
    found = other.route(tokens, lambda: stream(seed, "gate")).topk_ids
    np.testing.assert_array_equal(found, mesh_tensorflow(gates, places, draws, 0.2))
    assert (found != routing.topk_ids).any()


def test_a_dismissed_second_expert_takes_a_place_in_algorithm_1_only() -> None:
    """Negative control of the two counters: one place for three second choices of expert 1; the draw dismisses the first
    two. In the listing their counter steps have used it up."""
    gates = np.array([[0.6, 0.4, 0.0]] * 3 + [[0.0, 0.0, 1.0]] * 3, np.float32)
    logits = np.log(np.maximum(gates, 1e-6))
    tokens = Tokens(0, logits, np.zeros(6, np.int32))

    class Draws:
        def random(self, n: int) -> np.ndarray:
            return np.array([0.95, 0.95, 0.1, 0.99, 0.99, 0.99])[:n]

    model = toy_model(3, 2, scoring_func="softmax", norm_topk_prob=True)
    for select, second in (({"kind": "gshard"}, -1), ({"kind": "gshard", "second_policy_threshold": 0.5}, 1)):
        capacity = ExpertCapacity(capacity_factor=0.25)
        assert capacity.capacity(6, 2, 3) == 1
        gate = Gate(Gating.model_validate({"select": select, "capacity": capacity}), model)
        kept = gate.route(tokens, lambda: Draws()).topk_ids  # type: ignore[arg-type, return-value]
        assert kept[:, 0].tolist() == [0, -1, -1, 2, -1, -1]
        assert kept[:3, 1].tolist() == [-1, -1, second]


def test_the_draw_must_be_below_the_chance() -> None:
    """Algorithm 1: 2 g2' > U, strictly; Mesh-TensorFlow: U < g2' / threshold. Here g2' = 1/4, so 1/2 and 5/8."""

    class Draws:
        def random(self, n: int) -> np.ndarray:
            return np.array([0.4999, 0.5, 0.6249, 0.625])

    scores = np.tile(np.array([[0.75, 0.25, 0.0]], np.float32), (4, 1))
    given_ = replace(candidates(scores, 2), rng=Draws)  # type: ignore[arg-type]
    assert GShard().select(given_)[:, 1].tolist() == [1, -1, -1, -1]
    assert GShard(second_policy_threshold=0.4).select(given_)[:, 1].tolist() == [1, 1, 1, -1]


def test_weights_are_normalised_before_anything_is_dropped() -> None:
    """GShard, Algorithm 1, lines 7 and 17: a token that loses one expert does not give its share to the other."""
    model = toy_model(4, 2, norm_topk_prob=True)
    logits = np.array([[2.0, 1.0, -9.0, -9.0]] * 4, np.float32)
    capacity = {"kind": "expert_capacity", "capacity_factor": 1.0, "drop_policy": "position"}
    gate = Gate(Gating.model_validate({"capacity": capacity}), model)
    routing = gate.route(Tokens(0, logits, np.zeros(4, np.int32)))
    full = Gate(Gating(), model).route(Tokens(0, logits, np.zeros(4, np.int32)))
    assert routing.topk_ids.tolist() == [[0, 1], [0, 1], [-1, -1], [-1, -1]]
    np.testing.assert_array_equal(routing.topk_weights[:2], full.topk_weights[:2])
    assert (routing.topk_weights[2:] == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_switch_drops_by_position(seed: int) -> None:
    """Switch (arXiv 2101.03961), eq. 3: tokens / experts x factor places, in the order of the batch."""
    asked = _asked(np.random.default_rng(seed), 96, 8, 1)
    seen, expected = [0] * 8, []
    for (e,) in asked.topk_ids.tolist():
        expected.append([e if seen[e] < 96 // 8 * 1.25 else -1])
        seen[e] += 1
    kept = ExpertCapacity(capacity_factor=1.25, drop_policy="position").keep(asked)
    np.testing.assert_array_equal(kept, expected)
    assert _drops(asked, kept) > 0


@pytest.mark.parametrize("seed", range(5))
def test_batch_prioritised_order(seed: int) -> None:
    """V-MoE (arXiv 2106.05974): tokens by descending best gate, all first choices before any second choice."""
    asked = _asked(np.random.default_rng(seed), 60, 8, 3)
    kept = ExpertCapacity(capacity_factor=0.8, drop_policy="batch_prioritized").keep(asked)
    best = asked.affinity[:, 0].tolist()
    order = sorted(range(60), key=lambda t: (-best[t], t))
    left, expected = [math.ceil(60 * 3 / 8 * 0.8)] * 8, [[-1] * 3 for _ in range(60)]
    for choice in range(3):
        for t in order:
            e = int(asked.topk_ids[t, choice])
            if left[e] > 0:
                left[e] -= 1
                expected[t][choice] = e
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("seed", range(5))
def test_probs_keeps_each_experts_highest_weights(seed: int) -> None:
    """Megatron-LM: of the tokens that chose an expert, the ceil(T K / E x factor) with the largest gate weight."""
    asked = _asked(np.random.default_rng(seed), 60, 8, 3)
    kept = ExpertCapacity(capacity_factor=0.9, drop_policy="probs").keep(asked)
    places = math.ceil(60 * 3 / 8 * 0.9)
    for e in range(8):
        where = [(t, j) for t in range(60) for j in range(3) if asked.topk_ids[t, j] == e]
        best = sorted(where, key=lambda at: (-float(asked.affinity[at]), at))[:places]
        assert {at for at in where if kept[at] == e} == set(best)


def test_probs_are_the_weights_not_the_scores() -> None:
    """Two tokens compete for one place of expert 0: the second has the higher score, the first the higher weight."""
    logits = np.array([[0.0, -3.0, -8.0], [1.0, 0.9, -8.0]], np.float32)
    tokens = Tokens(0, logits, np.zeros(2, np.int32))
    capacity = {"kind": "expert_capacity", "capacity_factor": 0.5, "drop_policy": "probs"}
    for norm, first in ((True, [0, -1]), (False, [-1, 0])):
        model = toy_model(3, 2, norm_topk_prob=norm)
        kept = Gate(Gating.model_validate({"capacity": capacity}), model).route(tokens).topk_ids
        assert kept[:, 0].tolist() == first


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_device_budget_is_deepseek_v2s(seed: int, share: float) -> None:
    """Report, section 2.2.4: over the mean, the lowest affinities go, but nothing of a protected sequence."""
    asked = _asked(np.random.default_rng(seed), 80, 16, 3)
    n_sequences = int(asked.sequence.max()) + 1
    protected = stream(3, "gate").random(n_sequences) < share
    kept = DeviceBudget(n_devices=4, protected_share=share).keep(asked)
    expected = asked.topk_ids.copy()
    for device in range(4):
        pairs = [(t, j) for t in range(80) for j in range(3) if asked.topk_ids[t, j] // 4 == device]
        droppable = [at for at in pairs if not protected[asked.sequence[at[0]]]]
        droppable.sort(key=lambda at: (float(asked.affinity[at]), -at[0], -at[1]))
        for at in droppable[: max(0, len(pairs) - 80 * 3 // 4)]:
            expected[at] = -1
    np.testing.assert_array_equal(kept, expected)
    assert (_drops(asked, kept) > 0) is (share < 1)


def test_a_tenth_of_the_sequences_is_protected() -> None:
    """10 % of 20,000 sequences, to four standard errors; what is dropped comes from the others alone."""
    n = 20_000
    ids, affinity = np.zeros((n, 1), np.int16), np.linspace(0, 1, n, dtype=np.float32)[:, None]
    asked = Asked(ids, affinity, np.arange(n, dtype=np.int32), 2, lambda: stream(1, "gate"))
    kept = DeviceBudget(n_devices=2, capacity_factor=1e-4).keep(asked)
    assert np.count_nonzero(kept == 0) / n == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / n))


# --- laws ---


@given(seeds, st.sampled_from(POLICIES), st.floats(0.05, 4), st.integers(1, 4), st.booleans(), st.integers(0, 2))
def test_an_expert_keeps_what_it_can_and_not_one_more(
    seed: int, policy: str, factor: float, k: int, holes: bool, more: int
) -> None:
    """Kept = min(load, places), exactly, and kept choices stay where they were."""
    asked = _asked(np.random.default_rng(seed), 40, 12, k, holes=holes, more=more)
    rule = ExpertCapacity.model_validate({"kind": "expert_capacity", "capacity_factor": factor, "drop_policy": policy})
    kept = rule.keep(asked)
    places = rule.capacity(40, k, 12)
    assert places == min(40, math.ceil(40 * k * factor / 12 * (1 - 1e-12)))
    assert _loads(kept, 12) == [min(load, places) for load in _loads(asked.topk_ids, 12)]
    assert ((kept == asked.topk_ids) | (kept == -1)).all()


@given(seeds, st.sampled_from(POLICIES), st.lists(st.floats(0.05, 4), min_size=2, max_size=5))
def test_more_capacity_never_drops_what_less_kept(seed: int, policy: str, factors: list[float]) -> None:
    asked = _asked(np.random.default_rng(seed), 30, 8, 2, holes=True)
    before = np.full(asked.topk_ids.shape, -1, np.int16)
    for factor in sorted(factors):
        rule = {"kind": "expert_capacity", "capacity_factor": factor, "drop_policy": policy}
        kept = ExpertCapacity.model_validate(rule).keep(asked)
        assert (kept[before >= 0] >= 0).all()
        before = kept


@given(seeds, st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0, 1))
def test_more_budget_never_drops_what_less_kept(seed: int, a: float, b: float, share: float) -> None:
    asked = _asked(np.random.default_rng(seed), 30, 8, 2, holes=True)
    less, more = (
        DeviceBudget(n_devices=2, capacity_factor=factor, protected_share=share).keep(asked)
        for factor in sorted((a, b))
    )
    assert (more[less >= 0] >= 0).all()


@given(seeds, st.floats(0.1, 3))
def test_devices_stay_within_their_budget_without_protection(seed: int, factor: float) -> None:
    asked = _asked(np.random.default_rng(seed), 30, 8, 2, holes=True)
    kept = DeviceBudget(n_devices=4, capacity_factor=factor, protected_share=0).keep(asked)
    budget = int(np.count_nonzero(asked.topk_ids >= 0) * factor / 4 * (1 + 1e-12))
    loads = np.array(_loads(asked.topk_ids, 8)).reshape(4, 2).sum(axis=1)
    assert np.array(_loads(kept, 8)).reshape(4, 2).sum(axis=1).tolist() == [min(load, budget) for load in loads]


@pytest.mark.parametrize(
    "rule",
    [*(ExpertCapacity.model_validate({"kind": "expert_capacity", "capacity_factor": 1e4, "drop_policy": p}) for p in POLICIES),
     DeviceBudget(n_devices=4, capacity_factor=1e4)],
)  # fmt: skip
def test_capacity_without_end_is_none(rule: ExpertCapacity | DeviceBudget) -> None:
    asked = _asked(np.random.default_rng(0), 50, 8, 2, holes=True)
    np.testing.assert_array_equal(rule.keep(asked), asked.topk_ids)


def test_whole_products_are_not_lost_to_their_last_bit() -> None:
    """4096 x 8 / 256 x 1.1 = 140.8; 100 x 1.1 / 11 = 10.000000000000002 in floating point; 29 x 3 / 87 = 1."""
    assert ExpertCapacity(capacity_factor=1.1).capacity(4096, 8, 256) == 141
    assert 100 * 1 * 1.1 / 11 > 10 and ExpertCapacity(capacity_factor=1.1).capacity(100, 1, 11) == 10
    for n in range(1, 200):
        for hundredths in (105, 110, 115, 120, 130, 210):
            exact = -(-n * 7 * hundredths // (100 * 5))
            assert ExpertCapacity(capacity_factor=hundredths / 100).capacity(10**6 + n, 7, 5) == min(
                10**6 + n, -(-(10**6 + n) * 7 * hundredths // 500)
            )
            assert ExpertCapacity(capacity_factor=hundredths / 100).capacity(n, 7, 5) == min(n, exact)


def test_a_budget_that_should_be_whole_is_whole() -> None:
    """90 pairs x 1.4 / 2 devices = 63, in floating point 62.99999999999999; the same for expert choice's takings."""
    assert int(90 * 1.4 / 2) == 62 and int(180 * 1.4 / 4) == 62
    ids, affinity = np.zeros((90, 1), np.int16), np.ones((90, 1), np.float32)
    asked = Asked(ids, affinity, np.zeros(90, np.int32), 2, np.random.default_rng)
    kept = DeviceBudget(n_devices=2, capacity_factor=1.4, protected_share=0).keep(asked)
    assert np.count_nonzero(kept == 0) == 63
    choice = ExpertChoice(capacity_factor=1.4).select(candidates(np.ones((180, 4), np.float32), 1))
    assert _loads(choice, 4) == [63] * 4


def test_places_count_the_models_experts_per_token_not_the_width_of_the_array() -> None:
    """A rule that may give a token twice k experts does not get twice the places, nor more than are padded."""
    model = toy_model(8, 2)
    capacity = {"kind": "expert_capacity", "capacity_factor": 1.0, "pad_to_capacity": True}
    select = {"kind": "threshold", "threshold": 0.0, "max_experts": 8}
    gate = Gate(Gating.model_validate({"select": select, "capacity": capacity}), model)
    kept = gate.route(Tokens(0, np.ones((16, 8), np.float32), np.zeros(16, np.int32))).topk_ids
    assert _loads(kept, 8) == [4] * 8 and gate.capacity.padded_tokens(16, 2, 8) == 4


def test_min_capacity_and_padding() -> None:
    rule = ExpertCapacity(capacity_factor=0.1, min_capacity=4)
    assert rule.capacity(64, 1, 64) == 4 and rule.capacity(3, 1, 64) == 3
    assert rule.padded_tokens(64, 1, 64) is None
    assert ExpertCapacity(capacity_factor=2.0, pad_to_capacity=True).padded_tokens(64, 1, 16) == 8


@given(st.lists(st.integers(-1, 5), max_size=40))
def test_places_in_line(groups: list[int]) -> None:
    found = place_in_line(np.array(groups, dtype=np.int16), 6).tolist()
    assert found == [groups[:i].count(g) if g >= 0 else 0 for i, g in enumerate(groups)]


def test_unfit_devices_are_refused() -> None:
    assert DeviceBudget(n_devices=3).problems(toy_model(16, 4))[0] == ("n_devices", "must divide n_routed_experts = 16")
    assert DeviceBudget(n_devices=4).problems(toy_model(16, 4)) == []
    with pytest.raises(ValueError, match="for_model"):
        DeviceBudget().keep(_asked(np.random.default_rng(0), 4, 4, 1))


# --- what chance drops ---

CLOSED = [(4096, 256, 8, 1.0, 3.4684), (4096, 256, 8, 1.25, 0.0076), (1024, 256, 8, 1.0, 6.9232), (1024, 256, 8, 1.25, 0.6793), (1024, 256, 8, 1.5, 0.0207), (4096, 8, 2, 1.0, 1.0796)]  # fmt: skip


@pytest.mark.parametrize(("n_tokens", "n_experts", "k", "factor", "percent"), CLOSED)
def test_drop_rate_of_uniform_routing(n_tokens: int, n_experts: int, k: int, factor: float, percent: float) -> None:
    """The closed form, and the real pieces (random experts, expert capacity) within four standard errors of it."""
    exact = uniform_drop_rate(n_tokens, n_experts, k, factor)
    assert 100 * exact == pytest.approx(percent, abs=5e-5)
    rule, scores = ExpertCapacity(capacity_factor=factor), np.zeros((n_tokens, n_experts), np.float32)
    share = []
    for seed in range(40):
        ids = Random().select(candidates(scores, k, seed=seed))
        asked = Asked(
            ids, np.ones(ids.shape, np.float32), np.zeros(n_tokens, np.int32), n_experts, np.random.default_rng
        )
        share.append(_drops(asked, rule.keep(asked)) / ids.size)
    error = max(float(np.std(share)), 1e-5) / math.sqrt(len(share))
    assert np.mean(share) == pytest.approx(exact, abs=4 * error)


def test_drop_rate_at_its_ends() -> None:
    assert uniform_drop_rate(0, 8, 2, 1.0) == 0.0
    assert uniform_drop_rate(64, 8, 8, 1.0) == 0.0
    assert uniform_drop_rate(64, 8, 8, 0.5) == 0.5
    assert uniform_drop_rate(64, 8, 2, 100.0) == 0.0
    assert uniform_drop_rate(1, 2, 1, 1.0) == 0.0
    brute = sum(max(x - 4, 0) * math.comb(16, x) * 0.25**x * 0.75 ** (16 - x) for x in range(17)) / 4
    assert uniform_drop_rate(16, 4, 1, 1.0) == pytest.approx(brute, rel=1e-12)
    rates = [uniform_drop_rate(10**6, 256, 8, factor) for factor in (0.5, 1.0, 1.01, 1.1)]
    assert rates[0] == pytest.approx(0.5, abs=1e-9) and sorted(rates, reverse=True) == rates and rates[3] < 1e-9


def test_switch_drops_less_than_one_percent_at_factor_1_25() -> None:
    """Switch's "typically < 1 %" (arXiv 2101.03961, section 2.2), 128 experts, on traffic that favours no expert: so from
    4,096 tokens per group on (32 per expert: 0.72 %); at 2,048 chance alone drops 2.3 %."""
    model = toy_model(128, 1, scoring_func="softmax")
    dropped = {}
    for n_tokens in (2048, 4096, 16_384):
        policy = {"capacity": {"kind": "expert_capacity", "capacity_factor": 1.25, "drop_policy": "position"}}
        gate = Gate(Gating.model_validate(policy), model, KERNELS["numba"])
        share = []
        for seed in range(65_536 // n_tokens):
            logits = stream(seed, "balanced").standard_normal((n_tokens, 128), dtype=np.float32)
            choices = gate.choose(gate.score.scores(logits, gate.kernels), np.random.default_rng)
            share.append(np.count_nonzero(choices.kept < 0) / n_tokens)
        dropped[n_tokens] = float(np.mean(share))
        error = float(np.std(share)) / math.sqrt(len(share))
        assert dropped[n_tokens] == pytest.approx(uniform_drop_rate(n_tokens, 128, 1, 1.25), abs=4 * error)
    assert dropped[2048] > 0.02 > 0.01 > dropped[4096] > dropped[16_384]


# --- recorded choices ---


def test_capacity_applies_to_recorded_choices() -> None:
    """With recorded weights the lightest go; without them all are alike and the earlier token stays."""
    ids = np.array([[0, 1], [0, 1], [0, 2]], np.int16)
    weights = np.array([[0.2, 0.8], [0.7, 0.3], [0.5, 0.5]], np.float32)
    capacity = {"kind": "expert_capacity", "capacity_factor": 0.6, "drop_policy": "probs"}
    gate = Gate(Gating.model_validate({"select": "recorded", "capacity": capacity}), toy_model(4, 2))
    for given_, kept in ((weights, [[-1, 1], [0, -1], [-1, 2]]), (None, [[0, 1], [-1, -1], [-1, 2]])):
        tokens = Tokens(0, None, np.zeros(3, np.int32), topk_ids=ids, topk_weights=given_)
        routing = gate.route(tokens)
        assert routing.topk_ids.tolist() == kept
        expected = np.where(np.array(kept) >= 0, 0.5 if given_ is None else given_, 0)
        np.testing.assert_array_equal(routing.topk_weights, expected.astype(np.float32))
    with pytest.raises(ValueError, match="neither logits nor recorded choices"):
        gate.keep_recorded(Tokens(0, None, np.zeros(3, np.int32)), np.random.default_rng)


def test_a_protected_sequence_is_so_in_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V2 report, 2.2.4: tokens of the protected sequences are never dropped, so layers must agree on them."""
    lots: Counter[bytes] = Counter()
    real = DeviceBudget.keep

    def keep(self: DeviceBudget, asked: Asked) -> I16:
        assert asked.lot is not None
        lots[asked.lot.tobytes()] += 1
        for sequence in np.unique(asked.sequence):
            assert len(np.unique(asked.lot[asked.sequence == sequence])) == 1
        kept = real(self, asked)
        assert (kept[asked.lot < self.protected_share] == asked.topk_ids[asked.lot < self.protected_share]).all()
        return kept

    monkeypatch.setattr(DeviceBudget, "keep", keep)
    sim.run(
        Path(__file__).resolve().parents[1] / "scenarios" / "tiny.yaml",
        overrides=["policies=[{name: v2, capacity: {kind: device_budget, protected_share: 0.3}}]", "replicas=1", "steps.count=1"],
    )  # fmt: skip
    layers, ranks, parts = 3, 8, 2
    assert list(lots.values()) == [layers] * (ranks * parts)


@pytest.mark.parametrize("policy", ["probs", "position", "batch_prioritized"])
def test_recorded_choices_may_come_in_any_order(policy: str) -> None:
    """Recorders do not sort a token's experts; who gets a place follows from the weights all the same."""
    rng = np.random.default_rng(3)
    weights = np.sort(rng.random((50, 3)).astype(np.float32), axis=1)[:, ::-1].copy()
    ids = np.argsort(rng.random((50, 8)), axis=1)[:, :3].astype(np.int16)
    gate = Gate(Gating(capacity=ExpertCapacity(capacity_factor=0.6, drop_policy=policy)), toy_model(8, 3))  # type: ignore[arg-type]
    kept = []
    for order in ([0, 1, 2], [2, 0, 1]):
        tokens = Tokens(0, None, np.zeros(50, np.int32), topk_ids=ids[:, order], topk_weights=weights[:, order])
        found = gate.keep_recorded(tokens, np.random.default_rng)
        np.testing.assert_array_equal(found.asked, ids[:, order])
        kept.append(np.sort(found.kept, axis=1))
    np.testing.assert_array_equal(*kept)
    assert (kept[0] < 0).any()
