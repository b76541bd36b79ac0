"""Gates: the published rules token by token, closed forms, and laws that hold for every registered selection rule."""

from __future__ import annotations

import doctest
import functools
import importlib
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.gating import Gate, Gating
from sim.gating.balance import Adjustment, Balance, Seen
from sim.gating.balance.bias import Bias
from sim.gating.capacity import Capacity
from sim.gating.piece import GateShape
from sim.gating.score import Score
from sim.gating.select import Candidates, Select
from sim.gating.select.dense import Dense
from sim.gating.select.group_limited import GroupLimited
from sim.gating.select.random import Random
from sim.gating.select.topk import TopK
from sim.kernels import reference
from sim.loading import load
from sim.metrics.balance import expected_groups_touched
from sim.plugin import Plugin, make, members
from sim.rng import stream
from sim.tokens import F32, F64, I16, I32, Tokens
from tests.strategies import KERNELS, candidates, distinct, dyadic, seeds, shapes, toy_model

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"
BOTH = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())
Ids = list[list[int]]


# --- the published gates, written out per token ---


def published_v3(
    scores: F32, bias: F32, k: int = 8, n_group: int = 8, topk_group: int = 4
) -> tuple[Ids, list[list[float]]]:
    """DeepSeek-V3 report, eq. 13-16 and its inference code: groups by the sum of their two best biased affinities,
    the others masked with -inf, weights from unbiased affinities, x 2.5."""
    size = scores.shape[1] // n_group
    all_ids, all_weights = [], []
    for s in scores:
        biased = [np.float32(a + b) for a, b in zip(s, bias, strict=True)]
        sums = []
        for g in range(n_group):
            best = sorted(biased[g * size : (g + 1) * size], reverse=True)
            sums.append(np.float32(best[0] + best[1]))
        kept = sorted(range(n_group), key=lambda g: (-sums[g], g))[:topk_group]
        masked = [b if e // size in kept else -math.inf for e, b in enumerate(biased)]
        ids = sorted(range(len(masked)), key=lambda e: (-masked[e], e))[:k]
        total = sum(float(s[e]) for e in ids) + 1e-20
        all_ids.append(ids)
        all_weights.append([float(s[e]) / total * 2.5 for e in ids])
    return all_ids, all_weights


@functools.cache
def _published_v3(scores: bytes, bias: bytes) -> tuple[Ids, list[list[float]]]:
    """Both kernels have the same scores: worked out once."""
    return published_v3(np.frombuffer(scores, np.float32).reshape(-1, 256), np.frombuffer(bias, np.float32))


def published_v2(scores: F32, k: int = 6, n_group: int = 8, topk_group: int = 3) -> tuple[Ids, list[list[float]]]:
    """DeepSeek-V2 report, section 2.2.2: groups by their best affinity; weights not renormalised, x 16."""
    size = scores.shape[1] // n_group
    all_ids, all_weights = [], []
    for s in scores:
        tops = [max(s[g * size : (g + 1) * size]) for g in range(n_group)]
        kept = sorted(range(n_group), key=lambda g: (-tops[g], g))[:topk_group]
        masked = [a if e // size in kept else -math.inf for e, a in enumerate(s)]
        ids = sorted(range(len(masked)), key=lambda e: (-masked[e], e))[:k]
        all_ids.append(ids)
        all_weights.append([float(s[e]) * 16.0 for e in ids])
    return all_ids, all_weights


def _tokens(logits: F32) -> Tokens:
    return Tokens(rank=0, logits=logits, topic=np.zeros(len(logits), np.int32))


def _settled(gate: Gate, seed: int) -> Gate:
    """Let the bias learn from made-up loads, so that it differs between experts and has equal values too."""
    rng = np.random.default_rng(seed)
    for step in range(60):
        gate.update(Seen(rng.integers(90, 110, (1, 1, gate.n_routed_experts))), step)
    return gate


@BOTH
def test_gate_is_deepseek_v3s(kernels: object) -> None:
    """The shipped V3 policy on 10,000 tokens; coarse logits make experts, and whole groups, tie."""
    scenario = load(SCENARIOS / "v3.yaml")
    policy = next(p for p in scenario.policies if p.name.startswith("DeepSeek-V3"))
    gate = _settled(Gate(policy, scenario.model, kernels), 3)  # type: ignore[arg-type]
    bias = gate.states[0][0].astype(np.float32)
    rng = np.random.default_rng(4)
    logits = (rng.integers(-12, 13, (10_000, 256)) / 4).astype(np.float32)
    logits[:200] = np.round(logits[:200] / 2) * 2  # hardly any distinct values
    logits[200:5000] += rng.standard_normal((4800, 256), dtype=np.float32)
    routing = gate.route(_tokens(logits))
    # The last bit of a sigmoid decides near-ties, so the ids are held to our scores and those to float64.
    scores = gate.score.scores(logits, gate.kernels)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits.astype(np.float64))), rtol=0, atol=2.5e-7)
    ids, weights = _published_v3(scores.tobytes(), bias.tobytes())
    np.testing.assert_array_equal(routing.topk_ids, ids)
    np.testing.assert_allclose(routing.topk_weights, weights, rtol=0, atol=1e-6)
    # The comparison is worth something: ties are there, and the bias matters.
    assert np.unique(bias).size < 256
    assert (routing.topk_ids != gate.kernels.group_limited_topk(
        scores, np.ones(256, np.float32), np.zeros(256, np.float32), 8, 8, 4, 2
    )).any()  # fmt: skip


@BOTH
def test_selection_is_deepseek_v3s_with_exact_ties(kernels: object) -> None:
    """Dyadic scores and biases: group sums tie exactly, and nothing rounds."""
    rng = np.random.default_rng(5)
    scores, bias = dyadic(rng, 1500, 256, 24), (rng.integers(-6, 7, 256) / 64).astype(np.float32)
    rule = GroupLimited(n_group=8, topk_group=4)
    ids, _ = published_v3(scores, bias)
    found = rule.select(candidates(scores, 8, shift=bias, kernels=kernels))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, ids)


@BOTH
def test_gate_is_deepseek_v2s(kernels: object) -> None:
    model = toy_model(160, 6, n_group=8, topk_group=3, scoring_func="softmax", routed_scaling_factor=16.0)
    gate = Gate(Gating(select=GroupLimited(group_score="max")), model, kernels)  # type: ignore[arg-type]
    rng = np.random.default_rng(6)
    logits = (rng.integers(-12, 13, (1500, 160)) / 4).astype(np.float32)
    scores = gate.score.scores(logits, gate.kernels)
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(scores, shifted / shifted.sum(axis=1, keepdims=True), atol=1e-6)
    ids, weights = published_v2(scores)
    routing = gate.route(_tokens(logits))
    np.testing.assert_array_equal(routing.topk_ids, ids)
    np.testing.assert_allclose(routing.topk_weights, weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(members(Score)))
def test_scores_are_affinities(kind: str) -> None:
    """Not negative, float32, and growing with the logit: what selection and weights rest on."""
    logits = np.random.default_rng(0).standard_normal((50, 32), dtype=np.float32) * 4
    rule = make(Score, kind)
    scores = rule.scores(logits, KERNELS["numpy"])
    assert scores.dtype == np.float32 and scores.shape == logits.shape and (scores >= 0).all()
    np.testing.assert_array_equal(scores, rule.scores(logits, KERNELS["numba"]))
    order = np.argsort(logits, axis=1)
    assert (np.diff(np.take_along_axis(scores, order, axis=1), axis=1) >= 0).all()


def test_negative_biases_do_not_let_a_token_leave_its_groups() -> None:
    """The widespread port masks with 0.0 instead of -inf: when biased scores are negative it escapes. Ours must not."""
    rng = np.random.default_rng(7)
    scores, shift = dyadic(rng, 400, 256), np.full(256, -2.0, np.float32)
    for kernels in KERNELS.values():
        rule = GroupLimited(n_group=8, topk_group=4)
        ids = rule.select(candidates(scores, 8, shift=shift, kernels=kernels))
        assert max(len(set(row)) for row in (ids // 32).tolist()) <= 4
        np.testing.assert_array_equal(ids, published_v3(scores, shift)[0])
    escaped = np.argsort(-np.where(np.arange(256) < 128, scores - 2, 0), axis=1, kind="stable")[:, :8]  # the port's way
    assert (escaped >= 128).all()


def test_sum_of_k_over_m_is_v3s_text() -> None:
    """The report sums the K/M best: with k = 8 and M = 4 that is the code's two best."""
    scores = dyadic(np.random.default_rng(8), 300, 64)
    for topk_group, same in ((4, True), (2, False)):
        a = GroupLimited(n_group=8, topk_group=topk_group, group_score="topk_sum").select(candidates(scores, 8))
        b = GroupLimited(n_group=8, topk_group=topk_group, group_score="top2_sum").select(candidates(scores, 8))
        assert np.array_equal(a, b) is same


# --- weights ---


@given(seeds, st.booleans(), st.sampled_from([1.0, 2.5]))
def test_weights_use_unbiased_scores(seed: int, norm: bool, scaling: float) -> None:
    model = toy_model(norm_topk_prob=norm, routed_scaling_factor=scaling)
    gate = _settled(Gate(Gating(select=TopK(), balance=(Bias(bias_update_rate=0.02),)), model), seed)
    logits = np.random.default_rng(seed).standard_normal((20, 16), dtype=np.float32)
    routing = gate.route(_tokens(logits))
    picked = np.take_along_axis(gate.score.scores(logits, gate.kernels), routing.topk_ids.astype(int), axis=1)
    expected = picked / picked.sum(axis=1, keepdims=True) if norm else picked
    np.testing.assert_allclose(routing.topk_weights, expected * scaling, rtol=1e-6)
    if norm:
        np.testing.assert_allclose(routing.topk_weights.sum(axis=1), scaling, rtol=1e-6)


def test_weight_of_no_expert_is_zero() -> None:
    gate = Gate(Gating(), toy_model(4, 2, norm_topk_prob=True))
    ids = np.array([[2, -1], [-1, -1]], np.int16)
    weights = gate.weights(np.full((2, 4), 0.5, np.float32), ids)
    assert weights.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_scales_multiply_and_shifts_add() -> None:
    shifts = (Bias(bias_update_rate=0.5), Bias(bias_update_rate=0.25))
    scales = (Bias(bias_update_rate=0.5, form="multiplicative"), Bias(bias_update_rate=0.25, form="multiplicative"))
    gate = Gate(Gating(balance=(*shifts, *scales)), toy_model(4, 1))
    gate.update(Seen(np.array([[[3, 1, 0, 0]]])), 0)
    assert gate.shift.tolist() == [-0.75, 0.0, 0.75, 0.75]
    assert gate.scale.tolist() == [0.5 * 0.75, 1.0, 1.5 * 1.25, 1.5 * 1.25]
    routing = gate.route(_tokens(np.array([[9.0, 0.0, -1.0, -2.0]], np.float32)))
    assert routing.topk_ids.tolist() == [[2]]  # 0.27 x 1.875 + 0.75 beats 1.0 x 0.375 - 0.75


# --- what moves the router itself ---


class _Pull(Balance):
    """Not registered. Adds the loads' excess, x 0.01, to the logits of the topic 1."""

    kind: str = "pull"

    def start(self, shape: GateShape) -> F64:
        return np.zeros(shape.n_routed_experts)

    def adjust(self, state: F64, shape: GateShape) -> Adjustment:
        return Adjustment(offset=np.stack([0 * state, state]))

    def update(self, state: F64, seen: Seen, shape: GateShape, step: int, gain: float = 1.0) -> F64:
        loads = seen.loads("global_batch")[0]
        return state + 0.01 * (loads - loads.mean())


def test_offsets_move_logits_by_topic_and_dynamics_belong_to_the_natural_affinity() -> None:
    model, logits = toy_model(4, 1), np.zeros((2, 4), np.float32)
    topic, seen = np.array([0, 1], np.int32), Seen(np.array([[[5, 1, 1, 1]]]))
    expected = np.array([[0, 0, 0, 0], [0.03, -0.01, -0.01, -0.01]], np.float32)
    learned = Gate(Gating(balance=(_Pull(),)), model, modalities=("text", "text"))
    assumed = Gate(Gating(), model, modalities=("text", "text"), dynamics=(_Pull(),))
    assumed.update(seen, 0, warming_up=True)
    assert assumed.offset is None and assumed.router(logits, topic, np.random.default_rng).logits is logits
    for gate in (learned, assumed):
        gate.update(seen, 0)
        router = gate.router(logits, topic, np.random.default_rng)
        np.testing.assert_allclose(router.logits, expected, atol=1e-8)
        np.testing.assert_array_equal(router.scores, gate.score.scores(router.logits, gate.kernels))
    assert learned.moved and learned.natural_logits(logits, topic) is logits
    assert not assumed.moved
    np.testing.assert_allclose(assumed.natural_logits(logits, topic), expected, atol=1e-8)


def test_jitter_is_switchs() -> None:
    """Input x U(1 - eps, 1 + eps): a logit's noise has the spread eps / sqrt(3) of the token's logits, in training only."""
    model, logits = toy_model(64, 1), np.random.default_rng(0).standard_normal((4000, 64), dtype=np.float32) * 2
    topic = np.zeros(4000, np.int32)
    gate = Gate(Gating(router_jitter_noise=0.1), model)
    noise = gate.router(logits, topic, lambda: stream(0, "jitter")).logits - logits
    assert noise.std() / np.sqrt(np.square(logits).mean()) == pytest.approx(0.1 / math.sqrt(3), rel=0.01)
    assert abs(noise.mean()) < 4 * noise.std() / math.sqrt(noise.size)
    assert gate.router(logits, topic, np.random.default_rng, training=False).logits is logits
    assert Gate(Gating(), model).router(logits, topic, np.random.default_rng).logits is logits


def test_llama_4_weighs_by_the_sigmoid_of_its_best_logit() -> None:
    logits = np.random.default_rng(1).standard_normal((50, 16), dtype=np.float32)
    routing = Gate(Gating.model_validate({"score": "sigmoid"}), toy_model(16, 1)).route(_tokens(logits))
    np.testing.assert_array_equal(routing.topk_ids[:, 0], logits.argmax(axis=1))
    np.testing.assert_allclose(routing.topk_weights[:, 0], 1 / (1 + np.exp(-logits.max(axis=1))), atol=1e-6)


def test_a_bias_per_modality_needs_topics() -> None:
    gate = Gate(Gating(balance=(Bias(per="modality"),)), toy_model(4, 1), modalities=("text", "image"))
    gate.update(Seen(np.array([[[2, 2, 2, 2]]]), np.array([[2, 2, 1, 1], [0, 0, 1, 1]])), 0)
    with pytest.raises(ValueError, match="topics"):
        gate.choose(np.zeros((1, 4), np.float32), np.random.default_rng)


# --- laws of every selection rule ---

EXPERTS, GROUPS, KEPT, K, TOKENS = 24, 4, 2, 4, 12
VOCABULARY = 40


@dataclass(frozen=True)
class Input:
    """Scores of some tokens, the choices that a trace recorded for them, and their vocabulary indices."""

    scores: F32
    recorded: I16
    token_ids: I32

    def rows(self, order: list[int]) -> Input:
        return Input(self.scores[order], self.recorded[order], self.token_ids[order])

    def scored(self, scores: F32) -> Input:
        return replace(self, scores=scores.astype(np.float32))

    def relabelled(self, new: list[int]) -> Input:
        """Expert e becomes expert new[e]."""
        scores = np.empty_like(self.scores)
        scores[:, new] = self.scores
        return Input(scores, np.array(new, np.int16)[self.recorded], self.token_ids)


def _input(rng: np.random.Generator, rule: Select, ties: bool = True) -> Input:
    """Multiples of 1/64 with many ties; where tokens compete for experts a tie has several right answers, so there
    multiples of 2^-18. Sums and shifts are exact in float32 either way."""
    if not rule.per_token:
        scores = (rng.integers(0, 2**18, (TOKENS, EXPERTS)) / 2**18).astype(np.float32)
    else:
        scores = dyadic(rng, TOKENS, EXPERTS, 20) if ties else distinct(rng, TOKENS, EXPERTS)
    return Input(scores, reference.topk(scores, K), rng.integers(0, VOCABULARY, TOKENS, dtype=np.int32))


def _choose(rule: Select, given_: Input, shift: F32 | None = None, draws: list[int] | None = None) -> I16:
    c = candidates(
        given_.scores,
        K,
        shift=shift,
        recorded=given_.recorded,
        token_ids=given_.token_ids,
        token_frequency=1.0 / np.arange(1, VOCABULARY + 1),
    )

    def rng() -> np.random.Generator:
        if draws is not None:
            draws.append(1)
        return stream(0, "gate")

    return rule.select(replace(c, rng=rng))


def _draws(rule: Select) -> bool:
    draws: list[int] = []
    _choose(rule, _input(np.random.default_rng(0), rule), draws=draws)
    return bool(draws)


def law_distinct_and_in_range(rule: Select, rng: np.random.Generator) -> None:
    ids = _choose(rule, _input(rng, rule))
    assert ids.dtype == np.int16
    assert ids.min() >= -1 and ids.max() < EXPERTS
    if rule.varies:
        assert len(ids) == TOKENS
        assert (np.diff((ids >= 0).astype(int), axis=1) <= 0).all()  # -1 only after a token's experts
    else:
        assert ids.shape == (TOKENS, K)
        assert ids.min() >= 0
    assert all(len(set(row)) == len(row) for row in _rows(ids))


def _rows(ids: I16) -> Ids:
    """Each token's experts, without the -1s."""
    return [[e for e in row if e >= 0] for row in ids.tolist()]


def law_pure(rule: Select, rng: np.random.Generator) -> None:
    given_ = _input(rng, rule)
    before = given_.scores.copy(), given_.recorded.copy(), given_.token_ids.copy()
    first, second = _choose(rule, given_), _choose(rule, given_)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(given_.scores, before[0])
    np.testing.assert_array_equal(given_.recorded, before[1])
    np.testing.assert_array_equal(given_.token_ids, before[2])


def law_best_first_lower_index_wins(rule: Select, rng: np.random.Generator) -> None:
    given_ = _input(rng, rule)
    for row, scores in zip(_rows(_choose(rule, given_)), given_.scores.tolist(), strict=True):
        assert row == sorted(row, key=lambda e: (-scores[e], e))
        if not row:
            continue
        worst = min((scores[e], -e) for e in row)
        group = EXPERTS // GROUPS
        rivals = [e for e in range(EXPERTS) if e not in row]
        if rule.reads == "differences":  # sums over groups: experts of other groups may be better
            rivals = [e for e in rivals if e // group in {mine // group for mine in row}]
        assert all((scores[e], -e) < worst for e in rivals)


def law_permuting_tokens(rule: Select, rng: np.random.Generator) -> None:
    given_ = _input(rng, rule)
    order = rng.permutation(TOKENS).tolist()
    np.testing.assert_array_equal(_choose(rule, given_.rows(order)), _choose(rule, given_)[order])


def law_increasing_transform(rule: Select, rng: np.random.Generator) -> None:
    given_ = _input(rng, rule)
    coarse = given_.scored(np.floor(given_.scores * 64) / 64)
    for f in (lambda x: x * x * x + x, lambda x: np.exp2(x * 16), lambda x: x * 0.25):
        moved = coarse.scored(f(coarse.scores.astype(np.float64)))
        np.testing.assert_array_equal(_choose(rule, moved), _choose(rule, coarse))


def law_constant_added(rule: Select, rng: np.random.Generator) -> None:
    given_ = _input(rng, rule)
    for constant in (-0.5, 0.25, 3.0):
        moved = given_.scored(given_.scores + np.float32(constant))
        np.testing.assert_array_equal(_choose(rule, moved), _choose(rule, given_))


def law_scores_decide_nothing(rule: Select, rng: np.random.Generator) -> None:
    """Which experts a token gets, that is; their order may follow the scores."""
    given_ = _input(rng, rule)
    other = given_.scored(rng.permutation(given_.scores.ravel()).reshape(given_.scores.shape))
    np.testing.assert_array_equal(np.sort(_choose(rule, other), axis=1), np.sort(_choose(rule, given_), axis=1))


def law_bias_is_added(rule: Select, rng: np.random.Generator) -> None:
    given_ = _input(rng, rule)
    shift = (rng.integers(-16, 17, EXPERTS) / 64).astype(np.float32)
    moved = given_.scored(given_.scores + shift)
    found, expected = _choose(rule, given_, shift), _choose(rule, moved)
    if rule.reads == "nothing":  # the order of its experts is that of unbiased scores
        found, expected = np.sort(found, axis=1), np.sort(expected, axis=1)
    np.testing.assert_array_equal(found, expected)


def law_relabelling_within_groups(rule: Select, rng: np.random.Generator) -> None:
    given_ = _input(rng, rule, ties=False)
    size = EXPERTS // GROUPS
    new = np.concatenate([g * size + rng.permutation(size) for g in range(GROUPS)])
    moved, chosen = _choose(rule, given_.relabelled(new.tolist())), _choose(rule, given_)
    expected = np.where(chosen >= 0, new[chosen], -1)
    np.testing.assert_array_equal(np.sort(moved, axis=1), np.sort(expected, axis=1))


LAWS = [law for name, law in sorted(globals().items()) if name.startswith("law_")]
STRENGTH = ["nothing", "order", "differences", "sizes"]
ALLOWED = {law_scores_decide_nothing: "nothing", law_increasing_transform: "order", law_constant_added: "differences"}
"""The most that a rule may read of the scores to keep a law."""


def exempt(law: Callable[..., None], rule: Select) -> str:
    """Return why ``law`` does not bind ``rule``, by what the rule's class says of itself; empty if it does."""
    if STRENGTH.index(rule.reads) > STRENGTH.index(ALLOWED.get(law, "sizes")):
        return f"reads the {rule.reads} of scores"
    if law is law_bias_is_added and rule.reads == "sizes":
        return "ranks by biased scores, but may judge sizes without the bias"
    if law is law_best_first_lower_index_wins and rule.reads == "nothing":
        return "does not rank by score"
    if law is law_best_first_lower_index_wins and not rule.per_token:
        return "tokens compete: the best expert may be another's"
    if law in (law_permuting_tokens, law_relabelling_within_groups) and _draws(rule):
        return "draws at random by position"
    if law in (law_permuting_tokens, law_relabelling_within_groups) and rule.reads == "nothing" and not rule.per_token:
        return "goes by position"
    if law is law_relabelling_within_groups and rule.needs == "token_ids":
        return "its table names experts"
    return ""


def variants() -> list[Select]:
    """Every registered rule, once per value of each of its choices."""
    model = toy_model(EXPERTS, K, n_group=GROUPS, topk_group=KEPT)
    found = []
    for kind, cls in members(Select).items():
        if not cls.__module__.startswith("sim."):
            continue
        options: list[dict[str, object]] = [{}]
        for name, field in cls.model_fields.items():
            values: list[object] = [v for v in typing.get_args(field.annotation) if isinstance(v, str)]
            values = [True, False] if field.annotation is bool else values
            if name != "kind" and len(values) > 1:
                options = [{name: value} for value in values]
        found += [cls.model_validate({"kind": kind} | option).for_model(model) for option in options]
    return found


def _label(rule: Select) -> str:
    return "-".join(str(value) for value in rule.model_dump().values() if isinstance(value, (str, bool)))


BOUND = [(rule, law) for rule in variants() for law in LAWS if not exempt(law, rule)]


@pytest.mark.parametrize(("rule", "law"), BOUND, ids=lambda v: _label(v) if isinstance(v, Select) else v.__name__)
def test_every_rule_keeps_every_law(rule: Select, law: Callable[..., None]) -> None:
    for seed in range(20 if rule.per_token else 6):  # linear programs take their time
        law(rule, np.random.default_rng(seed))


def test_every_law_binds_some_rules_and_every_rule_most_laws() -> None:
    """The exemptions do not hollow the laws out."""
    for law in LAWS:
        assert sum(bound is law for _, bound in BOUND) >= 4, law.__name__
    for rule in variants():
        assert sum(bound is rule or bound == rule for bound, _ in BOUND) >= 3, _label(rule)


@pytest.mark.parametrize("law", ALLOWED, ids=lambda law: law.__name__)
def test_what_a_rule_says_it_reads_it_does_read(law: Callable[..., None]) -> None:
    """A rule that claims to read one step more than a law allows breaks that law: the claim is no excuse."""
    for rule in variants():
        if rule != type(rule)().for_model(toy_model(EXPERTS, K, n_group=GROUPS, topk_group=KEPT)):
            continue  # the class speaks of its default settings
        if STRENGTH.index(rule.reads) == STRENGTH.index(ALLOWED[law]) + 1:
            with pytest.raises(AssertionError):
                for seed in range(20):
                    law(rule, np.random.default_rng(seed))


def test_groups_by_their_best_expert_read_the_order_only() -> None:
    """The class reads differences, for the sums of V3; V2's maximum does not."""
    for seed in range(20):
        law_increasing_transform(
            GroupLimited(n_group=GROUPS, topk_group=KEPT, group_score="max"), np.random.default_rng(seed)
        )


class _Broken(Select):
    """Not registered: without a literal kind no scenario can name it."""

    kind: str = "broken"
    law: str

    def select(self, candidates: Candidates) -> I16:
        s, k = candidates.scores * candidates.scale + candidates.shift, candidates.k
        n_experts = s.shape[1]
        match self.law:
            case "law_distinct_and_in_range":
                return np.repeat(reference.topk(s, 1), k, axis=1)
            case "law_pure":
                candidates.scores[:, 0] += 1
                return reference.topk(candidates.scores, k)
            case "law_best_first_lower_index_wins":
                return (n_experts - 1 - reference.topk(s[:, ::-1], k)).astype(np.int16)
            case "law_permuting_tokens":
                return ((reference.topk(s, k) + np.arange(len(s))[:, None]) % n_experts).astype(np.int16)
            case "law_increasing_transform":
                return reference.topk(-np.abs(s - s.mean(axis=1, keepdims=True)), k)
            case "law_constant_added":
                return reference.topk(-np.abs(s - 0.5), k)
            case "law_bias_is_added" | "law_scores_decide_nothing":
                return reference.topk(candidates.scores, k)
            case _:
                return reference.topk(s + np.arange(n_experts, dtype=np.float32) / 16, k)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_every_law_catches_a_rule_that_breaks_it(law: Callable[..., None]) -> None:
    """Negative control: a rule made to break this law fails it."""
    rule = _Broken(law=law.__name__)
    assert "broken" not in members(Select)
    with pytest.raises(AssertionError):
        for seed in range(20):
            law(rule, np.random.default_rng(seed))


# --- special cases that must coincide, and what must never fall ---


@given(shapes(), seeds)
def test_no_restriction_is_plain_topk(shape: tuple[int, int, int, int, int], seed: int) -> None:
    n_experts, n_group, _, k, _ = shape
    scores = dyadic(np.random.default_rng(seed), 5, n_experts, 12)
    plain = TopK().select(candidates(scores, k))
    for rule in (GroupLimited(n_group=n_group, topk_group=n_group), GroupLimited(n_group=1, topk_group=1)):
        for kernels in KERNELS.values():
            np.testing.assert_array_equal(rule.select(candidates(scores, k, kernels=kernels)), plain)


@given(seeds)
def test_zero_bias_is_no_bias(seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal((30, 16), dtype=np.float32)
    model = toy_model(n_group=4, topk_group=2)
    for select in (TopK(), GroupLimited()):
        plain = Gate(Gating(select=select), model).route(_tokens(logits))
        for balance in (Bias(bias_update_rate=0.0), Bias(bias_update_rate=0.0, form="multiplicative")):
            gate = Gate(Gating(select=select, balance=(balance,)), model)
            gate.update(Seen(np.arange(16).reshape(1, 1, 16)), 0)
            routing = gate.route(_tokens(logits))
            np.testing.assert_array_equal(routing.topk_ids, plain.topk_ids)
            np.testing.assert_array_equal(routing.topk_weights, plain.topk_weights)


@given(seeds, st.sampled_from(["max", "top2_sum", "topk_sum"]))
def test_more_groups_never_lose_affinity(seed: int, group_score: str) -> None:
    """Raising topk_group raises the bound on nodes touched, and the scores of the picks never fall."""
    scores = dyadic(np.random.default_rng(seed), 12, 64)
    before = np.zeros(12)
    for topk_group in range(1, 9):
        rule = GroupLimited.model_validate(
            {"kind": "group_limited", "n_group": 8, "topk_group": topk_group, "group_score": group_score}
        )
        ids = rule.select(candidates(scores, 8))
        assert max(len(set(row)) for row in (ids // 8).tolist()) <= topk_group
        kept = np.take_along_axis(scores, ids.astype(int), axis=1).sum(axis=1)
        if group_score != "topk_sum":  # there the groups kept are not nested: n_best changes too
            assert (kept >= before).all()
        before = kept
    np.testing.assert_array_equal(ids, TopK().select(candidates(scores, 8)))


@pytest.mark.parametrize(
    "select", [TopK(), GroupLimited(n_group=4, topk_group=4), Random(), Dense()], ids=lambda s: s.kind
)
def test_every_expert_for_every_token_is_even(select: Select) -> None:
    scores = dyadic(np.random.default_rng(9), 50, 16)
    ids = select.select(candidates(scores, 16))
    assert KERNELS["numpy"].expert_tokens(ids, 16).tolist() == [50] * 16


def test_unfit_groups_are_refused() -> None:
    model = toy_model(16, 4)
    problems = {
        (3, 1): "must divide n_routed_experts = 16",
        (4, 5): "must be <= n_group = 4",
        (8, 1): "1 groups hold 2 experts, fewer than num_experts_per_tok = 4",
    }
    for (n_group, topk_group), text in problems.items():
        assert GroupLimited(n_group=n_group, topk_group=topk_group).problems(model)[0][1] == text
    assert GroupLimited(n_group=4, topk_group=2).problems(model) == []
    with pytest.raises(ValueError, match="for_model"):
        GroupLimited().select(candidates(np.zeros((1, 16), np.float32), 4))


def test_a_gate_without_logits_needs_recorded_choices() -> None:
    ids = np.array([[3, 1]], np.int16)
    tokens = Tokens(rank=0, logits=None, topic=np.zeros(1, np.int32), topk_ids=ids)
    model = toy_model(4, 2)
    routing = Gate(Gating.model_validate({"select": "recorded"}), model).route(tokens)
    assert routing.topk_ids.tolist() == [[3, 1]] and routing.topk_weights.tolist() == [[0.5, 0.5]]
    with pytest.raises(ValueError, match="topk needs logits"):
        Gate(Gating(), model).route(tokens)
    with pytest.raises(ValueError, match="no recorded choices"):
        make(Select, "recorded").select(candidates(np.zeros((1, 4), np.float32), 2))


# --- closed forms ---


def _groups_touched(ids: I16, n_experts: int, n_groups: int) -> float:
    group = (np.arange(n_experts) // (n_experts // n_groups)).astype(np.int32)
    return KERNELS["numba"].distinct_groups(ids, group, n_groups) / len(ids)


CLOSED = [(256, 8, 8, 5.294652, 0.8874), (256, 32, 8, 7.266800, 0.7475), (256, 64, 8, 7.675750, 0.5351), (160, 8, 6, 4.4586, 0.8073)]  # fmt: skip


@pytest.mark.parametrize(("n_experts", "n_groups", "k", "mean", "sd"), CLOSED)
def test_groups_touched_without_restriction(n_experts: int, n_groups: int, k: int, mean: float, sd: float) -> None:
    """k distinct uniform experts: G (1 - C(E - E/G, k) / C(E, k)), for random choices and for top-k of iid scores."""
    assert expected_groups_touched(n_experts, k, n_groups) == pytest.approx(mean, abs=5e-6)
    n = 20_000
    scores = np.random.default_rng(10).random((n, n_experts), dtype=np.float32)
    for rule in (Random(), TopK()):
        ids = rule.select(candidates(scores, k, kernels=KERNELS["numba"], seed=11))
        assert _groups_touched(ids, n_experts, n_groups) == pytest.approx(mean, abs=4 * sd / math.sqrt(n))


def test_v3_touches_almost_four_nodes() -> None:
    """Groups are chosen by good scores, so 3.95-3.97 of 4, not the 3.63 of groups chosen blindly."""
    scores = np.random.default_rng(12).random((20_000, 256), dtype=np.float32)
    ids = GroupLimited(n_group=8, topk_group=4).select(candidates(scores, 8, kernels=KERNELS["numba"]))
    assert 3.95 <= _groups_touched(ids, 256, 8) <= 3.97
    assert max(len(set(row)) for row in (ids // 32).tolist()) == 4


def test_v3_keeps_most_of_what_it_would_pick() -> None:
    """iid Gaussian logits: 82 % of the unrestricted picks and 99.4 % of their affinity survive M = 4."""
    model = toy_model(256, 8, n_group=8, topk_group=4)
    gate = Gate(Gating(select=GroupLimited()), model, KERNELS["numba"])
    scores = gate.score.scores(np.random.default_rng(13).standard_normal((20_000, 256), dtype=np.float32), gate.kernels)
    ids = gate.choose(scores, np.random.default_rng).kept
    free = TopK().select(candidates(scores, 8, kernels=gate.kernels))
    same = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(ids.tolist(), free.tolist(), strict=True)])
    kept = gate.kernels.picked(scores, ids).sum(dtype=float) / gate.kernels.picked(scores, free).sum(dtype=float)
    assert same == pytest.approx(0.82, abs=0.01)
    assert kept == pytest.approx(0.994, abs=0.001)


def test_v2_three_devices_are_enough() -> None:
    """The knee of DeepSeek-V2 section 2.2.2, M >= 3, in probability mass kept with iid Gaussian logits."""
    model = toy_model(160, 6, n_group=8, topk_group=8, scoring_func="softmax")
    logits = np.random.default_rng(14).standard_normal((20_000, 160), dtype=np.float32)
    gate = Gate(Gating(), model, KERNELS["numba"])
    scores = gate.score.scores(logits, gate.kernels)
    best = gate.kernels.picked(scores, gate.choose(scores, np.random.default_rng).kept).sum(axis=1)
    for topk_group, share in ((1, 0.607), (2, 0.836), (3, 0.944), (4, 0.988), (5, 0.999)):
        rule = GroupLimited(n_group=8, topk_group=topk_group, group_score="max")
        ids = rule.select(candidates(scores, 6, kernels=gate.kernels))
        assert (gate.kernels.picked(scores, ids).sum(axis=1) / best).mean() == pytest.approx(share, abs=0.005)


def test_random_picks_every_pair_equally_often() -> None:
    """Two of five experts, ten pairs: a chi-square over 20,000 draws (9 degrees of freedom, 99.9 % point 27.9)."""
    ids = Random().select(candidates(np.zeros((20_000, 5), np.float32), 2, seed=15))
    pairs = np.bincount(np.sort(ids, axis=1).astype(int) @ np.array([5, 1]), minlength=25)
    pairs = pairs[[a * 5 + b for a in range(5) for b in range(a + 1, 5)]]
    assert pairs.sum() == 20_000
    assert ((pairs - 2000.0) ** 2 / 2000.0).sum() < 27.9


# --- worked examples ---


@pytest.mark.parametrize(
    "module",
    sorted({cls.__module__ for base in (Select, Balance, Score, Capacity) for cls in members(base).values() if cls.__module__.startswith("sim.")} | {"sim.gating", "sim.gating.assignment", "sim.gating.balance"}),
)  # fmt: skip
def test_worked_examples(module: str) -> None:
    """Every piece of a gate shows in its docstring what it does to a few numbers, and that is true."""
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0, f"{module} has no example"
    assert result.failed == 0


def test_bases_of_families_cannot_be_used() -> None:
    for base in (Select, Balance, Score, Capacity):
        assert issubclass(base, Plugin)
        with pytest.raises(TypeError, match="abstract"):
            base.model_validate({"kind": "x"})


@given(seeds, st.sampled_from([0.125, 0.5, 0.75, 1.0]), st.integers(1, 16), st.booleans())
def test_top_p_takes_the_fewest_experts_that_hold_the_share(seed: int, p: float, most: int, biased: bool) -> None:
    """arXiv 2403.07652, section 3.2, token by token; order by biased scores, shares of unbiased ones. Multiples of 1/64
    that sum to a power of two: shares are exact, so a share of exactly p is enough."""
    rng = np.random.default_rng(seed)
    scores = np.stack([rng.multinomial(64, np.arange(1, 17) / 136) for _ in range(8)]).astype(np.float32) / 64
    shift = (rng.integers(-8, 9, 16) / 64).astype(np.float32) if biased else np.zeros(16, np.float32)
    rule = members(Select)["top_p"].model_validate({"kind": "top_p", "p": p, "max_experts": most})
    expected = []
    for s in scores:
        order, held, row = sorted(range(16), key=lambda e, s=s: (-(s[e] + shift[e]), e)), 0.0, []
        for e in order[:most]:
            row.append(e)
            held += float(s[e])
            if held >= p:
                break
        expected.append(row)
    assert _rows(rule.select(candidates(scores, 2, shift=shift))) == expected


@given(seeds, st.sampled_from([0.0, 0.25, 0.5, 2.0]), st.integers(0, 3), st.integers(1, 16))
def test_threshold_takes_all_that_score_enough(seed: int, threshold: float, fewest: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    scores, shift = dyadic(rng, 8, 16), (rng.integers(-8, 9, 16) / 64).astype(np.float32)
    setting = {"kind": "threshold", "threshold": threshold, "min_experts": fewest, "max_experts": most}
    expected = []
    for s in scores + shift:
        order = sorted(range(16), key=lambda e, s=s: (-s[e], e))[:most]
        expected.append([e for i, e in enumerate(order) if i < fewest or s[e] >= threshold])
    found = members(Select)["threshold"].model_validate(setting).select(candidates(scores, 2, shift=shift))
    assert _rows(found) == expected


def test_thresholds_no_model_has_are_refused() -> None:
    for kind in ("threshold", "top_p"):
        rule = members(Select)[kind]
        assert rule.model_validate({"kind": kind, "max_experts": 17}).problems(toy_model(16, 4))[0][0] == "max_experts"
        assert rule.model_validate({"kind": kind, "max_experts": 16}).problems(toy_model(16, 4)) == []
    assert members(Select)["gshard"].model_validate({"kind": "gshard"}).problems(toy_model(16, 4))[0][0] == "kind"
