"""Count level against token level: the law itself, exact sums, and whole runs of a scenario both ways."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp

import sim
import sim.countlevel
import sim.report
from sim import rollout
from sim.countlevel import CountLaw, cholesky, fit, whole
from sim.metrics.balance import max_vio
from sim.rng import stream
from sim.rollout import Task
from sim.scenario import Scenario, load
from sim.yamlfile import ScenarioError
from tests.strategies import seeds

SEEDS = 200


def test_worked_example() -> None:
    result = doctest.testmod(sim.countlevel)
    assert result.attempted > 0 and result.failed == 0


# --- the law ---


@given(seeds, st.integers(1, 12), st.integers(1, 12))
def test_factor_of_a_singular_covariance(seed: int, size: int, rank: int) -> None:
    half = np.random.default_rng(seed).standard_normal((size, min(size, rank)))
    covariance = half @ half.T
    factor = cholesky(covariance)
    np.testing.assert_allclose(factor @ factor.T, covariance, atol=1e-6 * max(1.0, np.abs(covariance).max()))
    assert (np.triu(factor, 1) == 0).all()


def test_a_fitted_law_returns_mean_and_covariance_per_token() -> None:
    """Sequences of two lengths; the covariance of a sequence's counts grows with its length."""
    rng = np.random.default_rng(0)
    tokens = np.repeat([100, 400], 4000)
    mixing = rng.standard_normal((3, 3))
    counts = tokens[:, None] * np.array([0.1, 0.4, 0.5]) + np.sqrt(tokens)[:, None] * rng.standard_normal((8000, 3)) @ mixing
    law = fit(counts, tokens)
    np.testing.assert_allclose(law.rate, [0.1, 0.4, 0.5], rtol=0.02)
    np.testing.assert_allclose(law.factor @ law.factor.T, mixing.T @ mixing, atol=0.2)
    drawn = law.draw(stream(0, "test"), 900, 20_000)
    np.testing.assert_allclose(drawn.mean(axis=0), law.rate * 900, rtol=0.01)
    np.testing.assert_allclose(np.cov(drawn.T), 900 * law.factor @ law.factor.T, rtol=0.1, atol=30)


def test_a_pilot_of_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 sequences, found 1"):
        fit(np.ones((1, 3)), np.array([5]))


@given(seeds, st.integers(1, 5), st.integers(2, 20), st.integers(1, 50), st.floats(0, 1))
def test_whole_numbers_keep_their_sum_and_bounds(seed: int, size: int, width: int, largest: int, fill: float) -> None:
    total = int(fill * width * largest)
    values = np.random.default_rng(seed).normal(total / width, 10.0, (size, width))
    counts = whole(values, total, largest)
    assert (counts.sum(axis=1) == total).all() and counts.min() >= 0 and counts.max() <= largest
    exact = np.random.default_rng(seed).integers(0, largest + 1, (size, width))
    np.testing.assert_array_equal(whole(exact[:1].astype(float), int(exact[0].sum()), largest), exact[:1])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="7 pairs do not fit into 2 experts of at most 3 tokens"):
        whole(np.zeros((1, 2)), 7, 3)


# --- whole runs ---

BASE = {
    "name": "count",
    "model": {
        "name": "toy", "num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 64, "num_attention_heads": 2,
        "n_routed_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "scoring_func": "sigmoid",
        "n_group": 4, "topk_group": 2,
    },
    "cluster": {"extends": "scenarios/clusters/h800.yaml", "nodes": 4, "devices_per_node": 4},
    "parallel": {"ep_size": 16},
    "traffic": {
        "kind": "affinity", "tokens_per_rank": 256, "sequence_length": 32,
        "topic_tree": [{"name": "a"}, {"name": "b"}],
    },
    "policies": [{"name": "plain"}, {"name": "limited", "select": "group_limited"}],
}  # fmt: skip


def scenario(*overrides: str) -> Scenario:
    return load(BASE, overrides)


def loads(resolution: str, seeds_: range) -> dict[str, dict[str, np.ndarray]]:
    """Per policy: [seeds] of MaxVio, one expert's load, the busiest rank and the copies between ranks and to nodes.

    All seeds look at one layer of one model: the traffic's own tables are drawn from replica 0 of seed 0, the tokens of
    different steps are independent.
    """
    given_ = scenario(f"steps.count={len(seeds_)}", "steps.timed=all", f"steps.resolution={resolution}", "steps.pilot_ranks=15")
    found = {}
    for counts in rollout.run(Task(given_, (0, 1), 0, range(1))):
        exchanges = [counts.exchanges[step][0] for step in range(len(seeds_))]
        found[given_.policies[counts.policy].name] = {
            "max_vio": max_vio(counts.expert_tokens),
            "expert": counts.expert_tokens[:, 3].astype(float),
            "rank_max_vio": max_vio(np.array([e.pairs.sum(axis=0) for e in exchanges])),
            "rank_copies": np.array([float(e.rank_tokens[:, 5].sum()) for e in exchanges]),
            "node_copies": np.array([float(e.node_tokens[:, 1].sum()) for e in exchanges]),
        }
    return found


@pytest.fixture(scope="module")
def both() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    return {resolution: loads(resolution, range(SEEDS)) for resolution in ("token", "count")}


@pytest.mark.parametrize("policy", ["plain", "limited"])
def test_draws_look_like_tokens(policy: str, both: dict[str, dict[str, dict[str, np.ndarray]]]) -> None:
    """Two-sample tests over 200 batches of 4,096 tokens: mean, variance and distribution of what balance is about.

    The pilot's mean is shared by all draws, an error of sqrt(n / m) = 1 of the sampling noise of a batch of n = 128
    sequences at m = 120 in the pilot: means may differ by three such errors.
    """
    token, count = both["token"][policy], both["count"][policy]
    for name in token:
        a, b = token[name], count[name]
        assert abs(a.mean() - b.mean()) < 3 * a.std() * 1.1, name
        assert 0.6 < b.std() / a.std() < 1.6, name


def test_draws_from_a_large_pilot_pass_the_ks_test() -> None:
    """With the law of 200 x 16 ranks of tokens, a batch's MaxVio, one expert's load and a rank's load have the right
    distribution; with the wrong law they do not."""
    tokens = [c for c in rollout.run(Task(scenario("steps.count=400", "steps.timed=all"), (0,), 0, range(1)))][0]
    per_rank = np.concatenate([tokens.exchanges[step][0].expert_tokens for step in range(0, 400, 2)])
    law = fit(per_rank.astype(float), np.full(len(per_rank), 256))
    drawn = whole(law.draw(stream(1, "test"), 256 * 16, SEEDS), 256 * 16 * 4, 256 * 16)
    seen = tokens.expert_tokens[1::2]
    assert ks_2samp(max_vio(seen), max_vio(drawn)).pvalue > 0.01
    assert ks_2samp(seen[:, 3], drawn[:, 3]).pvalue > 0.01
    ranks = [load.reshape(len(load), 16, 2).sum(axis=2) for load in (seen, drawn)]
    assert ks_2samp(max_vio(ranks[0]), max_vio(ranks[1])).pvalue > 0.01
    np.testing.assert_allclose(drawn.std(axis=0), seen.std(axis=0), rtol=0.25)
    # Independent tokens instead of sequences: the spread of a multinomial is far too small.
    independent = stream(2, "test").multinomial(256 * 16 * 4, law.rate / law.rate.sum(), size=SEEDS)
    assert independent.std(axis=0).mean() < 0.6 * seen.std(axis=0).mean()
    assert ks_2samp(max_vio(seen), max_vio(independent)).pvalue < 0.01
    wrong = CountLaw(law.rate, 0.7 * law.factor)
    assert ks_2samp(seen[:, 3], wrong.draw(stream(1, "test"), 256 * 16, SEEDS)[:, 3]).pvalue < 0.01


def test_a_run_records_its_resolution_and_repeats_itself() -> None:
    overrides = ["steps.resolution=count", "steps.pilot_ranks=4", "steps.count=3", "policies.1.balance=bias"]
    first, second = (sim.run(scenario(*overrides)) for _ in range(2))
    assert first.summary_rows["mean"][:5] == second.summary_rows["mean"][:5]
    assert first.layers.equals(second.layers)
    text = sim.report.terminal(first)
    assert "of each step's 16 ranks 4 are routed token by token" in text.replace("\n  ", " ")
    # A gate that stands still keeps its pilot; one that learns does not.
    assert rollout.token_layers_of(first.scenario, first.scenario.policies[0]) == 4 * 256
    assert rollout.token_layers_of(first.scenario, first.scenario.policies[1]) == 3 * 4 * 256


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("steps.pilot_ranks=16", "steps.pilot_ranks: must be < parallel.ep_size = 16"),
        ("policies.0.select=dense", "policies.0.select: select dense cannot be drawn"),
    ],
)
def test_what_cannot_be_drawn_is_refused(override: str, complaint: str) -> None:
    with pytest.raises(ScenarioError, match=complaint):
        scenario("steps.resolution=count", override)
