"""Gates against closed forms and published effects, on i.i.d. logits: no traffic model, no fitted constant."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sim.exchange import is_token_in_rank
from sim.gating.capacity import Asked
from sim.gating.capacity.expert_capacity import ExpertCapacity
from sim.gating.score.sigmoid import Sigmoid
from sim.gating.score.softmax import Softmax
from sim.gating.select import Candidates, Select
from sim.gating.select.expert_choice import leakage_bits_per_token_and_layer
from sim.gating.select.group_limited import GroupLimited
from sim.gating.select.random import Random
from sim.gating.select.topk import TopK
from sim.kernels.choose import choose
from sim.metrics.balance import coefficient_of_variation, expected_groups_touched, uniform_drop_rate
from sim.rng import stream
from sim.tokens import F32, I16
from sim.validation import Figure, Inputs

_TOKENS = 65_536
_KERNELS = choose(10**9)


def figures(inputs: Inputs) -> Iterator[Figure]:
    """Yield fan-out, limits on groups, loads and drops of chance, and what expert choice leaks."""
    yield from _fan_out()
    yield from _group_limits()
    yield from _chance()
    bits = 9 * leakage_bits_per_token_and_layer(16, 2)
    where = "arXiv 2408.15664, section 5.2: 9 layers, 16 experts, K = 2"
    yield Figure("expert choice: bits leaked per token", where, 50.0, bits, 0, "bit", relation="at_least")


def _normal(name: str, n_experts: int, n_tokens: int = _TOKENS) -> F32:
    return stream(0, "validate", name).standard_normal((n_tokens, n_experts), dtype=np.float32)


def _select(rule: Select, scores: F32, k: int) -> I16:
    one = np.ones(scores.shape[1], np.float32)
    return rule.select(Candidates(scores, one, 0 * one, k, _KERNELS, lambda: stream(0, "validate", "gate")))


def _groups(ids: I16, n_experts: int, n_groups: int) -> float:
    group = np.arange(n_experts, dtype=np.int32) // (n_experts // n_groups)
    return float(is_token_in_rank(ids, group, n_groups).sum(axis=1).mean())


def _fan_out() -> Iterator[Figure]:
    for n_experts, n_groups, k, what in (
        (256, 8, 8, "V3, nodes"),
        (256, 64, 8, "V3, devices"),
        (160, 8, 6, "V2, devices"),
    ):
        exact = expected_groups_touched(n_experts, k, n_groups)
        touched = _groups(_select(TopK(), _normal("fan-out", n_experts), k), n_experts, n_groups)
        closed = "closed form: G (1 - C(E - E/G, k) / C(E, k))"
        yield Figure(f"unrestricted top-{k} of {n_experts} touches ({what})", closed, exact, touched, 0.002)


def _group_limits() -> Iterator[Figure]:
    scores = Sigmoid().scores(_normal("v3", 256), _KERNELS)
    free, limited = (_select(rule, scores, 8) for rule in (TopK(), GroupLimited(n_group=8, topk_group=4)))
    same = (free[:, :, None] == limited[:, None, :]).any(axis=2).mean()
    kept = float(_KERNELS.picked(scores, limited).sum(dtype=float) / _KERNELS.picked(scores, free).sum(dtype=float))
    small = "independent simulation, i.i.d. normal logits"
    yield Figure("V3 rule (M = 4 of 8): nodes touched", small, 3.97, _groups(limited, 256, 8), 0.005)
    yield Figure("V3 rule: share of the unrestricted picks", small, 0.82, float(same), 0.01)
    yield Figure("V3 rule: share of their affinity", small, 0.994, kept, 0.001)
    scores = Softmax().scores(_normal("v2", 160), _KERNELS)
    best = _KERNELS.picked(scores, _select(TopK(), scores, 6)).sum(axis=1)
    for topk_group, published in ((1, 0.607), (2, 0.836), (3, 0.944), (4, 0.988), (5, 0.999)):
        ids = _select(GroupLimited(n_group=8, topk_group=topk_group, group_score="max"), scores, 6)
        share = float((_KERNELS.picked(scores, ids).sum(axis=1) / best).mean())
        yield Figure(
            f"V2 rule: mass kept with M = {topk_group} of 8",
            f"{small}; V2 report 2.2.2: M >= 3",
            published,
            share,
            0.005,
        )


def _chance() -> Iterator[Figure]:
    ids = _select(Random(), np.zeros((4096 * 64, 256), np.float32), 8).reshape(64, 4096, 8)
    loads = np.stack([_KERNELS.expert_tokens(part, 256) for part in ids])
    spread = float(coefficient_of_variation(loads).mean())
    binomial = "closed form: sqrt((1 - k/E) / (T k/E))"
    yield Figure("uniform gate, T = 4096, 8 of 256: load CV", binomial, 0.0870, spread, 0.02)
    for factor, printed in ((1.0, 0.03468), (1.25, 7.6e-5)):
        closed = uniform_drop_rate(4096, 256, 8, factor)
        where = "closed form: binomial overflow"
        yield Figure(f"capacity factor {factor:g}, T = 4096, 8 of 256: dropped", where, printed, closed, 0.005)
        rule, affinity = ExpertCapacity(capacity_factor=factor), np.ones((4096, 8), np.float32)
        kept = [rule.keep(Asked(part, affinity, np.zeros(4096, np.int32), 256, np.random.default_rng)) for part in ids]
        dropped = float(np.mean([(part < 0).mean() for part in kept]))
        bar = 0.02 if factor == 1 else 0.25  # some 160 of 2.1 million pairs: a relative error of 8 % is one sigma
        yield Figure("the same, tokens routed: dropped", where, closed, dropped, bar)
