"""Metrics against closed forms, worked examples and simulation."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import sim.metrics.balance
from sim.gating.select.random import Random
from sim.metrics.balance import (
    balancedness_mean,
    balancedness_sum,
    coefficient_of_variation,
    expected_groups_touched,
    least_share,
    max_vio,
    uniform_max_vio,
)
from sim.tokens import I64
from tests.strategies import KERNELS, candidates

loads = arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(0, 1000))
PER_LAYER = pytest.mark.parametrize(
    "metric", [max_vio, coefficient_of_variation, least_share], ids=lambda m: m.__name__
)


def _uniform_loads(n_tokens: int, n_experts: int, k: int, seed: int) -> I64:
    scores = np.broadcast_to(np.float32(0), (n_tokens, n_experts))
    ids = Random().select(candidates(scores, k, seed=seed))
    return KERNELS["numpy"].expert_tokens(ids, n_experts)


def test_worked_examples() -> None:
    result = doctest.testmod(sim.metrics.balance)
    assert result.attempted >= 3 and result.failed == 0


@PER_LAYER
@given(layers=loads, factor=st.sampled_from([2, 3, 64]))
def test_scale_order_and_layers_do_not_matter(metric: object, layers: I64, factor: int) -> None:
    """Ten times the tokens with the same shares, experts in another order, or layers one by one: the same figures."""
    assert callable(metric)
    found = metric(layers)
    assert found.shape == (len(layers),) and np.isfinite(found).all()
    np.testing.assert_allclose(metric(layers * factor), found, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(metric(layers[:, ::-1]), found, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose([metric(row) for row in layers], found, rtol=1e-12, atol=1e-12)


@given(loads)
def test_bounds(layers: I64) -> None:
    n = layers.shape[1]
    routed = layers.sum(axis=1) > 0
    assert (max_vio(layers) >= -1e-12).all() and (max_vio(layers) <= n - 1 + 1e-9).all()
    assert (coefficient_of_variation(layers) <= math.sqrt(n - 1) + 1e-9).all()
    assert (least_share(layers) <= 1 + 1e-12).all()
    even = routed & (np.ptp(layers, axis=1) == 0)
    for metric, value in ((max_vio, 0), (coefficient_of_variation, 0), (least_share, 1)):
        assert (metric(layers)[even] == value).all()
        assert (metric(layers)[~routed] == 0).all()


def test_by_hand() -> None:
    assert max_vio([2, 4, 6]) == 0.5
    assert coefficient_of_variation([2, 4, 6]) == pytest.approx(math.sqrt(8 / 3) / 4)
    assert least_share([2, 4, 6]) == 0.5
    assert max_vio([[0, 0, 0, 8], [2, 2, 2, 2]]).tolist() == [3.0, 0.0]


def test_two_definitions_of_balancedness() -> None:
    """vLLM divides sums over layers, SGLang averages ratios: on two layers, one even and one on a single rank, that is
    11 / 21 against (1 + 0.5) / 2."""
    example = np.array([[1, 1], [0, 20]])
    assert balancedness_sum(example) == pytest.approx(11 / 21) == pytest.approx(0.524, abs=5e-4)
    assert balancedness_mean(example) == pytest.approx(0.75, abs=1e-5)
    assert balancedness_sum(np.zeros((2, 3))) == balancedness_mean(np.zeros((2, 3))) == 1.0
    even = np.full((4, 8), 3)
    assert balancedness_sum(even) == balancedness_mean(even) == 1.0


@given(loads)
def test_balancedness_of_one_layer_is_one_over_one_plus_max_vio(layers: I64) -> None:
    layer = layers[:1]
    if layer.sum():
        assert balancedness_sum(layer) == pytest.approx(1 / (1 + max_vio(layer)[0]))
        assert balancedness_mean(layer) == pytest.approx(balancedness_sum(layer), abs=2e-5)
    assert balancedness_sum(layers * 5) == pytest.approx(balancedness_sum(layers))


# max/mean of 6000, 3000, 1500 and 300 batches of the random gate, and three standard errors; rounder Monte-Carlo figures
# (2.57, 1.54, 1.257, 1.126) lie within 3 % of them.
MAX_OVER_MEAN = [(128, 2.6387, 0.0108), (1024, 1.5262, 0.0045), (4096, 1.2546, 0.0028), (16384, 1.1246, 0.0031)]


@pytest.mark.parametrize(("n_tokens", "simulated", "tolerance"), MAX_OVER_MEAN)
def test_floor_of_max_vio(n_tokens: int, simulated: float, tolerance: float) -> None:
    """8 of 256 at four batch sizes, against long simulations and a few fresh batches of the random gate."""
    floor = uniform_max_vio(n_tokens, 256, 8)
    assert 1 + floor == pytest.approx(simulated, abs=tolerance)
    assert 1 + floor == pytest.approx({128: 2.57, 1024: 1.54, 4096: 1.257, 16384: 1.126}[n_tokens], rel=0.03)
    runs = [float(max_vio(_uniform_loads(n_tokens, 256, 8, seed))) for seed in range(max(12, 20_000 // n_tokens))]
    error = np.std(runs, ddof=1) / math.sqrt(len(runs))
    assert np.mean(runs) == pytest.approx(floor, abs=4 * error)


@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "maximum"), [(256, 256, 4.7666), (4096, 64, 83.5025), (4096, 256, 28.4117)]
)
def test_floor_for_one_expert_per_token(n_tokens: int, n_experts: int, maximum: float) -> None:
    """Balls into bins, exact values by truncated-Poisson convolution."""
    found = (1 + uniform_max_vio(n_tokens, n_experts, 1)) * n_tokens / n_experts
    assert found == pytest.approx(maximum, rel=0.01)


def test_floor_at_the_ends() -> None:
    assert uniform_max_vio(0, 8, 2) == uniform_max_vio(100, 8, 8) == 0.0
    assert uniform_max_vio(1, 8, 2) == pytest.approx((1 - 0.75**8) / 0.25 - 1)  # independent experts, one token
    assert uniform_max_vio(10**6, 64, 6) < 0.01
    falls = [uniform_max_vio(n, 64, 6) for n in (10, 100, 1000, 10_000)]
    assert falls == sorted(falls, reverse=True)


def test_load_cv_of_uniform_routing() -> None:
    """Each load is Binomial(T, k/E): CV = sqrt((1 - k/E) / (T k / E)) = 0.0870 at T = 4096, 8 of 256."""
    expected = math.sqrt((1 - 8 / 256) / (4096 * 8 / 256))
    assert expected == pytest.approx(0.0870, abs=5e-5)
    found = [float(coefficient_of_variation(_uniform_loads(4096, 256, 8, seed))) for seed in range(8)]
    # A standard deviation estimated from n loads has relative error 1 / sqrt(2 n).
    assert np.mean(found) == pytest.approx(expected, abs=4 * expected / math.sqrt(2 * 256 * 8))


GROUPS = [((256, 8, 8), 5.294652), ((256, 8, 32), 7.266800), ((256, 8, 64), 7.675750), ((160, 6, 8), 4.458600)]


@pytest.mark.parametrize(("case", "mean"), GROUPS)
def test_expected_groups(case: tuple[int, int, int], mean: float) -> None:
    assert expected_groups_touched(*case) == pytest.approx(mean, abs=5e-7)
    n_experts, k, n_groups = case
    size = n_experts // n_groups
    closed = n_groups * (1 - math.comb(n_experts - size, k) / math.comb(n_experts, k))
    assert expected_groups_touched(*case) == pytest.approx(closed, rel=1e-12)


def test_expected_groups_at_the_ends() -> None:
    assert expected_groups_touched(16, 1, 4) == pytest.approx(1.0)
    assert expected_groups_touched(16, 16, 4) == expected_groups_touched(16, 13, 4) == 4.0
    assert expected_groups_touched(16, 5, 16) == pytest.approx(5.0)
    assert expected_groups_touched(16, 5, 1) == 1.0
