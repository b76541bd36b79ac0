"""Rules in which tokens compete for experts, held against brute force, other solvers and the published loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sim.gating import Gate, Gating
from sim.gating.assignment import balanced_assignment, balanced_bound, balanced_share, even_loads
from sim.gating.balance import Sample, Seen
from sim.gating.balance.quantile import Quantile
from sim.gating.piece import GateShape
from sim.gating.score.sigmoid import Sigmoid
from sim.gating.select.base import Base
from sim.gating.select.expert_choice import ExpertChoice, leakage_bits_per_token_and_layer
from sim.gating.select.hash import Hash
from sim.gating.select.oracle import Oracle
from sim.gating.select.sinkhorn import Sinkhorn
from sim.metrics.balance import max_vio
from sim.tokens import F32, F64, I16, I64, Tokens
from tests.strategies import KERNELS, candidates, dyadic, seeds, toy_model

PLAIN = KERNELS["numpy"]


def _sum(scores: F32, ids: I16) -> float:
    return float(np.take_along_axis(scores.astype(np.float64), ids.astype(int), axis=1).sum())


def _counts(ids: I16, n_experts: int) -> list[int]:
    return PLAIN.expert_tokens(ids, n_experts).tolist()


def _best_one_each(scores: F32, loads: I64) -> float:
    """k = 1: an expert with load n is n columns of a square assignment problem."""
    columns = np.repeat(np.arange(len(loads)), loads)
    square = scores.astype(np.float64)[:, columns]
    rows, chosen = linear_sum_assignment(square, maximize=True)
    return float(square[rows, chosen].sum())


# --- balanced assignment ---


def _made(kind: str, rng: np.random.Generator, n_tokens: int, n_experts: int) -> F32:
    match kind:
        case "continuous":
            return rng.random((n_tokens, n_experts), dtype=np.float32)
        case "ties":
            return dyadic(rng, n_tokens, n_experts, 5)
        case "logits":
            skew = 2 * np.arange(n_experts, dtype=np.float32)
            return rng.standard_normal((n_tokens, n_experts), dtype=np.float32) * 3 + skew
        case "huge":
            return rng.choice(np.array([-1e4, 1e4, 9e3], np.float32), (n_tokens, n_experts))
        case "equal":
            return np.full((n_tokens, n_experts), 0.25, np.float32)
        case _:
            return np.eye(n_experts, dtype=np.float32)[np.zeros(n_tokens, int)]


@pytest.mark.parametrize("kind", ["continuous", "ties", "logits", "huge", "equal", "one-hot"])
@pytest.mark.parametrize(("n_tokens", "n_experts"), [(24, 6), (64, 16), (30, 7), (3, 5), (1, 4)])
def test_assignment_is_optimal_for_one_expert_per_token(kind: str, n_tokens: int, n_experts: int) -> None:
    """Against scipy's assignment solver on duplicated columns."""
    for seed in range(4):
        scores = _made(kind, np.random.default_rng(seed), n_tokens, n_experts)
        loads = even_loads(n_tokens, 1, n_experts)
        ids = balanced_assignment(scores, 1, PLAIN)
        assert _counts(ids, n_experts) == loads.tolist()
        best = _best_one_each(scores, loads)
        size = max(1.0, float(np.abs(scores).max()) * n_tokens)
        assert _sum(scores, ids) == pytest.approx(best, abs=1e-6 * size)
        assert balanced_bound(scores, 1, PLAIN).bound >= best - 1e-6 * size


@pytest.mark.parametrize(("n_tokens", "n_experts", "k"), [(4, 4, 2), (3, 4, 2), (4, 3, 2), (2, 5, 3), (4, 4, 4)])
def test_assignment_is_optimal_for_several(n_tokens: int, n_experts: int, k: int) -> None:
    """Against all choices there are."""
    sets = list(itertools.combinations(range(n_experts), k))
    loads = even_loads(n_tokens, k, n_experts)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        scores = (
            dyadic(rng, n_tokens, n_experts, 9) if seed % 2 else rng.random((n_tokens, n_experts), dtype=np.float32)
        )
        best = even = -math.inf
        for choice in itertools.product(sets, repeat=n_tokens):
            counts = np.bincount(np.ravel(choice), minlength=n_experts)
            value = _sum(scores, np.array(choice, np.int16))
            if counts.max() - counts.min() <= 1:
                even = max(even, value)
            if counts.tolist() == loads.tolist():
                best = max(best, value)
        ids = balanced_assignment(scores, k, PLAIN)
        assert _counts(ids, n_experts) == loads.tolist()
        assert all(len(set(row)) == k for row in ids.tolist())
        assert _sum(scores, ids) == pytest.approx(best, abs=1e-6)
        assert balanced_bound(scores, k, PLAIN).bound >= even - 1e-6  # whoever has the larger loads


@given(seeds, st.integers(1, 3))
def test_given_loads_are_met(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((20, 6), dtype=np.float32)
    wanted = PLAIN.expert_tokens(PLAIN.topk(rng.random((20, 6), dtype=np.float32), np.ones(6, np.float32), np.zeros(6, np.float32), k), 6)  # fmt: skip
    ids = balanced_assignment(scores, k, PLAIN, wanted)
    assert _counts(ids, 6) == wanted.tolist()
    if k == 1:
        assert _sum(scores, ids) == pytest.approx(_best_one_each(scores, wanted), abs=1e-5)
    picked = np.take_along_axis(scores, ids.astype(int), axis=1)
    assert (np.diff(picked, axis=1) <= 0).all()  # best first


def test_loads_that_cannot_be_are_refused() -> None:
    scores = np.zeros((4, 2), np.float32)
    for loads in ([3, 2], [5, -1]):
        with pytest.raises(ValueError, match="loads must sum to tokens x k = 4"):
            balanced_assignment(scores, 1, PLAIN, np.array(loads))


def test_the_bound_is_close_and_from_above() -> None:
    """Skewed logits, 512 tokens: the bound exceeds the optimum by less than 0.1 %, and the unrestricted sum by far less
    than the oracle gives up."""
    rng = np.random.default_rng(0)
    scores = Sigmoid().scores((rng.standard_normal((512, 32)) + np.linspace(-1, 1, 32)).astype(np.float32), PLAIN)
    best = _sum(scores, balanced_assignment(scores, 4, PLAIN))
    bound = balanced_bound(scores, 4, PLAIN).bound
    free = _sum(scores, PLAIN.topk(scores, np.ones(32, np.float32), np.zeros(32, np.float32), 4))
    assert best <= bound <= 1.001 * best < free
    assert balanced_share(scores, 4, PLAIN) == pytest.approx(best / free, abs=0.01)


def test_the_oracle_keeps_more_than_any_balanced_rule() -> None:
    """Of the rules whose loads are exactly even, none keeps more affinity; with the oracle the loads are even too."""
    rng = np.random.default_rng(1)
    scores = Sigmoid().scores((rng.standard_normal((256, 16)) + np.linspace(-1, 1, 16)).astype(np.float32), PLAIN)
    c = candidates(scores, 2)
    ids = Oracle().select(c)
    assert max_vio(_counts(ids, 16)) == 0
    shuffled = np.stack([np.roll(np.arange(256) % 16, 3), np.arange(256) * 7 % 16], axis=1).astype(np.int16)
    assert _sum(scores, ids) > _sum(scores, shuffled)
    choice = ExpertChoice().select(c)
    kept = PLAIN.picked(scores, choice).sum(dtype=float)
    # Expert choice may give a token any number of experts, so it is less bound, and keeps at least as much.
    assert _counts(choice, 16) == [32] * 16 and kept >= _sum(scores, ids) - 1e-6


# --- BASE ---


def test_base_solves_on_raw_affinities_in_training_and_is_greedy_after() -> None:
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal((48, 8)) * 3 + np.arange(8)).astype(np.float32)
    scores = Sigmoid().scores(logits, PLAIN)
    c = candidates(scores, 1, logits=logits)
    trained = Base().select(c)
    assert _counts(trained, 8) == [6] * 8
    assert _sum(logits, trained) == pytest.approx(_best_one_each(logits, even_loads(48, 1, 8)), abs=1e-4)
    # The affinities are raw: on their sigmoids another assignment would be best.
    assert _sum(logits, Oracle().select(c)) < _sum(logits, trained)
    served = Base(training=False).select(c)
    np.testing.assert_array_equal(served[:, 0], logits.argmax(axis=1))
    assert max_vio(_counts(served, 8)) > 1
    gate = Gate(Gating.model_validate({"select": "base"}), toy_model(8, 1))
    weights = gate.route(Tokens(0, logits, np.zeros(48, np.int32))).topk_weights
    np.testing.assert_allclose(
        weights, 1 / (1 + np.exp(-np.take_along_axis(logits, trained.astype(int), 1))), atol=1e-6
    )


# --- Sinkhorn ---


def published_sinkhorn(logits: F64, k: int, tolerance: float = 1e-4) -> tuple[list[list[int]], F64]:
    """Megatron-LM's loop on exp(logits), and top-k of what it returns."""
    cost = np.exp(logits)
    d0, d1 = np.ones(cost.shape[0]), np.ones(cost.shape[1])
    old, error = d1, math.inf
    while error > tolerance:
        d0 = 1 / d0.size / ((d1 * cost).sum(axis=1) + 1e-8)
        d1 = 1 / d1.size / ((d0[:, None] * cost).sum(axis=0) + 1e-8)
        error, old = float(np.abs(old - d1).mean()), d1
    scaled = d1 * cost * d0[:, None]
    return np.argsort(-scaled, axis=1, kind="stable")[:, :k].tolist(), scaled


@pytest.mark.parametrize("k", [1, 4])
def test_sinkhorn_is_megatrons(k: int) -> None:
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((400, 16)) + np.linspace(-1.5, 1.5, 16)).astype(np.float32)
    expected, scaled = published_sinkhorn(logits.astype(float), k)
    scores = PLAIN.softmax(logits)
    ids = Sinkhorn().select(candidates(scores, k, logits=logits))
    assert np.mean(ids == expected) > 0.999  # float32 of the returned matrix may tie
    np.testing.assert_allclose(scaled.sum(axis=0), 1 / 16, rtol=1e-3)
    plain = PLAIN.topk(scores, np.ones(16, np.float32), np.zeros(16, np.float32), k)
    assert max_vio(_counts(ids, 16)) < 0.5 * max_vio(_counts(plain, 16))
    np.testing.assert_array_equal(Sinkhorn(training=False).select(candidates(scores, k, logits=logits)), plain)
    gate = Gate(Gating.model_validate({"select": "sinkhorn"}), toy_model(16, k, scoring_func="softmax"))
    routing = gate.route(Tokens(0, logits, np.zeros(400, np.int32)))
    np.testing.assert_array_equal(routing.topk_weights, PLAIN.picked(scores, routing.topk_ids))  # of the raw logits


# --- expert choice ---


@given(seeds, st.sampled_from([None, 0.5, 1.0, 1.1, 3.0]), st.integers(1, 3))
def test_expert_choice_is_equation_1(seed: int, c: float | None, k: int) -> None:
    """Each expert takes its n c / e best tokens: loads are equal, exactly; token by token."""
    scores = dyadic(np.random.default_rng(seed), 40, 8, 20)
    ids = ExpertChoice(capacity_factor=c).select(candidates(scores, k))
    takes = int(40 * (c or k) / 8 + 1e-9)
    chosen: list[set[int]] = [set() for _ in range(40)]
    for e in range(8):
        for t in sorted(range(40), key=lambda t, e=e: (-scores[t, e], t))[:takes]:
            chosen[t].add(e)
    assert [{e for e in row if e >= 0} for row in ids.tolist()] == chosen
    assert _counts(ids, 8) == [takes] * 8


def test_expert_choice_leaks() -> None:
    """arXiv 2408.15664, section 5.2: 9 layers of 16 experts, K = 2, can tell a token more than 50 bits."""
    assert 9 * leakage_bits_per_token_and_layer(16, 2) > 50
    assert leakage_bits_per_token_and_layer(16, 2) == pytest.approx(2 * math.log2(7))
    assert leakage_bits_per_token_and_layer(4, 2) == leakage_bits_per_token_and_layer(4, 3) == 0.0
    note = ExpertChoice().note(toy_model(16, 2))
    assert "not causal" in note and "5.6 bits" in note


# --- quantile balancing ---


def published_quantile(scores: F64, beta: F64, k: int) -> list[float]:
    """Megatron-LM's `qb_dual_update`: alpha_t = (k+1)-th largest of s - beta, beta_e = (q+1)-th largest of s_e - alpha."""
    n_tokens, n_experts = scores.shape
    alpha = [sorted(row, reverse=True)[k] for row in (scores - beta).tolist()]
    q = n_tokens * k // n_experts
    return [
        sorted((s - a for s, a in zip(column, alpha, strict=True)), reverse=True)[q] for column in scores.T.tolist()
    ]


def _sample(scores: F32, part: int = 0, rank: int = 0) -> Sample:
    zeros = np.zeros(len(scores), np.int32)
    return Sample(part, rank, scores, scores, np.zeros((len(scores), 1), np.int16), zeros, zeros, Sigmoid())


@given(seeds, st.integers(1, 3))
def test_quantile_is_megatrons(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.random((24, 8), dtype=np.float32) + np.linspace(0, 0.3, 8, dtype=np.float32) for _ in range(3)]
    shape, beta = GateShape(8, k), rng.random(8) / 4
    seen = Seen(np.zeros((3, 1, 8), np.int64), None, tuple(_sample(s, part) for part, s in enumerate(parts)))
    found = Quantile().update(beta, seen, shape, 0)
    expected = np.mean([published_quantile(s.astype(float), beta, k) for s in parts], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    whole = Quantile(scope="global_batch").update(beta, seen, shape, 0)
    np.testing.assert_allclose(whole, published_quantile(np.concatenate(parts).astype(float), beta, k), rtol=1e-12)


def test_quantile_groups_by_its_scope() -> None:
    """Two micro-batches on three ranks: thresholds of each of six, of each micro-batch on all ranks, or of all tokens."""
    rng = np.random.default_rng(7)
    parts = {(m, r): rng.random((16, 8), dtype=np.float32) + np.float32(0.2 * m) for m in range(2) for r in range(3)}
    seen = Seen(np.zeros((2, 3, 8), np.int64), None, tuple(_sample(s, m, r) for (m, r), s in parts.items()))
    groups = {
        "micro_batch": list(parts.values()),
        "ep_group": [np.concatenate([parts[m, r] for r in range(3)]) for m in range(2)],
        "global_batch": [np.concatenate(list(parts.values()))],
    }
    for scope, found in groups.items():
        rule = Quantile.model_validate({"kind": "quantile", "scope": scope})
        expected = np.mean([published_quantile(s.astype(float), np.zeros(8), 2) for s in found], axis=0)
        np.testing.assert_allclose(rule.update(np.zeros(8), seen, GateShape(8, 2), 0), expected, rtol=1e-12)


def test_quantile_balances_in_a_few_steps() -> None:
    """Same tokens again and again: what a sign rule needs hundreds of steps for takes a handful; no rate to tune."""
    rng = np.random.default_rng(4)
    logits = (rng.standard_normal((2048, 16)) + np.linspace(-2, 2, 16)).astype(np.float32)
    gate = Gate(Gating.model_validate({"balance": "quantile"}), toy_model(16, 2))
    tokens = Tokens(0, logits, np.zeros(2048, np.int32))
    vio = []
    for step in range(8):
        routing = gate.route(tokens)
        counts = PLAIN.expert_tokens(routing.topk_ids, 16)
        vio.append(float(max_vio(counts)))
        gate.update(Seen(counts[None, None], None, (_sample(gate.score.scores(logits, PLAIN)),)), step)
    assert vio[0] > 1.5 and vio[-1] < 0.05


# --- hash ---


def test_hash_tables() -> None:
    """The same experts for the same token id whatever the scores; random: all experts equally often; balanced: loads
    within the largest single token of each other."""
    vocabulary, n_experts, k = 5000, 16, 2
    frequency = 1.0 / np.arange(1, vocabulary + 1)
    frequency /= frequency.sum()
    every = np.arange(vocabulary, dtype=np.int32)
    scores = np.random.default_rng(5).random((vocabulary, n_experts), dtype=np.float32)
    found: dict[str, I16] = {}
    for table in ("random", "balanced"):
        rule = Hash.model_validate({"kind": "hash", "table": table})
        ids = found[table] = rule.select(candidates(scores, k, token_ids=every, token_frequency=frequency))
        other = rule.select(candidates(1 - scores, k, token_ids=every[::-1], token_frequency=frequency))
        np.testing.assert_array_equal(np.sort(ids, axis=1), np.sort(other[::-1], axis=1))
        assert (ids[:, 0] != ids[:, 1]).all()
        picked = np.take_along_axis(scores, ids.astype(int), axis=1)
        assert (np.diff(picked, axis=1) <= 0).all()
    load = {t: np.bincount(ids.ravel(), np.repeat(frequency, k), n_experts) for t, ids in found.items()}
    assert np.ptp(load["balanced"]) <= frequency[0] and max_vio(load["balanced"]) < 0.3 < max_vio(load["random"])
    types = np.bincount(found["random"].ravel(), minlength=n_experts)
    expected = vocabulary * k / n_experts
    assert ((types - expected) ** 2 / expected).sum() < 37.7  # chi-square, 15 degrees of freedom, 99.9 %
    seeded = Hash(table_seed=1).select(candidates(scores, k, token_ids=every, token_frequency=frequency))
    assert (np.sort(seeded) != np.sort(found["random"])).any()
    with pytest.raises(ValueError, match="vocabulary"):
        Hash().select(candidates(scores, k))


def test_quantile_has_nothing_to_do_when_every_expert_is_chosen() -> None:
    state = np.linspace(0, 1, 4)
    seen = Seen(np.full((1, 1, 4), 8), None, (_sample(np.random.default_rng(0).random((8, 4), dtype=np.float32)),))
    np.testing.assert_array_equal(Quantile().update(state, seen, GateShape(4, 4), 0), state)


def test_sinkhorn_stops_at_its_last_iteration() -> None:
    """One sweep is less even than many."""
    rng = np.random.default_rng(6)
    logits = (rng.standard_normal((400, 16)) + np.linspace(-3, 3, 16)).astype(np.float32)
    c = candidates(PLAIN.softmax(logits), 1, logits=logits)
    once, many = (max_vio(_counts(Sinkhorn(max_iterations=n).select(c), 16)) for n in (1, 500))
    assert many < once
