"""Balancing rules: laws of one update, and the loss-free paper's setting over 1,600 steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import rollout
from sim.gating import Gate, Gating
from sim.gating.balance import Seen
from sim.gating.balance.bias import Bias
from sim.gating.piece import GateShape
from sim.loading import load
from sim.metrics.balance import max_vio, uniform_max_vio
from sim.scenario import Scenario
from sim.tokens import I64, Tokens
from tests.strategies import seeds, toy_model

LOSS_FREE = Path(__file__).resolve().parents[1] / "scenarios" / "loss_free.yaml"
FROM_ZERO = 1e-15  # one rounding of a state near 1


def _counts(seed: int, parts: int = 1, ranks: int = 1, experts: int = 12) -> I64:
    """Loads of which some are exactly average: pairs move apart by the same amount."""
    rng = np.random.default_rng(seed)
    counts = np.full((parts, ranks, experts), 50, dtype=np.int64)
    for row in counts.reshape(-1, experts):
        for a, b in rng.permutation(experts)[: experts // 2 * 2].reshape(-1, 2)[: experts // 3]:
            moved = rng.integers(1, 50)
            row[a] += moved
            row[b] -= moved
    return counts


def _moved(rule: Bias, counts: I64, step: int = 0, gain: float = 1.0) -> np.ndarray:
    """The state after one update from the start, [E]."""
    shape = GateShape(counts.shape[-1], 3)
    return rule.update(rule.start(shape), Seen(counts), shape, step, gain)[0]


def biases() -> st.SearchStrategy[Bias]:
    return st.builds(
        Bias,
        bias_update_rate=st.sampled_from([0.0, 1e-4, 1e-3, 0.25]),
        rule=st.sampled_from(["sign", "proportional"]),
        form=st.sampled_from(["additive", "multiplicative"]),
        scope=st.sampled_from(["global_batch", "ep_group", "micro_batch"]),
    )


# --- the bias rule, one update ---


@given(biases(), seeds, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1.0, 20.0]))
def test_a_bias_moves_the_right_way_and_not_too_far(rule: Bias, seed: int, parts: int, ranks: int, gain: float) -> None:
    counts = _counts(seed, parts, ranks)
    move = _moved(rule, counts, gain=gain) - rule.start(GateShape(12, 3))[0]
    axes = {"global_batch": (0, 1), "ep_group": (1,), "micro_batch": ()}[rule.scope]
    loads = counts.sum(axis=axes).reshape(-1, 12)
    error = (loads.mean(axis=1, keepdims=True) - loads) / loads.mean(axis=1, keepdims=True)
    limit = rule.bias_update_rate * gain * (np.abs(error) if rule.rule == "proportional" else np.ones_like(error))
    assert (np.abs(move) <= limit.mean(axis=0) + FROM_ZERO).all()
    assert (np.abs(move[(error == 0).all(axis=0)]) == 0).all()  # exactly average: does not move
    one_sided = (error > 0).all(axis=0) | (error < 0).all(axis=0)
    if rule.bias_update_rate:
        assert (np.sign(move) == np.sign(error[0]))[one_sided].all()
    else:
        assert (move == 0).all()
    # Sum rule: sign moves add up to u x (underloaded - overloaded), proportional ones to nothing.
    total = np.sign(error).sum(axis=1).mean() if rule.rule == "sign" else 0.0
    assert move.sum() == pytest.approx(rule.bias_update_rate * gain * total, abs=1e-12)


@given(biases(), seeds)
def test_scopes_agree_when_there_is_one_group(rule: Bias, seed: int) -> None:
    counts = _counts(seed)
    moved = [
        _moved(rule.model_copy(update={"scope": scope}), counts)
        for scope in ("global_batch", "ep_group", "micro_batch")
    ]
    np.testing.assert_array_equal(moved[0], moved[1])
    np.testing.assert_array_equal(moved[0], moved[2])


def test_scopes_differ_where_groups_disagree() -> None:
    """Two ranks, each lopsided the other way: globally even, locally not; with three against one the sign is averaged."""
    counts = np.array([[[9, 1, 5], [1, 9, 5], [9, 1, 5]]])
    rule = Bias(bias_update_rate=0.3)
    np.testing.assert_allclose(_moved(rule, counts), [-0.3, 0.3, 0.0])
    together = rule.model_copy(update={"scope": "ep_group"})
    np.testing.assert_allclose(_moved(together, counts), [-0.3, 0.3, 0.0])  # one micro-batch on all ranks
    np.testing.assert_allclose(_moved(together, counts.transpose(1, 0, 2)), [-0.1, 0.1, 0.0])  # three on one rank
    local = rule.model_copy(update={"scope": "micro_batch"})
    np.testing.assert_allclose(_moved(local, counts), [-0.1, 0.1, 0.0])
    np.testing.assert_array_equal(_moved(local, counts[:, :2]), [0, 0, 0])


@given(seeds, st.sampled_from(["sign", "proportional"]), st.integers(2, 1000))
def test_only_relative_loads_matter(seed: int, name: str, factor: int) -> None:
    """The same step on a batch `factor` times as large (the paper leaves the scale of its error open)."""
    rule = Bias.model_validate({"kind": "bias", "rule": name})
    counts = _counts(seed)
    np.testing.assert_allclose(_moved(rule, factor * counts), _moved(rule, counts), rtol=1e-14)


def test_one_bias_per_modality() -> None:
    """Each modality's bias follows its own topics' loads; with one for all, opposite skews cancel."""
    shape = GateShape(3, 1, modalities=("text", "image", "text"))
    topics = np.array([[5, 0, 1], [0, 9, 3], [1, 0, 5]])
    seen = Seen(topics.sum(axis=0)[None, None], topics)
    rule = Bias(per="modality", bias_update_rate=0.5)
    state = rule.update(rule.start(shape), seen, shape, 0)
    assert state.tolist() == [[-0.5, 0.5, -0.5], [0.5, -0.5, 0.5]]  # text 6, 0, 6 of mean 4; image 0, 9, 3 of mean 4
    assert np.asarray(rule.adjust(state, shape).shift).tolist() == [
        state[0].tolist(),
        state[1].tolist(),
        state[0].tolist(),
    ]
    both = Bias(bias_update_rate=0.5)
    assert both.update(both.start(shape), seen, shape, 0).tolist() == [[0.5, -0.5, -0.5]]
    assert rule.problems(toy_model()) == []
    assert Bias(per="modality", scope="ep_group").problems(toy_model())[0][0] == "per"


def test_rate_over_steps() -> None:
    constant, linear = (
        Bias(bias_update_rate=0.5, stop_after_step=4),
        Bias(bias_update_rate=0.5, stop_after_step=4, decay="linear"),
    )
    assert [constant.rate(step) for step in range(6)] == [0.5, 0.5, 0.5, 0.5, 0.0, 0.0]
    assert [linear.rate(step) for step in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    assert Bias(bias_update_rate=0.5, decay="linear").rate(10**6) == 0.5  # nothing to fall towards
    for rule in (constant, linear):
        state = np.full((1, 3), 0.25)
        np.testing.assert_array_equal(rule.update(state, Seen(np.array([[[9, 0, 0]]])), GateShape(3, 1), 4), state)


def test_multiplicative_starts_at_one() -> None:
    rule = Bias(form="multiplicative")
    shape, state = GateShape(3, 1), np.array([[0.5, 1.0, 2.0]])
    assert rule.start(shape).tolist() == [[1, 1, 1]]
    move = rule.adjust(state, shape)
    assert np.asarray(move.scale).tolist() == [0.5, 1.0, 2.0] and move.shift == 0.0 and move.offset == 0.0
    move = Bias().adjust(state, shape)
    assert move.scale == 1.0 and np.asarray(move.shift).tolist() == [0.5, 1.0, 2.0] and move.offset == 0.0


def test_a_step_selects_with_the_bias_from_before_it() -> None:
    """Causality: routing a batch does not move the bias, the update after it does."""
    gate = Gate(Gating(balance=(Bias(bias_update_rate=1.0),)), toy_model(4, 1))
    tokens = Tokens(0, np.array([[2.0, 1.0, 0.0, -1.0]] * 3, np.float32), np.zeros(3, np.int32))
    for _ in range(2):
        assert gate.route(tokens).topk_ids.ravel().tolist() == [0, 0, 0]
    gate.update(Seen(np.array([[[3, 0, 0, 0]]])), 0)
    assert gate.route(tokens).topk_ids.ravel().tolist() == [1, 1, 1]
    assert gate.shift.tolist() == [-1.0, 1.0, 1.0, 1.0]


# --- arXiv 2408.15664, without training ---

WINDOW = 100


class Run:
    """Steps 0..1499 with a moving bias, 1500..1599 with the final one."""

    def __init__(self, scenario: Scenario, loads: I64, state: np.ndarray) -> None:
        self.moving = scenario.steps.count - WINDOW
        self.batch = max_vio(loads)  # per step
        self.loads = loads
        self.final_batch = float(self.batch[self.moving - WINDOW : self.moving].mean())
        self.final_global = float(max_vio(loads[self.moving :].sum(axis=0)))
        self.state = state


POLICIES = ("no balancing", "sign u=0.0001", "sign u=0.001", "sign u=0.01", "proportional u=0.001")


@pytest.fixture(scope="session")
def loss_free() -> dict[str, Run]:
    """The shipped scenario, all policies on the same tokens."""
    scenario = load(LOSS_FREE)
    indices = tuple(i for i, policy in enumerate(scenario.policies) if policy.name in POLICIES)
    assert len(indices) == len(POLICIES)
    return {
        scenario.policies[c.policy].name: Run(scenario, c.expert_tokens, c.state[0])
        for c in rollout.run(rollout.Task(scenario, indices, 0, range(1)))
    }


def test_without_balancing_a_few_experts_take_over(loss_free: dict[str, Run]) -> None:
    run = loss_free["no balancing"]
    assert run.final_global > 5 and run.final_batch > 5
    assert run.batch[:WINDOW].mean() == pytest.approx(run.final_batch, rel=0.02)  # and nothing changes


def test_the_published_rate_balances(loss_free: dict[str, Run]) -> None:
    """Sign rule, u = 0.001: the paper reports a global MaxVio of 0.044 (Table 3); here below 0.07 with the final bias.
    Per batch of 4,096 tokens chance alone leaves 0.12."""
    run = loss_free["sign u=0.001"]
    assert 0.02 < run.final_global < 0.07
    floor = uniform_max_vio(4096, 64, 6)
    assert floor == pytest.approx(0.12, abs=0.005)
    assert floor < run.final_batch < 1.25 * floor


def test_a_slow_rate_is_late_and_a_fast_one_noisy(loss_free: dict[str, Run]) -> None:
    slow, published, fast = (loss_free[f"sign u={u}"] for u in ("0.0001", "0.001", "0.01"))
    assert slow.final_global > 1 > 10 * published.final_global
    assert fast.final_global > 3 * published.final_global
    assert fast.final_batch > 1.5 * published.final_batch
    assert fast.batch[:WINDOW].mean() < published.batch[:WINDOW].mean() < slow.batch[:WINDOW].mean()  # but early
    assert np.abs(slow.state).max() == pytest.approx(0.15)  # 1,500 steps of u are as far as it could go


def test_the_floor_of_the_sign_rule_is_proportional_to_its_rate(loss_free: dict[str, Run]) -> None:
    """Near balance a bias dithers by u, which moves loads by about u (N/K) f(threshold) = 1.8 u / sigma, sigma the spread
    of an expert's score: the logit's 0.5 x the sigmoid's slope at -1.5, 0.149."""
    assert loss_free["sign u=0.01"].final_global == pytest.approx(1.8 * 0.01 / 0.075, rel=0.3)


def test_proportional_moves_settle_lower(loss_free: dict[str, Run]) -> None:
    assert loss_free["proportional u=0.001"].final_global < 0.5 * loss_free["sign u=0.001"].final_global


def test_imbalance_falls_all_the_way_down(loss_free: dict[str, Run]) -> None:
    """O12: means of ten steps fall without a break until the published rate is near its floor."""
    means = loss_free["sign u=0.001"].batch[:1500].reshape(-1, 10).mean(axis=1)
    settled = int(np.argmax(means < 0.2))
    assert 5 < settled < 40  # within 400 steps
    assert (np.diff(means[:settled]) < 0).all()
    assert means[settled:].max() < 0.2
    still = loss_free["no balancing"].batch[:1500].reshape(-1, 10).mean(axis=1)
    assert not (np.diff(still[:settled]) < 0).all()  # negative control
