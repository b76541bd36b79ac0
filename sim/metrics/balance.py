"""Balance of expert and device loads, and the floors that chance alone puts under them."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from sim.gating.capacity.expert_capacity import places
from sim.tokens import F64


def max_vio(loads: npt.ArrayLike) -> F64:
    """MaxVio = max / mean - 1 over the last axis (arXiv 2408.15664, section 4.1); 0 where nothing was routed.

    >>> max_vio([1, 1, 4]).item()
    1.0
    """
    load = np.asarray(loads, dtype=np.float64)
    mean = load.mean(axis=-1)
    return np.where(mean > 0, load.max(axis=-1) / np.where(mean > 0, mean, 1.0) - 1.0, 0.0)


def coefficient_of_variation(loads: npt.ArrayLike) -> F64:
    """Standard deviation / mean over the last axis (population), 0 where nothing was routed."""
    load = np.asarray(loads, dtype=np.float64)
    mean = load.mean(axis=-1)
    return np.where(mean > 0, load.std(axis=-1) / np.where(mean > 0, mean, 1.0), 0.0)


def least_share(loads: npt.ArrayLike) -> F64:
    """Smallest load / mean load over the last axis: how far behind the least-updated expert is."""
    load = np.asarray(loads, dtype=np.float64)
    mean = load.mean(axis=-1)
    return np.where(mean > 0, load.min(axis=-1) / np.where(mean > 0, mean, 1.0), 0.0)


def starved_share(loads: npt.ArrayLike, below: float) -> F64:
    """Share of experts over the last axis whose load is less than ``below`` times the mean.

    >>> starved_share([0, 1, 50, 149], 0.1).item()
    0.5
    """
    load = np.asarray(loads, dtype=np.float64)
    return np.asarray((load < below * load.mean(axis=-1, keepdims=True)).mean(axis=-1))


def balancedness_sum(rank_loads: npt.ArrayLike) -> float:
    """vLLM's balancedness of [layers, ranks]: sum over layers of the mean / sum of the maximum."""
    load = np.asarray(rank_loads, dtype=np.float64)
    top = load.max(axis=-1).sum()
    return float(load.mean(axis=-1).sum() / top) if top > 0 else 1.0


def balancedness_mean(rank_loads: npt.ArrayLike) -> float:
    """SGLang's balancedness of [layers, ranks]: mean over layers of (mean + 1e-5) / (max + 1e-5)."""
    load = np.asarray(rank_loads, dtype=np.float64)
    return float(((load.mean(axis=-1) + 1e-5) / (load.max(axis=-1) + 1e-5)).mean())


@functools.lru_cache(maxsize=256)
def uniform_max_vio(n_tokens: int, n_experts: int, k: int) -> float:
    """Expected MaxVio of a gate that picks k of E experts uniformly at random: no stochastic gate can show less.

    Exact for independent experts, each Binomial(T, k/E): E[max] = sum over x of 1 - F(x)^E. The loads of one batch depend
    weakly on each other (they sum to T k); simulated for 8 of 256 that moves the maximum by less than 0.5 %.

    >>> round(uniform_max_vio(4096, 256, 8), 3)
    0.254
    """
    if n_tokens == 0 or k >= n_experts:
        return 0.0
    p = k / n_experts
    # Beyond 40 standard deviations there is nothing: many steps of many tokens need no array of all of them.
    reach = 40 * int((n_tokens * p) ** 0.5 + 1)
    low, high = max(0, int(n_tokens * p) - reach), min(n_tokens, int(n_tokens * p) + reach)
    pmf = _binomial(n_tokens, p) if low == 0 else _binomial_between(n_tokens, p, low, high)
    cdf = np.minimum(np.cumsum(pmf), 1.0)
    expected_max = low + float((1.0 - cdf**n_experts).sum())
    return expected_max / (n_tokens * p) - 1.0


def _binomial(n: int, p: float) -> F64:
    """P(X = x) for x = 0..n and 0 < p < 1, from logarithms by their recurrence; far tails underflow to 0 harmlessly."""
    x = np.arange(n, dtype=np.float64)
    steps = np.log((n - x) / (x + 1.0)) + np.log(p / (1.0 - p))
    pmf: F64 = np.exp(np.concatenate([[0.0], np.cumsum(steps)]) + n * np.log1p(-p))
    return pmf


def _binomial_between(n: int, p: float, low: int, high: int) -> F64:
    """As `_binomial` for x = low..high alone, which must hold all of the mass that matters."""
    x = np.arange(low, high, dtype=np.float64)
    log_pmf = np.concatenate([[0.0], np.cumsum(np.log((n - x) / (x + 1.0)) + np.log(p / (1.0 - p)))])
    weight = np.exp(log_pmf - log_pmf.max())
    pmf: F64 = weight / weight.sum()
    return pmf


@functools.lru_cache(maxsize=256)
def uniform_drop_rate(n_tokens: int, n_experts: int, k: int, capacity_factor: float) -> float:
    """Share of (token, expert) pairs that capacity drops where a gate picks k of E experts uniformly at random.

    E[max(X - C, 0)] / (T k / E) with X ~ Binomial(T, k/E), the load of an expert, and C = ceil(T k / E x capacity_factor)
    its places (`ExpertCapacity`); exact, whoever gets the places. No balanced but stochastic gate drops less.

    >>> [f"{uniform_drop_rate(4096, 256, 8, factor):.4%}" for factor in (1.0, 1.25)]
    ['3.4684%', '0.0076%']
    >>> f"{uniform_drop_rate(1024, 256, 8, 1.5):.4%}", f"{uniform_drop_rate(4096, 8, 2, 1.0):.4%}"
    ('0.0207%', '1.0796%')
    """
    if n_tokens == 0:
        return 0.0
    capacity = places(n_tokens, k, n_experts, capacity_factor)
    if k >= n_experts:
        return max(0, n_tokens - capacity) / n_tokens
    p = k / n_experts
    surplus = np.arange(1, n_tokens - capacity + 1, dtype=np.float64)
    return float((surplus * _binomial(n_tokens, p)[capacity + 1 :]).sum()) / (n_tokens * p)


def expected_groups_touched(n_experts: int, k: int, n_groups: int) -> float:
    """Mean number of equal groups that k distinct uniform experts touch: G (1 - C(E - E/G, k) / C(E, k)).

    >>> round(expected_groups_touched(256, 8, 8), 4)
    5.2947
    """
    size = n_experts // n_groups
    missed = 1.0
    for i in range(k):
        missed *= max(n_experts - size - i, 0) / (n_experts - i)
    return n_groups * (1.0 - missed)
