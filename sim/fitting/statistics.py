"""Statistics of one layer of recorded routing: load, memory along sequences, co-activation, gate weights.

Definitions of the reference table (routing statistics, sections 1, 2, 4, 5, 7): consecutive batches are runs of tokens as
recorded, mixed ones the same after one permutation of all tokens; over-dispersion is the variance of an expert's load
between consecutive batches over the binomial one (median over experts); overlaps are shared experts / k; the latent
correlation at lag d is tetrachoric (what correlation of two normals, cut where the expert's own probability says,
selects it at both t and t + d), averaged over experts; co-activation compares pairs within a token with the product of
their marginals. Arrays in, floats out; nothing here knows what the experts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sim.fitting import counts
from sim.rng import stream
from sim.tokens import F32, F64, I16, I32, I64

BATCHES = (64, 256, 1024)
LAGS = (1, 2, 4, 8, 16, 32, 64)
MIN_BATCHES = 4
"""Batches below which a statistic over batches is not given."""
MIN_PAIRS = 1000
"""Pairs of tokens below which a lag is not given."""
MIN_SELECTIONS = 20
"""An expert selected less often has no latent correlation."""
NEAR_ZERO = {"latent_lag": 0.02, "domain_js": 0.005}
"""Statistics whose value may be near 0: absolute gaps that count as equal."""
TOLERANCE = 0.2

_SERIES = 16  # terms of the tetrachoric series


@dataclass(frozen=True, slots=True)
class Layout:
    """What all layers of a trace share: where sequences are, and which tokens are compared. Made by `layout`."""

    seqlens: I64
    order: I64
    """[N] the permutation of mixed batches."""
    partner: I64
    """[N] another token of the same sequence, drawn at random (itself in sequences of one token)."""
    start_of: I64
    """[N] where the token's sequence starts."""
    domain: I32 | None
    """[N] the token's domain, or None with fewer than two."""
    n_domains: int


def layout(seqlens: I64, domains: Sequence[str] | None = None, seed: int = 0) -> Layout:
    """Return the layout of sequences of ``seqlens`` tokens, with ``domains`` of each of them."""
    lengths = np.asarray(seqlens, dtype=np.int64)
    n_tokens = int(lengths.sum())
    start_of = np.repeat(np.cumsum(lengths) - lengths, lengths)
    rng = stream(seed, "fitting", "layout")
    order = rng.permutation(n_tokens)
    partner = start_of + (rng.random(n_tokens) * np.repeat(lengths, lengths)).astype(np.int64)
    names = sorted(set(domains or ()))
    domain = None
    if len(names) > 1:
        domain = np.repeat(np.array([names.index(name) for name in domains or ()], dtype=np.int32), lengths)
    return Layout(lengths, order, partner, start_of, domain, len(names))


def layer_statistics(topk_ids: I16, n_experts: int, where: Layout, topk_weights: F32 | None = None) -> dict[str, float]:
    """Return every statistic of one layer by name.

    topk_ids: [N, k] distinct expert ids; topk_weights: [N, k] gate weights, in any order within a token. Statistics that
    the trace is too short for are left out.

    >>> ids = np.array([[0, 1], [0, 2]] * 512, dtype=np.int16)
    >>> found = layer_statistics(ids, 4, layout(np.array([1024])))
    >>> round(found["max_vio"], 3), found["overlap_adjacent"], round(found["over_dispersion_64"], 3)
    (1.0, 0.5, 0.0)
    """
    n_tokens, k = topk_ids.shape
    ids = np.ascontiguousarray(topk_ids)
    chosen = counts.incidence(ids, n_experts)
    load = np.bincount(ids.ravel(), minlength=n_experts).astype(np.float64)
    share = load / n_tokens
    both, pairs = counts.repeats(ids, chosen, where.start_of, LAGS)
    found = {"load_cv": _cv(load), "max_vio": _max_vio(load)}
    found |= _batches(ids, share, n_experts, where.order)
    found["overlap_random"] = counts.shared(ids, chosen, where.order) / n_tokens / k
    if pairs[0] >= MIN_PAIRS:
        n_others = int((where.partner != np.arange(n_tokens)).sum())
        found["overlap_adjacent"] = float(both[0].sum() / pairs[0] / k)
        found["overlap_same_sequence"] = counts.shared(ids, chosen, where.partner) / n_others / k
    found |= _latent_lags(both, pairs, share, n_tokens)
    found |= _coactivation(counts.together(ids, n_experts), share)
    if topk_weights is not None:
        profile = weight_profile(topk_weights)
        found |= {f"weight_rank_{rank + 1}": float(value) for rank, value in enumerate(profile)}
    if where.domain is not None:
        found["domain_js"] = _mean_js(topk_ids, where, n_experts)
    return found


def weight_profile(topk_weights: F32) -> F64:
    """Return the mean gate weight of a token's best, second, ... expert, [k], of weights [N, k] in any order."""
    profile: F64 = np.sort(topk_weights, axis=1)[:, ::-1].mean(axis=0, dtype=np.float64)
    return profile


def equal(name: str, real: float, other: float) -> bool:
    """Whether ``other`` is within 20 % of ``real``, or within the absolute gap of statistics that may be near 0."""
    gap = abs(other - real)
    near = next((value for prefix, value in NEAR_ZERO.items() if name.startswith(prefix)), 0.0)
    return gap <= max(TOLERANCE * abs(real), near)


def plainly_equal(real: float, other: float) -> bool:
    """Whether ``other`` is within 20 % of ``real``, however near to 0 that is."""
    return abs(other - real) <= TOLERANCE * abs(real)


def share_within(real: Sequence[dict[str, float]], other: Sequence[dict[str, float]], *, plain: bool = False) -> float:
    """Return the share of (layer, statistic) pairs of ``real`` that ``other`` has too and `equal` accepts.

    plain: without absolute gaps for what is near 0.
    """
    verdicts = [
        plainly_equal(value, theirs[name]) if plain else equal(name, value, theirs[name])
        for mine, theirs in zip(real, other, strict=True)
        for name, value in mine.items()
        if name in theirs
    ]
    return float(np.mean(verdicts)) if verdicts else float("nan")


def _cv(load: npt.NDArray[Any]) -> float:
    return float((load.std(axis=-1) / load.mean(axis=-1)).mean())


def _max_vio(load: npt.NDArray[Any]) -> float:
    return float((load.max(axis=-1) / load.mean(axis=-1) - 1).mean())


def ep_sizes(n_experts: int) -> tuple[int, ...]:
    """Ranks of contiguous placement that the reference gives: 8, 16, 32 from 64 experts on, 4, 8, 16 below."""
    return tuple(ranks for ranks in ((8, 16, 32) if n_experts >= 64 else (4, 8, 16)) if n_experts % ranks == 0)


def _batches(ids: I16, share: F64, n_experts: int, order: I64) -> dict[str, float]:
    found: dict[str, float] = {}
    n_tokens, k = ids.shape
    for kind in ("consecutive", "mixed"):
        rows = ids if kind == "consecutive" else ids[order]
        loads: F64 = np.zeros((0, n_experts))
        for size in BATCHES:
            n_batches = n_tokens // size
            if n_batches < MIN_BATCHES:
                continue
            batch = np.repeat(np.arange(n_batches) * n_experts, size * k)
            flat = np.bincount(batch + rows[: n_batches * size].ravel(), minlength=n_batches * n_experts)
            loads = flat.reshape(n_batches, n_experts).astype(np.float64)
            found[f"load_cv_{kind}_{size}"] = _cv(loads)
            found[f"max_vio_{kind}_{size}"] = _max_vio(loads)
            if kind == "consecutive":
                binomial = size * share * (1 - share)
                used = binomial > 0
                if used.any():
                    found[f"over_dispersion_{size}"] = float(np.median(loads.var(axis=0)[used] / binomial[used]))
        if n_tokens // BATCHES[-1] >= MIN_BATCHES:
            for ranks in ep_sizes(n_experts):
                per_rank = loads.reshape(len(loads), ranks, -1).sum(axis=2)
                found[f"ep_rank_max_vio_{kind}_{ranks}"] = _max_vio(per_rank)
    return found


def _tetrachoric_terms(share: F64) -> F64:
    """Return a [_SERIES, E]: P(both) - p^2 = sum_n a_n rho^n, a_n = (phi(h) He_{n-1}(h))^2 / n!, h = probit(1 - p)."""
    from scipy.stats import norm

    cut = norm.isf(share)
    terms, before, hermite, factorial = [], np.zeros_like(cut), np.ones_like(cut), 1.0
    for n in range(1, _SERIES + 1):
        factorial *= n
        terms.append((norm.pdf(cut) * hermite) ** 2 / factorial)
        before, hermite = hermite, cut * hermite - (n - 1) * before
    return np.array(terms)


def _latent_lags(both: F64, pairs: I64, share: F64, n_tokens: int) -> dict[str, float]:
    used = (share * n_tokens >= MIN_SELECTIONS) & (share < 1)
    if not used.any() or pairs[0] < MIN_PAIRS:
        return {}
    grid = np.linspace(-0.9, 0.99, 190)
    powers = grid ** np.arange(1, _SERIES + 1)[:, None]
    excess = (_tetrachoric_terms(share[used])[:, :, None] * powers[:, None]).sum(axis=0)
    lowest = excess.argmin(axis=1)
    found = {}
    for lag, there, n_pairs in zip(LAGS, both, pairs, strict=True):
        if n_pairs < MIN_PAIRS:
            continue
        gap = there[used] / n_pairs - share[used] ** 2
        # Below the smallest value that the series takes, the correlation is the one of that value.
        rho = [np.interp(value, row[low:], grid[low:]) for value, row, low in zip(gap, excess, lowest, strict=True)]
        found[f"latent_lag_{lag}"] = float(np.mean(rho))
    return found


def _coactivation(pairs: I64, share: F64) -> dict[str, float]:
    upper = np.triu_indices(len(share), 1)
    together = pairs[upper].astype(np.float64)
    if together.sum() == 0:  # k = 1
        return {}
    independent = np.outer(share, share)[upper]
    together, independent = together / together.sum(), independent / independent.sum()
    lift = together[independent > 0] / independent[independent > 0]
    return {
        "coactivation_tv": float(0.5 * np.abs(together - independent).sum()),
        "coactivation_lift_p95": float(np.percentile(lift, 95)),
        "coactivation_lift_p99": float(np.percentile(lift, 99)),
    }


def js_bits(p: npt.ArrayLike, q: npt.ArrayLike) -> float:
    """Return the Jensen-Shannon divergence of two load vectors, in bits (0 = proportional, 1 = disjoint).

    >>> js_bits([1, 1], [2, 2]), js_bits([1, 0], [0, 3])
    (0.0, 1.0)
    """
    a, b = (np.asarray(load, dtype=np.float64) / np.sum(load) for load in (p, q))
    middle = (a + b) / 2

    def entropy(x: F64) -> float:
        positive = x[x > 0]
        return float(-(positive * np.log2(positive)).sum())

    return entropy(middle) - (entropy(a) + entropy(b)) / 2


def _mean_js(topk_ids: I16, where: Layout, n_experts: int) -> float:
    assert where.domain is not None
    flat = where.domain[:, None].astype(np.int64) * n_experts + topk_ids
    loads = np.bincount(flat.ravel(), minlength=where.n_domains * n_experts).reshape(where.n_domains, n_experts)
    loads = loads[loads.sum(axis=1) > 0]
    return float(np.mean([js_bits(loads[i], loads[j]) for i in range(len(loads)) for j in range(i)]))
