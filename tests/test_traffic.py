"""Traffic: laws of the generator (determinism, equal bits, measured statistics) and of replay (slices, refusals)."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import sim
from sim.kernels import affinity as kernel
from sim.kernels import elementary
from sim.plugin import members
from sim.traces import checked
from sim.traces import npzfile as tracefile
from sim.traffic import Traffic, TrafficShape
from sim.traffic.affinity import Affinity, AffinityBatch, AffinitySource, fast_correlations
from sim.traffic.impute import Imputed, complete
from sim.traffic.layers import LayerProfile
from sim.traffic.mixture import Drift, Mixture, Oscillation, Shift, shifted
from sim.traffic.replay import Replay, read_trace
from sim.traffic.topics import Phase, Topic, cumulative, leaves
from sim.traffic.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[1]
SHAPE = TrafficShape(n_moe_layers=4, n_routed_experts=32, num_experts_per_tok=4, ep_size=4)


def ask(
    config: Affinity, layer: int, rank: int, *, phase: str = "train", step: int = 0, seed: int = 0, replica: int = 0
):
    batch = config.start(SHAPE, seed, replica).batch(phase, step, n_ranks=4, tokens_per_rank=config.tokens_per_rank)
    return batch.tokens(layer, rank)


def topk(logits: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]


def load_cv(ids: np.ndarray, n_experts: int) -> float:
    load = np.bincount(ids.ravel(), minlength=n_experts)
    return float(load.std() / load.mean())


def test_family_lists_both_members() -> None:
    assert {"affinity", "replay"} <= set(members(Traffic))


# ---------------------------------------------------------------- determinism and common random numbers


@settings(max_examples=15, deadline=None)
@given(order=st.permutations([(layer, rank) for layer in (0, 3) for rank in (0, 2)]), step=st.integers(0, 50))
def test_any_order_gives_the_tokens_of_a_fresh_call(order: list[tuple[int, int]], step: int) -> None:
    config = Affinity(tokens_per_rank=40, sequence_length=16)
    source = config.start(SHAPE, 7, 1)
    source.batch("warmup", 3, n_ranks=2, tokens_per_rank=8).tokens(1, 1)  # an unrelated question first
    batch = source.batch("train", step, n_ranks=4, tokens_per_rank=40)
    for layer, rank in order:
        fresh = ask(config, layer, rank, step=step, seed=7, replica=1)
        got = batch.tokens(layer, rank)
        assert got.logits.tobytes() == fresh.logits.tobytes()
        assert got.topic.tobytes() == fresh.topic.tobytes()
        assert got.logits.dtype == np.float32 and got.logits.shape == (40, 32) and got.rank == rank


def test_every_coordinate_changes_the_tokens() -> None:
    config = Affinity(tokens_per_rank=40)
    base: dict[str, Any] = {"layer": 0, "rank": 0, "phase": "train", "step": 0, "seed": 0, "replica": 0}
    changes = [{}, {"layer": 1}, {"rank": 1}, {"phase": "warmup"}, {"step": 1}, {"seed": 1}, {"replica": 1}]
    hashes = {ask(config, **(base | change)).logits.tobytes() for change in changes}
    assert len(hashes) == len(changes)


def test_forgetting_latents_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Affinity(tokens_per_rank=40)
    expected = [ask(config, 1, rank).logits.tobytes() for rank in (0, 1, 0)]
    monkeypatch.setattr("sim.traffic.affinity._LATENT_CACHE_BYTES", 1)
    batch = config.start(SHAPE, 0, 0).batch("train", 0, n_ranks=4, tokens_per_rank=40)
    assert [batch.tokens(1, rank).logits.tobytes() for rank in (0, 1, 0)] == expected
    assert len(batch._ranks) == 1


def test_popularity_is_the_models_not_the_steps() -> None:
    source = Affinity(latent_rank=0, iid_variance=0).start(SHAPE, 0, 0)
    rows = [source.batch("train", s, n_ranks=1, tokens_per_rank=3).tokens(2, 0).logits for s in (0, 9)]
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0][0], rows[0][1])
    other = Affinity(latent_rank=0, iid_variance=0).start(SHAPE, 0, 1)
    assert not np.array_equal(rows[0], other.batch("train", 0, n_ranks=1, tokens_per_rank=3).tokens(2, 0).logits)


# ---------------------------------------------------------------- equal bits


def both(config: Affinity, shape: TrafficShape, n_tokens: int, layer: int) -> tuple[bytes, bytes]:
    found = []
    for compiled in (False, True):
        source = config.start(shape, 3, 0)
        assert isinstance(source, AffinitySource)
        found.append(AffinityBatch(source, "train", 5, 1, n_tokens, compiled).tokens(layer, 0).logits.tobytes())
    return found[0], found[1]


@settings(max_examples=25, deadline=None)
@given(
    n_tokens=st.integers(1, 300),
    sequence_length=st.integers(1, 400),
    latent_rank=st.integers(0, 13),
    n_experts=st.integers(1, 70),
    dof=st.sampled_from([None, 3.0, 5.0, 30.0]),
    token_variance=st.sampled_from([0.0, 0.3]),
    layer=st.integers(0, 3),
)
def test_numpy_and_numba_agree_in_every_bit(
    n_tokens: int,
    sequence_length: int,
    latent_rank: int,
    n_experts: int,
    dof: float | None,
    token_variance: float,
    layer: int,
) -> None:
    pytest.importorskip("numba")
    config = Affinity(
        sequence_length=sequence_length, latent_rank=latent_rank, latent_dof=dof, token_variance=token_variance
    )
    plain, compiled = both(config, TrafficShape(4, n_experts, 1, 1), n_tokens, layer)
    assert plain == compiled


DIGEST = """
import hashlib, sys
from sim.traffic import TrafficShape
from sim.traffic.affinity import Affinity
config = Affinity(tokens_per_rank=300, sequence_length=50)
batch = config.start(TrafficShape(6, 256, 8, 2), 11, 2).batch("train", 4, n_ranks=2, tokens_per_rank=300)
digest = hashlib.sha256()
for layer in range(6):
    for rank in range(2):
        digest.update(batch.tokens(layer, rank).logits.tobytes())
print(digest.hexdigest(), "numba" in sys.modules)
"""


def digest_in_subprocess(**env: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DIGEST],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.split()


def test_equal_bits_without_cpu_features_and_under_other_hash_seeds() -> None:
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    usable = " ".join(f for f in __cpu_dispatch__ if __cpu_features__.get(f))
    plain = digest_in_subprocess(GATESIM_KERNELS="numpy")
    slow = digest_in_subprocess(GATESIM_KERNELS="numpy", NPY_DISABLE_CPU_FEATURES=usable, PYTHONHASHSEED="3")
    assert plain == slow
    assert plain[1] == "False"  # the NumPy path never loads Numba


def test_threads_give_the_tokens_of_one_thread() -> None:
    from concurrent.futures import ThreadPoolExecutor

    source = Affinity().start(SHAPE, 0, 0)
    pairs = [(layer, rank) for layer in range(4) for rank in range(4)] * 2
    alone = source.batch("train", 0, n_ranks=4, tokens_per_rank=64)
    expected = [alone.tokens(*pair).logits.tobytes() for pair in pairs]
    shared = source.batch("train", 0, n_ranks=4, tokens_per_rank=64)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda pair: shared.tokens(*pair).logits.tobytes(), pairs)) == expected


# ---------------------------------------------------------------- kernels against closed forms


@pytest.mark.parametrize("dof", [4.0, 5.0, 8.0, 1e6])
def test_heavy_tail_has_unit_variance_and_student_quantiles(dof: float) -> None:
    from scipy.stats import norm, t

    coefficients = kernel.heavy_tail(dof)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    values = sum(c * nodes ** (2 * i + 1) for i, c in enumerate(coefficients))
    assert np.isclose((weights / weights.sum() * values**2).sum(), 1.0, rtol=1e-12)
    x = np.linspace(-3, 3, 25)
    found = sum(c * x ** (2 * i + 1) for i, c in enumerate(coefficients))
    assert np.allclose(found, t.ppf(norm.cdf(x), dof) * np.sqrt((dof - 2) / dof), atol=0.02, rtol=0.06)


def test_heavy_tail_none_is_the_normal() -> None:
    x = np.linspace(-4, 4, 9, dtype=np.float32).reshape(3, 3)
    y = x.copy()
    kernel.stretch(y, kernel.heavy_tail(None), compiled=False)
    assert np.array_equal(x, y)


@given(rho=st.floats(0.01, 0.99), length=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_autoregression_is_its_recursion_and_restarts(rho: float, length: int) -> None:
    x = np.random.Generator(np.random.Philox(5)).standard_normal((20, 2)).astype(np.float32)
    y = x.copy()
    kernel.autoregress(y, rho, length, compiled=False)
    for t in range(20):
        expected = x[t] if t % length == 0 else rho * y[t - 1] + np.sqrt(1 - rho**2) * x[t]
        assert np.allclose(y[t], expected, atol=1e-6)


def test_combine_is_the_formula() -> None:
    rng = np.random.Generator(np.random.Philox(6))
    latents = rng.standard_normal((200, 3, 7), dtype=np.float32)
    basis, base = (rng.standard_normal((n, 20), dtype=np.float32) for n in (7, 2))
    noise, gains = (rng.standard_normal(shape, dtype=np.float32) for shape in (100, (3, 7)))
    topic, offset = rng.integers(2, size=200, dtype=np.int32), rng.integers(80, size=200)
    got = kernel.combine(base, topic, noise, offset, 0.3, latents, gains, basis, compiled=False)
    window = noise[offset[:, None] + np.arange(20)]
    expected = base[topic] + 0.3 * window + np.einsum("pr,tpr,re->te", gains, latents, basis)
    assert np.allclose(got, expected, atol=1e-5)


def test_noise_table_does_not_couple_neighbours_layers_or_experts() -> None:
    config = Affinity(latent_rank=0, popularity_sd=0, iid_variance=1, logit_scale=1, layer_profile=None)
    batch = config.start(SHAPE, 0, 0).batch("train", 0, n_ranks=1, tokens_per_rank=20_000)
    x, other = batch.tokens(0, 0).logits, batch.tokens(1, 0).logits
    bound = 4.5 / np.sqrt(x.size)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x[1:] * x[:-1]).mean()) < bound  # neighbouring tokens
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < bound  # neighbouring experts
    assert abs((x * other).mean()) < bound  # layers
    # No expert is favoured: load of independent top-4 is binomial.
    assert load_cv(topk(x, 4), 32) < 1.6 * np.sqrt((1 - 4 / 32) / (20_000 * 4 / 32))


def test_colliding_windows_in_one_layer_part_in_another() -> None:
    keys = np.random.Generator(np.random.Philox(8)).integers(2**32, size=20_000, dtype=np.uint32)
    first, second = (kernel.windows_of(keys, key, 12) for key in (0x9E3779B1, 0x85EBCA77))
    assert first.min() >= 0 and first.max() < 2**12
    twins = np.flatnonzero(first[1:] == first[:-1])
    assert len(twins) > 0
    assert (second[twins + 1] != second[twins]).all()


def kernel_by_expert(config: Affinity) -> np.ndarray:
    """Return the correlation of each expert's choice at neighbouring tokens, [E]."""
    ids = topk(ask(config.model_copy(update={"tokens_per_rank": 20_000}), 0, 0).logits, 4)
    chosen = selected(ids, 32) - selected(ids, 32).mean(axis=0)
    return np.asarray((chosen[1:] * chosen[:-1]).mean(axis=0) / chosen.var(axis=0))


def test_memory_spread_makes_experts_differ_in_memory_as_real_ones_do() -> None:
    alike = Affinity(
        sequence_length=2000,
        layer_profile=None,
        popularity_sd=0,
        sequence_variance=0,
        fast_variance=0.4,
        token_variance=0.28,
        latent_rank=16,
    )
    spread = alike.model_copy(update={"memory_spread": 3.0, "correlation_spread": 2.0})
    same, different = kernel_by_expert(alike), kernel_by_expert(spread)
    assert different.std() > 2 * same.std()
    # A token's variance is the same: no expert is chosen more often for what it listens to.
    ids = topk(ask(spread.model_copy(update={"tokens_per_rank": 20_000}), 0, 0).logits, 4)
    assert load_cv(ids, 32) < 0.25


def test_scale_spread_changes_gate_weights_and_no_choice() -> None:
    plain = Affinity(layer_profile=None, logit_mean=-1.0)
    uneven = plain.model_copy(update={"scale_spread": 0.5})
    first, second = (
        ask(config.model_copy(update={"tokens_per_rank": 4000}), 0, 0).logits for config in (plain, uneven)
    )
    assert np.array_equal(topk(first, 4), topk(second, 4))
    factor = ((second + 1) * (first + 1)).sum(axis=1) / ((first + 1) ** 2).sum(axis=1)
    assert np.allclose(second + 1, factor[:, None] * (first + 1), atol=1e-4)
    assert abs(np.log(factor).mean()) < 0.03 and abs(np.log(factor).std() - 0.5) < 0.03


def test_fast_correlations_keep_their_middle() -> None:
    assert np.array_equal(fast_correlations(0.4, 0.0, 5), np.full(5, 0.4))
    spread = fast_correlations(0.4, 3.0, 16)
    assert (
        np.isclose(spread[0], 0.4)
        and spread.min() > 0
        and spread.max() < 1
        and np.isclose(np.median(spread), 0.4, atol=0.07)
    )


def test_a_longer_prefix_begins_with_a_shorter_one_and_costs_no_more_than_its_tokens() -> None:
    endless = Affinity(
        sequence_length=10**12,
        prefix_length=10**12,
        layer_profile=None,
        vocabulary=Vocabulary(size=50),
        scale_spread=0.2,
        token_variance=0.2,
    )
    short, long = (ask(endless.model_copy(update={"tokens_per_rank": n}), 0, 0) for n in (50, 400))
    assert np.array_equal(short.logits, long.logits[:50])
    assert short.token_ids is not None and long.token_ids is not None
    assert np.array_equal(short.token_ids, long.token_ids[:50])
    source = endless.start(SHAPE, 0, 0)
    later = source.batch("train", 0, n_ranks=1, tokens_per_rank=400).tokens(0, 0).logits
    assert np.array_equal(source.batch("train", 1, n_ranks=1, tokens_per_rank=50).tokens(0, 0).logits, later[:50])


# ---------------------------------------------------------------- topics

TREE = (
    Topic(
        name="quantitative",
        weight=3,
        popularity_sd=0.3,
        children=(Topic(name="math", weight=1, popularity_sd=0.1), Topic(name="physics", weight=2, popularity_sd=0.1)),
    ),
    Topic(name="law", weight=1, popularity_sd=0.32),
)


def test_topic_weights_are_respected_per_sequence() -> None:
    config = Affinity(topic_tree=TREE, sequence_length=4)
    topic = config.start(SHAPE, 0, 0).batch("train", 0, n_ranks=1, tokens_per_rank=40_000).tokens(0, 0).topic
    assert config.topics == ("math", "physics", "law") and topic.dtype == np.int32
    assert (topic.reshape(-1, 4) == topic[::4, None]).all()
    share = np.bincount(topic[::4], minlength=3) / 10_000
    assert np.allclose(share, [0.25, 0.5, 0.25], atol=4.5 * 0.005)


def test_siblings_share_experts_and_strangers_do_not() -> None:
    config = Affinity(topic_tree=TREE, sequence_length=1)
    shape = TrafficShape(4, 256, 8, 1)
    batch = config.start(shape, 0, 0).batch("train", 0, n_ranks=1, tokens_per_rank=12_000)
    tokens = batch.tokens(3, 0)
    ids = topk(tokens.logits, 8)
    loads = [np.bincount(ids[tokens.topic == i].ravel(), minlength=256) for i in range(3)]
    close, far = np.corrcoef(loads)[0, 1:]
    assert close > 0.6 > 0.5 > far


def test_adding_a_topic_leaves_the_others_vectors_alone() -> None:
    def tables(tree: tuple[Topic, ...]) -> np.ndarray:
        source = Affinity(topic_tree=tree).start(SHAPE, 0, 0)
        assert isinstance(source, AffinitySource)
        return source.layer(2).base

    more = (*TREE, Topic(name="medicine"))
    assert np.array_equal(tables(more)[:3], tables(TREE))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 200))
def test_mixture_sums_to_one_at_every_step(weights: list[float], step: int) -> None:
    found = leaves(tuple(Topic(name=str(i), weight=w) for i, w in enumerate(weights)))
    shifts = (Shift(step=10, over_steps=50, weights={"0": 1}), Shift(step=120, weights={str(len(weights) - 1): 2}))
    shares = shifted(found, shifts, step)
    assert min(shares) >= 0 and np.isclose(sum(shares), 1)
    sums = cumulative(shares)
    assert sums[-1] == 1 and all(b >= a for a, b in itertools.pairwise(sums))
    if step >= 120:
        assert shares[-1] == 1
    if 60 <= step < 120:
        assert shares[0] == 1


def test_shift_switches_topics_at_its_step_and_only_in_training() -> None:
    config = Affinity(topic_tree=TREE, sequence_length=1, shifts=(Shift(step=2, weights={"law": 1}),))
    plain = Affinity(topic_tree=TREE, sequence_length=1)
    assert ask(config, 0, 0, step=1).logits.tobytes() == ask(plain, 0, 0, step=1).logits.tobytes()
    assert (ask(config, 0, 0, step=2).topic == 2).all()
    assert len(set(ask(config, 0, 0, step=2, phase="warmup").topic.tolist())) == 3


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"topic_tree": [{"name": "a"}, {"name": "a"}]}, "two topics are called 'a'"),
        ({"topic_tree": [{"name": "a", "children": [{"name": "b"}]}, {"name": "b"}]}, "two leaves are called 'b'"),
        ({"topic_tree": []}, "at least 1"),
        ({"shifts": [{"step": 1, "weights": {"nowhere": 1}}]}, "'nowhere' is no leaf"),
        ({"shifts": [{"step": 1, "weights": {"general": 0}}]}, "positive sum"),
        ({"layer_profile": {"depth": [0, 0.5]}}, "run from 0 to 1"),
        ({"layer_profile": {"depth": [0, 0.5, 0.5, 0.8, 1]}}, "increase"),
        ({"layer_profile": {"topic": [1, 1]}}, "one value per depth"),
        ({"layer_profile": {"temporal": [0, 0, 2, 0, 0]}}, "between 0 and 1"),
        ({"slow_correlation": 1.0}, "less than 1"),
        ({"tokens_per_rank": 0}, "greater than 0"),
    ],
)
def test_bad_configs_are_refused(bad: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Affinity.model_validate(bad)


def test_config_survives_its_own_dump() -> None:
    config = Affinity(topic_tree=TREE, shifts=(Shift(step=1, weights={"law": 1}),), layer_profile=None)
    assert Affinity.model_validate(config.model_dump(mode="json")) == config


def test_outside_the_batch_is_refused() -> None:
    batch = Affinity().start(SHAPE, 0, 0).batch("train", 0, n_ranks=2, tokens_per_rank=4)
    for layer, rank in ((-1, 0), (4, 0), (0, 2), (0, -1)):
        with pytest.raises(ValueError, match="4 layers, 2 ranks"):
            batch.tokens(layer, rank)


# ---------------------------------------------------------------- statistics (routing_statistics.md)


def batch_means(ids: np.ndarray, size: int, n_experts: int) -> tuple[float, float]:
    loads = [np.bincount(b.ravel(), minlength=n_experts) for b in np.array_split(ids, len(ids) // size)]
    return (
        float(np.mean([load.max() / load.mean() - 1 for load in loads])),
        float(np.mean([load.std() / load.mean() for load in loads])),
    )


@pytest.fixture(scope="module")
def chat() -> tuple[np.ndarray, np.ndarray]:
    """Section 8's setting: E=64, k=6, one topic, 40k tokens; sequences of 400 reproduce its consecutive column."""
    config = Affinity(sequence_length=400, layer_profile=None)
    shape = TrafficShape(1, 64, 6, 1)
    ids = [
        topk(config.start(shape, seed, 0).batch("train", 0, n_ranks=1, tokens_per_rank=40_000).tokens(0, 0).logits, 6)
        for seed in (1, 2)
    ]
    order = np.random.Generator(np.random.Philox(1)).permutation(40_000)
    return np.stack(ids), np.stack([i[order] for i in ids])


@pytest.mark.parametrize(
    ("size", "consecutive", "mixed_cv"),
    [(64, (2.8, 0.84), 0.46), (256, (2.0, 0.61), 0.32), (1024, (1.4, 0.46), 0.27)],
)
def test_load_statistics_of_section_8(
    chat: tuple[np.ndarray, np.ndarray], size: int, consecutive: tuple[float, float], mixed_cv: float
) -> None:
    runs, mixed = chat
    maxvio, cv = np.mean([batch_means(ids, size, 64) for ids in runs], axis=0)
    assert maxvio == pytest.approx(consecutive[0], rel=0.2)
    assert cv == pytest.approx(consecutive[1], rel=0.15)
    assert np.mean([batch_means(ids, size, 64)[1] for ids in mixed]) == pytest.approx(mixed_cv, rel=0.15)


def selected(ids: np.ndarray, n_experts: int) -> np.ndarray:
    chosen = np.zeros((len(ids), n_experts), dtype=np.float32)
    np.put_along_axis(chosen, ids, 1.0, axis=1)
    return chosen


def test_neighbours_overlap_and_experts_coactivate_as_in_section_8(chat: tuple[np.ndarray, np.ndarray]) -> None:
    runs, mixed = chat
    chosen, shuffled = selected(runs[0], 64), selected(mixed[0], 64)
    assert (chosen[1:] * chosen[:-1]).sum(axis=1).mean() / 6 == pytest.approx(0.31, abs=0.04)
    assert (shuffled[1:] * shuffled[:-1]).sum(axis=1).mean() / 6 == pytest.approx(0.10, abs=0.02)
    pairs = (chosen.T @ chosen)[np.triu_indices(64, 1)]
    rate = chosen.mean(axis=0)
    null = np.outer(rate, rate)[np.triu_indices(64, 1)]
    assert 0.5 * abs(pairs / pairs.sum() - null / null.sum()).sum() == pytest.approx(0.33, abs=0.05)


def test_consecutive_tokens_are_overdispersed_and_mixed_ones_are_not(chat: tuple[np.ndarray, np.ndarray]) -> None:
    """Variance of an expert's load between batches of 256 over binomial: 8 on real chat, 1 for independent tokens."""
    for ids, low, high in ((chat[0][0], 4, 20), (chat[1][0], 0.75, 1.25)):
        loads = np.stack([np.bincount(b.ravel(), minlength=64) for b in np.array_split(ids[:39936], 156)])
        rate = loads.mean(axis=0) / 256
        assert low < np.median(loads.var(axis=0) / (256 * rate * (1 - rate))) < high


def test_gaussian_full_rank_latents_lose_the_coactivation() -> None:
    """Negative control of the design: heavy tails and low rank are both needed (section 8, last lines)."""
    shape = TrafficShape(1, 64, 6, 1)

    def pair_distance(**change: Any) -> float:
        config = Affinity(layer_profile=None, **change)
        logits = config.start(shape, 1, 0).batch("train", 0, n_ranks=1, tokens_per_rank=20_000).tokens(0, 0).logits
        chosen = selected(topk(logits, 6), 64)
        pairs = (chosen.T @ chosen)[np.triu_indices(64, 1)]
        null = np.outer(chosen.mean(axis=0), chosen.mean(axis=0))[np.triu_indices(64, 1)]
        return float(0.5 * abs(pairs / pairs.sum() - null / null.sum()).sum())

    assert pair_distance(latent_dof=None, latent_rank=32) < 0.21 < 0.28 < pair_distance()


def test_narrow_domain_has_deepseek_v3s_skew() -> None:
    """V3 on GPQA: CV ~.78 [.58-1.26], the 32 hottest of 256 experts take 31 % [25-50] (section 1)."""
    config = Affinity(topic_tree=(Topic(name="gpqa", popularity_sd=0.23),), sequence_length=1)
    source = config.start(TrafficShape(58, 256, 8, 1), 0, 0)
    batch = source.batch("train", 0, n_ranks=1, tokens_per_rank=6000)
    cvs, shares = [], []
    for layer in (21, 28, 35, 42):
        load = np.bincount(topk(batch.tokens(layer, 0).logits, 8).ravel(), minlength=256)
        cvs.append(load.std() / load.mean())
        shares.append(np.sort(load)[-32:].sum() / load.sum())
    assert np.mean(cvs) == pytest.approx(0.78, abs=0.12)
    assert np.mean(shares) == pytest.approx(0.313, abs=0.04)


def test_layers_differ_as_measured() -> None:
    """The first layers remember little of the sequence; scale rises from 0.4 to about 1.1 and 1.5."""
    config = Affinity(sequence_length=400)
    source = config.start(TrafficShape(58, 64, 6, 1), 0, 0)
    batch = source.batch("train", 0, n_ranks=1, tokens_per_rank=8000)
    spread, overlap = {}, {}
    for layer in (0, 25, 57):
        logits = batch.tokens(layer, 0).logits
        spread[layer] = float(logits.std())
        chosen = selected(topk(logits, 6), 64)
        overlap[layer] = float((chosen[1:] * chosen[:-1]).sum(axis=1).mean() / 6)
    assert spread[0] == pytest.approx(0.41, rel=0.1)
    assert spread[25] == pytest.approx(1.12, rel=0.1)
    assert spread[57] == pytest.approx(1.55, rel=0.1)
    assert overlap[0] < 0.16 < 0.24 < overlap[25]


def test_one_layer_predicts_the_next() -> None:
    """Latents are shared by layers: the best guess from layer l beats chance widely, as measured (section 5)."""
    batch = Affinity(layer_profile=None).start(TrafficShape(2, 64, 6, 1), 0, 0)
    tokens = batch.batch("train", 0, n_ranks=1, tokens_per_rank=12_000)
    first, second = (selected(topk(tokens.tokens(layer, 0).logits, 6), 64) for layer in (0, 1))
    train, test = slice(0, 8000), slice(8000, None)
    given_first = first[train].T @ second[train] / np.maximum(first[train].sum(axis=0)[:, None], 1)
    guess = topk(first[test] @ given_first, 6)
    hits = np.take_along_axis(second[test], guess, axis=1).mean()
    popular = second[test][:, np.argsort(-second[train].sum(axis=0))[:6]].mean()
    assert hits > 0.35 and hits > 2 * popular


def test_rank_zero_setting_of_published_3_1() -> None:
    """z = popularity N(-1.5, 0.5) + 0.5 N(0, 1): unbalanced top-6 of 64 collapses (about 7 = [X] 7.15, one seed)."""
    config = Affinity(
        latent_rank=0, popularity_sd=0.5, iid_variance=0.25, logit_mean=-1.5, logit_scale=1.0, layer_profile=None
    )
    maxvios = []
    for seed in range(4):
        source = config.start(TrafficShape(1, 64, 6, 1), seed, 0)
        logits = source.batch("train", 0, n_ranks=1, tokens_per_rank=4096).tokens(0, 0).logits
        assert logits.mean() == pytest.approx(-1.5, abs=4 * 0.5 / 8)
        per_expert = logits.mean(axis=0)
        assert per_expert.std() == pytest.approx(0.5, abs=0.2)
        assert (logits - per_expert).std() == pytest.approx(0.5, abs=0.01)
        load = np.bincount(topk(logits, 6).ravel(), minlength=64)
        maxvios.append(load.max() / load.mean() - 1)
    assert 5 < np.mean(maxvios) < 9


def test_profile_interpolates_between_its_knots() -> None:
    profile = LayerProfile(depth=(0, 0.5, 1), logit_scale=(0, 1, 3), temporal=(0, 1, 1), topic=(2, 2, 2))
    assert [profile.at(layer, 5)[0] for layer in range(5)] == [0, 0.5, 1, 2, 3]
    assert profile.at(0, 1) == (1, 1, 2)


# ---------------------------------------------------------------- elementary functions


def test_elementary_functions_are_accurate() -> None:
    x = np.linspace(-100, 100, 2001)
    assert np.abs(elementary.exp(x) / np.exp(x) - 1).max() < 1e-14
    y = np.logspace(-290, 290, 2001)
    assert np.allclose(elementary.log(y), np.log(y), rtol=1e-14, atol=1e-15)
    assert np.abs(elementary.power(y[900:1100], -0.7) / y[900:1100] ** -0.7 - 1).max() < 1e-12
    assert max(abs(elementary.sine_of_turns(t) - np.sin(2 * np.pi * t)) for t in np.linspace(-3, 3, 601)) < 1e-13


# ---------------------------------------------------------------- vocabulary


def same_id_overlap(config: Affinity, layer: int) -> tuple[float, float]:
    """Share of experts in common of two occurrences of one id (each id counts once), and of two random tokens."""
    batch = config.start(TrafficShape(16, 64, 8, 1), 0, 0).batch("train", 0, n_ranks=1, tokens_per_rank=30_000)
    tokens = batch.tokens(layer, 0)
    chosen = selected(topk(tokens.logits, 8), 64)
    order = np.argsort(tokens.token_ids, kind="stable")
    ids = tokens.token_ids[order]
    pairs = np.flatnonzero(ids[1:] == ids[:-1])
    pairs = pairs[np.unique(ids[pairs], return_index=True)[1]]
    other = np.random.Generator(np.random.Philox(3)).permutation(len(chosen))
    return (
        float((chosen[order[pairs]] * chosen[order[pairs + 1]]).sum(axis=1).mean() / 8),
        float((chosen * chosen[other]).sum(axis=1).mean() / 8),
    )


def test_first_layers_route_by_identity_as_measured() -> None:
    """OLMoE layer 0: .39-.47 for one id, .16 for a random pair (section 7); the middle layers of the profile do not."""
    config = Affinity(sequence_length=512, vocabulary=Vocabulary())
    same, random = same_id_overlap(config, 0)
    assert 0.39 < same < 0.47 and random == pytest.approx(0.16, abs=0.04)
    assert same_id_overlap(config, 7)[0] < 0.22
    white, random = same_id_overlap(Affinity(sequence_length=512, vocabulary=Vocabulary(identity=0)), 0)
    assert white == pytest.approx(random, abs=0.02)  # control: ids that the routers do not read


def test_a_vocabulary_changes_the_token_part_only() -> None:
    """Topics, sequences, noise and the other parts stay: with `identity` 0 so does every logit."""
    plain, white = Affinity(tokens_per_rank=50), Affinity(tokens_per_rank=50, vocabulary=Vocabulary(identity=0))
    wordy = Affinity(tokens_per_rank=50, vocabulary=Vocabulary())
    assert ask(plain, 0, 1).token_ids is None
    assert ask(white, 0, 1).logits.tobytes() == ask(plain, 0, 1).logits.tobytes()
    assert ask(wordy, 0, 1).logits.tobytes() != ask(plain, 0, 1).logits.tobytes()
    no_token_part = {"layer_profile": None, "token_variance": 0.0, "tokens_per_rank": 50}
    with_words = ask(Affinity(vocabulary=Vocabulary(), **no_token_part), 0, 1)
    assert with_words.logits.tobytes() == ask(Affinity(**no_token_part), 0, 1).logits.tobytes()


def test_equal_ids_have_equal_token_parts_on_every_rank_and_step() -> None:
    config = Affinity(
        vocabulary=Vocabulary(size=5, identity=1), token_variance=1, iid_variance=0, layer_profile=None,
        sequence_variance=0, slow_variance=0, fast_variance=0, tokens_per_rank=40,
    )  # fmt: skip
    rows: dict[int, bytes] = {}
    for step, rank in ((0, 0), (0, 3), (7, 1)):
        tokens = ask(config, 2, rank, step=step)
        assert tokens.token_ids.dtype == np.int32
        for word, row in zip(tokens.token_ids.tolist(), tokens.logits, strict=True):
            assert rows.setdefault(word, row.tobytes()) == row.tobytes()
    assert len(rows) == 5 == len(set(rows.values()))


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 3000), zipf=st.floats(0, 2), offset=st.floats(0, 10))
def test_frequency_is_zipfs_law(size: int, zipf: float, offset: float) -> None:
    frequency = Vocabulary(size=size, zipf=zipf, offset=offset).frequency()
    rank = np.arange(1, size + 1)
    assert np.isclose(frequency.sum(), 1) and np.all(np.diff(frequency) <= 0)
    assert np.allclose(frequency / frequency[0], ((rank + offset) / (1 + offset)) ** -zipf, rtol=1e-10)


def test_ids_are_drawn_at_their_frequency() -> None:
    config = Affinity(tokens_per_rank=40_000, vocabulary=Vocabulary(size=50, zipf=1.2))
    ids = ask(config, 0, 0).token_ids
    expected = config.token_frequency * 40_000
    observed = np.bincount(ids, minlength=50)
    assert ((observed - expected) ** 2 / expected).sum() < 49 + 5 * np.sqrt(2 * 49)
    uniform = np.full(50, 800.0)  # control: another law is told apart
    assert ((observed - uniform) ** 2 / uniform).sum() > 1000


def test_traffic_without_words_has_no_frequency() -> None:
    assert Affinity().token_frequency is None
    assert Affinity(vocabulary=Vocabulary(size=7)).token_frequency.shape == (7,)


# ---------------------------------------------------------------- sequences, phases, modalities, generated topics


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 90), n_tokens=st.integers(1, 80))
def test_sequences_are_numbered(length: int, n_tokens: int) -> None:
    config = Affinity(topic_tree=TREE, sequence_length=length, tokens_per_rank=n_tokens)
    tokens = ask(config, 1, 2)
    assert tokens.sequence.dtype == np.int32
    assert np.array_equal(tokens.sequence, np.arange(n_tokens) // length)
    for number in np.unique(tokens.sequence):
        assert len(np.unique(tokens.topic[tokens.sequence == number])) == 1


def test_a_very_long_sequence_costs_no_more_than_its_tokens() -> None:
    found = ask(Affinity(sequence_length=10**15, tokens_per_rank=20), 1, 0)
    assert found.logits.tobytes() == ask(Affinity(sequence_length=20, tokens_per_rank=20), 1, 0).logits.tobytes()


PHASES = (Phase(name="think", share=3, popularity_sd=0.4), Phase(name="answer", share=1, popularity_sd=0.4))
REASONING = (
    Topic(name="math", weight=2, phases=PHASES),
    Topic(name="law", weight=1, phases=PHASES),
    Topic(name="chat", weight=1),
)


def test_phases_follow_each_other_in_a_sequence() -> None:
    config = Affinity(topic_tree=REASONING, sequence_length=40, tokens_per_rank=4000)
    assert config.topics == ("math/think", "math/answer", "law/think", "law/answer", "chat")
    topic = ask(config, 0, 0).topic.reshape(100, 40)
    for row in topic:
        assert set(row.tolist()) in ({0, 1}, {2, 3}, {4})
        assert (np.diff(row) >= 0).all()
        assert row[0] == 4 or abs((row == row[0]).sum() - 30) <= 1


@pytest.mark.parametrize("length", [1, 3, 7, 64])
def test_phases_have_their_shares_in_sequences_of_any_length(length: int) -> None:
    config = Affinity(topic_tree=REASONING[:1], sequence_length=length, tokens_per_rank=6720)
    share = float((ask(config, 0, 0).topic == 0).mean())
    assert share == pytest.approx(0.75, abs=4.5 * np.sqrt(0.75 * 0.25 / 6720))


def test_phases_leave_the_sequences_and_their_leaves_alone() -> None:
    bare = tuple(Topic(name=topic.name, weight=topic.weight) for topic in REASONING)
    with_phases = ask(Affinity(topic_tree=REASONING, sequence_length=8, tokens_per_rank=800), 0, 0).topic
    without = ask(Affinity(topic_tree=bare, sequence_length=8, tokens_per_rank=800), 0, 0).topic
    assert np.array_equal(np.array([0, 0, 1, 1, 2])[with_phases], without)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Jensen-Shannon bits between two load vectors."""
    p, q = first / first.sum(), second / second.sum()

    def entropy(x: np.ndarray) -> float:
        return float(-(x[x > 0] * np.log2(x[x > 0])).sum())

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def test_thinking_is_far_from_answering_and_alike_in_all_topics() -> None:
    """gpt-oss-20b on MMLU (E=32, k=4): .21 bits between think and answer, .11 and .05 between subjects in one phase."""
    phases = (Phase(name="think"), Phase(name="answer"))
    tree = tuple(Topic(name=name, popularity_sd=0.25, phases=phases) for name in ("math", "law"))
    config = Affinity(topic_tree=tree, sequence_length=100)
    found = []
    for seed in range(3):
        batch = config.start(TrafficShape(12, 32, 4, 1), seed, 0).batch("train", 0, n_ranks=1, tokens_per_rank=5000)
        for layer in range(12):
            tokens = batch.tokens(layer, 0)
            ids = topk(tokens.logits, 4)
            loads = [np.bincount(ids[tokens.topic == i].ravel(), minlength=32) for i in range(4)]
            found.append((distance(loads[0], loads[1]), distance(loads[0], loads[2]), distance(loads[1], loads[3])))
    phase, thinking, answering = np.mean(found, axis=0)
    assert phase == pytest.approx(0.21, abs=0.05)
    assert max(thinking, answering) < 0.12 < phase


def test_modalities_are_inherited() -> None:
    tree = (
        Topic(name="a"),
        Topic(
            name="pictures",
            modality="image",
            children=(Topic(name="b", phases=PHASES), Topic(name="c", modality="audio"), Topic(name="d", count=2)),
        ),
    )
    config = Affinity(topic_tree=tree)
    assert config.topics == ("a", "b/think", "b/answer", "c", "d-001", "d-002")
    assert config.modalities == ("text", "image", "image", "audio", "image", "image")
    assert Affinity.model_validate(config.model_dump(mode="json")).modalities == config.modalities


def test_a_count_stands_for_topics_of_zipf_sizes() -> None:
    tree = (Topic(name="english", weight=3), Topic(name="language", weight=1, count=101, popularity_sd=0.2))
    config = Affinity(topic_tree=tree)
    assert len(config.topics) == 102 and config.topics[1] == "language-001" and config.topics[101] == "language-101"
    shares = [leaf.probability for leaf in leaves(tree)]
    assert np.isclose(sum(shares), 1) and np.isclose(shares[0], 0.75)
    assert np.allclose(np.array(shares[1:]) / shares[1], 1 / np.arange(1, 102))
    source = config.start(SHAPE, 0, 0)
    fewer = Affinity(topic_tree=(tree[0], tree[1].model_copy(update={"count": 50}))).start(SHAPE, 0, 0)
    assert isinstance(source, AffinitySource) and isinstance(fewer, AffinitySource)
    assert np.array_equal(source.layer(1).base[:51], fewer.layer(1).base)  # the first keep their vectors
    assert len(np.unique(source.layer(1).base, axis=0)) == 102


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"topic_tree": [{"name": "a", "count": 5000}]}, "less than or equal to 4096"),
        ({"topic_tree": [{"name": n, "count": 4000} for n in "ab"]}, "at most 4096 leaves, found 8000"),
        ({"topic_tree": [{"name": "a", "count": 2, "children": [{"name": "b"}]}]}, "count is for topics without"),
        (
            {"topic_tree": [{"name": "a", "phases": [{"name": "p"}], "children": [{"name": "b"}]}]},
            "phases is for topics without",
        ),
        ({"topic_tree": [{"name": "a", "phases": [{"name": "p"}, {"name": "p"}]}]}, "two phases are called 'p'"),
        ({"topic_tree": [{"name": "a", "count": 2}, {"name": "a-002"}]}, "two leaves are called 'a-002'"),
        (
            {"topic_tree": [{"name": "a", "phases": [{"name": "p"}]}, {"name": "a/p"}]},
            "two leaves are called 'a/p'",
        ),
        (
            {
                "topic_tree": [
                    {"name": n, "phases": [{"name": "p", "popularity_sd": sd}]} for n, sd in (("a", 0.1), ("b", 0.2))
                ]
            },
            "phase p has popularity_sd 0.1 and 0.2",
        ),
        ({"oscillation": [{"topics": ["x"], "period_steps": 9, "amplitude": 1}]}, "oscillation: 'x' is no leaf"),
        ({"drift": {"sd": 1, "correlation_steps": 0}}, "greater than or equal to 0.01"),
        ({"vocabulary": {"size": 2**20}, "latent_rank": 100}, "must be at most 67108864, found 1048576 x 100"),
        *[
            ({name: 1e308}, "less than or equal to")
            for name in (
                "popularity_sd", "latent_dof", "sequence_variance", "slow_variance", "fast_variance",
                "token_variance", "iid_variance", "logit_mean", "logit_scale",
            )
        ],
        ({"topic_tree": [{"name": "a", "popularity_sd": 1e308}]}, "less than or equal to 10"),
        ({"memory_spread": 9}, "less than or equal to 8"),
        ({"correlation_spread": 9}, "less than or equal to 8"),
        ({"scale_spread": 2}, "less than or equal to 1"),
        ({"layer_profile": {"scale_spread": [2] * 5}}, "scale_spread must be at most 1"),
        ({"layer_profile": {"memory_spread": [9] * 5}}, "memory_spread must be at most 8"),
    ],
)  # fmt: skip
def test_bad_traffic_of_the_new_kinds_is_refused(bad: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Affinity.model_validate(bad)


def test_the_largest_values_allowed_still_give_finite_logits() -> None:
    largest = {name: 100.0 for name in ("sequence_variance", "slow_variance", "fast_variance", "iid_variance")}
    config = Affinity(
        popularity_sd=10, logit_mean=-1000, logit_scale=100, latent_dof=3, topic_tree=(Topic(name="a", popularity_sd=10),),
        vocabulary=Vocabulary(size=9), token_variance=100, tokens_per_rank=500, memory_spread=8, correlation_spread=8,
        scale_spread=1, **largest,
    )  # fmt: skip
    assert all(np.isfinite(ask(config, layer, 0).logits).all() for layer in range(4))


# ---------------------------------------------------------------- mixtures over time


def shares_of(config: Affinity, step: int | None, seed: int = 0, replica: int = 0) -> list[float]:
    source = config.start(SHAPE, seed, replica)
    assert isinstance(source, AffinitySource)
    return source.mixture.at(step)


MOVING = Affinity(
    topic_tree=TREE,
    drift=Drift(sd=0.7, correlation_steps=10),
    oscillation=(Oscillation(topics=("quantitative",), period_steps=24, amplitude=0.8),),
    shifts=(Shift(step=30, over_steps=10, weights={"law": 1, "quantitative": 1}),),
)


@settings(max_examples=15, deadline=None)
@given(steps=st.lists(st.integers(0, 120), min_size=1, max_size=6))
def test_moving_mixtures_are_pure_and_sum_to_one(steps: list[int]) -> None:
    source = MOVING.start(SHAPE, 3, 1)
    assert isinstance(source, AffinitySource)
    for step in steps:
        shares = source.mixture.at(step)
        assert shares == shares_of(MOVING, step, 3, 1)
        assert np.isclose(sum(shares), 1) and min(shares) > 0
    assert shares_of(MOVING, 50, 3, 2) != shares_of(MOVING, 50, 3, 1) != shares_of(MOVING, 50, 4, 1)


def test_warm_up_has_the_trees_weights_and_drift_starts_from_them() -> None:
    plain = Affinity(topic_tree=TREE, drift=Drift(sd=2, correlation_steps=5))
    assert np.allclose(shares_of(plain, 0), shares_of(plain, None), rtol=1e-12)
    assert np.allclose(shares_of(plain, None), [0.25, 0.5, 0.25])
    assert not np.allclose(shares_of(plain, 1), shares_of(plain, None), rtol=0.01)


def test_drift_is_an_ornstein_uhlenbeck_walk() -> None:
    tree = (Topic(name="t", count=2000, zipf=0),)
    drift = Drift(sd=0.5, correlation_steps=8)
    found = Mixture(leaves(tree), (), drift, (), 1, 0)
    for step in (1, 4, 40):
        expected = 0.25 * (1 - np.exp(-2 * step / 8))
        walk = found.walk(step)
        assert walk.var() == pytest.approx(expected, rel=5 * np.sqrt(2 / 2000))
        assert abs(walk.mean()) < 5 * np.sqrt(expected / 2000)
    correlation = np.corrcoef(found.walk(40), found.walk(48))[0, 1]
    assert correlation == pytest.approx(np.exp(-1), abs=0.1)
    assert abs(np.corrcoef(found.walk(40), found.walk(120))[0, 1]) < 0.12  # control: forgotten later


def test_a_topics_walk_does_not_depend_on_the_others() -> None:
    drift = Drift(sd=0.5, correlation_steps=8)
    few = Mixture(leaves(TREE), (), drift, (), 1, 0).walk(20)
    more = Mixture(leaves((*TREE, Topic(name="medicine"))), (), drift, (), 1, 0).walk(20)
    assert np.array_equal(more[:3], few)


def test_oscillation_moves_its_group_and_returns() -> None:
    config = Affinity(
        topic_tree=TREE, oscillation=(Oscillation(topics=("quantitative", "math"), period_steps=24, amplitude=0.8),)
    )
    nominal, day = shares_of(config, 0), shares_of(config, 6)
    assert np.allclose(nominal, [0.25, 0.5, 0.25]) and np.allclose(shares_of(config, 24), nominal)
    # Named twice, by itself and by its group, a leaf still moves once: odds against law by e^amplitude.
    for leaf in (0, 1):
        assert day[leaf] / day[2] == pytest.approx(nominal[leaf] / nominal[2] * np.exp(0.8))
    night = shares_of(config, 18)
    assert night[0] / night[2] == pytest.approx(np.exp(-0.8))


def test_a_shift_to_a_group_keeps_its_own_proportions() -> None:
    config = Affinity(topic_tree=TREE, shifts=(Shift(step=5, weights={"quantitative": 1, "law": 3}),))
    assert np.allclose(shares_of(config, 5), [1 / 12, 2 / 12, 9 / 12])


def test_topics_of_tokens_follow_the_mixture_and_common_random_numbers() -> None:
    still = Affinity(topic_tree=TREE, sequence_length=1, tokens_per_rank=4000)
    wave = Oscillation(topics=("law",), period_steps=4, amplitude=0.5)
    moving = still.model_copy(update={"oscillation": (wave,)})
    before, after = ask(still, 0, 0, step=1).topic, ask(moving, 0, 0, step=1).topic
    expected = shares_of(moving, 1)
    assert np.bincount(after, minlength=3) / 4000 == pytest.approx(expected, abs=4.5 * 0.008)
    moved = (before != after).mean()
    assert 0 < moved < 2.5 * abs(expected[2] - 0.25)  # only the sequences that must change
    assert np.array_equal(
        ask(moving, 0, 0, step=1, phase="warmup").topic, ask(still, 0, 0, step=1, phase="warmup").topic
    )


# ---------------------------------------------------------------- replay

E, K, LAYERS, TOKENS = 16, 3, 2, 60
REPLAY_SHAPE = TrafficShape(n_moe_layers=LAYERS, n_routed_experts=E, num_experts_per_tok=K, ep_size=2)


def good() -> dict[str, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(9))
    ids = rng.permuted(np.broadcast_to(np.arange(E, dtype=np.uint8), (LAYERS, TOKENS, E)), axis=2)[..., :K].copy()
    return {
        "topk_ids": ids,
        "topk_weights": rng.random((LAYERS, TOKENS, K)).astype(np.float16),
        "seqlens": np.array([20, 40], dtype=np.int32),
        "layers": np.array([3, 7], dtype=np.int32),
    }


def write(path: Path, arrays: dict[str, np.ndarray]) -> str:
    np.savez_compressed(path, **arrays)
    return str(path)


@pytest.mark.parametrize("order", ["consecutive", "mixed"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_replay_hands_out_the_array_once(tmp_path: Path, order: str, warmup: int) -> None:
    arrays = good()
    config = Replay.model_validate(
        {"path": write(tmp_path / "t.npz", arrays), "tokens_per_rank": 10, "order": order, "warmup_steps": warmup}
    )
    assert config.provides == "ids" and config.topics == ("replay",)
    source = config.start(REPLAY_SHAPE, 0, 0)
    steps = [("warmup", s) for s in range(warmup)] + [("train", s) for s in range(3 - warmup)]
    for layer in range(LAYERS):
        parts = [
            source.batch(phase, step, n_ranks=2, tokens_per_rank=10).tokens(layer, rank)
            for phase, step in steps
            for rank in range(2)
        ]
        ids = np.concatenate([p.topk_ids for p in parts])
        weights = np.concatenate([p.topk_weights for p in parts])
        assert ids.dtype == np.int16 and weights.dtype == np.float32 and parts[0].logits is None
        where = np.arange(TOKENS)
        if order == "mixed":
            where = source.order  # type: ignore[attr-defined]
            assert not np.array_equal(where, np.arange(TOKENS)) and np.array_equal(np.sort(where), np.arange(TOKENS))
        assert np.array_equal(ids, arrays["topk_ids"][layer][where])
        assert np.array_equal(weights, arrays["topk_weights"][layer][where].astype(np.float32))


def test_replay_never_wraps(tmp_path: Path) -> None:
    config = Replay(path=write(tmp_path / "t.npz", good()), tokens_per_rank=10)
    source = config.start(REPLAY_SHAPE, 0, 0)
    with pytest.raises(ValueError, match=r"holds 3 steps of 2 ranks x 10 tokens.* train step 3 asked for"):
        source.batch("train", 3, n_ranks=2, tokens_per_rank=10)
    with pytest.raises(ValueError, match=r"warm-up step 0 asked for, but traffic.warmup_steps keeps 0"):
        source.batch("warmup", 0, n_ranks=2, tokens_per_rank=10)
    with pytest.raises(ValueError, match="holds 0 steps"):
        Replay(path=config.path, tokens_per_rank=31).start(REPLAY_SHAPE, 0, 0)
    with pytest.raises(ValueError, match="2 layers, 2 ranks"):
        source.batch("train", 0, n_ranks=2, tokens_per_rank=10).tokens(2, 0)


def test_replay_chooses_layers_by_their_numbers(tmp_path: Path) -> None:
    arrays = good()
    path = write(tmp_path / "t.npz", arrays)
    source = Replay(path=path, tokens_per_rank=10, layers=(7, 3)).start(REPLAY_SHAPE, 0, 0)
    got = source.batch("train", 0, n_ranks=2, tokens_per_rank=10).tokens(0, 0).topk_ids
    assert np.array_equal(got, arrays["topk_ids"][1, :10])
    with pytest.raises(ValueError, match=r"layers: expected some of \[3, 7\], found \[9\]"):
        Replay(path=path, tokens_per_rank=10, layers=(3, 9)).start(REPLAY_SHAPE, 0, 0)
    with pytest.raises(ValueError, match=r"layers: expected 2 \(the model's\), found 1"):
        Replay(path=path, tokens_per_rank=10, layers=(3,)).start(REPLAY_SHAPE, 0, 0)
    with pytest.raises(ValueError, match=r"layers: expected 4 \(the model's\), found 2"):
        Replay(path=path, tokens_per_rank=10).start(TrafficShape(4, E, K, 2), 0, 0)


def altered(**change: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **(good() | change))


def with_value(name: str, index: tuple[int, ...], value: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        arrays = good()
        arrays[name] = arrays[name].astype(np.float32 if name == "topk_weights" else np.int64)
        arrays[name][index] = value
        np.savez(path, **arrays)

    return make


def raw_member(
    content: bytes, name: str = "topk_ids.npy", method: int = zipfile.ZIP_DEFLATED
) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr(name, content)

    return make


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def cut(keep: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        np.savez(path, **good())
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])

    return make


def flipped(path: Path) -> None:
    """One byte of the data changed: the CRC must notice."""
    np.savez(path, **good())
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)


def twice(path: Path) -> None:
    np.savez(path, **good())
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("topk_ids.npy", b"")


def many(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(70):
            archive.writestr(f"{i}.npy", b"")


def lying_bomb(path: Path) -> None:
    """The directory declares the size the header needs, the stream inflates to 64 MiB."""
    body = header((1, 60, 3)) + bytes(180)
    raw_member(body + bytes(2**26))(path)
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\1\2")
    struct.pack_into("<L", data, entry + 24, len(body))
    path.write_bytes(data)


def encrypted(path: Path) -> None:
    raw_member(header((1, 60, 3)) + bytes(180))(path)
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\1\2")
    for at in (6, entry + 8):
        data[at] |= 1
    path.write_bytes(data)


REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "object dtype": (altered(topk_ids=np.full((2, 60, 3), None, dtype=object)), "topk_ids: expected integers.*object"),
    "float ids": (altered(topk_ids=np.zeros((2, 60, 3))), "topk_ids: expected integers, found dtype float64"),
    "integer weights": (altered(topk_weights=np.ones((2, 60, 3), int)), "topk_weights: expected floats"),
    "two dimensions": (altered(topk_ids=np.zeros((60, 3), int)), r"topk_ids: expected 3 dimensions, found shape \(60"),
    "other k": (
        altered(topk_ids=np.broadcast_to(np.arange(4), (2, 60, 4)), topk_weights=np.ones((2, 60, 4))),
        "topk_ids: expected 3 experts per token.*found 4",
    ),
    "no tokens": (altered(topk_ids=np.zeros((2, 0, 3), int)), "topk_ids: expected at least one layer and one token"),
    "id too large": (with_value("topk_ids", (1, 5, 0), 16), r"topk_ids: expected ids in 0..15, found 16"),
    "huge id": (with_value("topk_ids", (1, 5, 0), 2**40), r"topk_ids: expected ids in 0..15, found 1099511627776"),
    "negative id": (with_value("topk_ids", (0, 0, 0), -1), r"topk_ids: expected ids in 0..15, found -1"),
    "duplicate expert": (altered(topk_ids=np.zeros((2, 60, 3), int)), "topk_ids: expected distinct experts"),
    "NaN weight": (with_value("topk_weights", (0, 1, 2), np.nan), "topk_weights: expected finite weights"),
    "infinite weight": (with_value("topk_weights", (0, 1, 2), np.inf), "topk_weights: expected finite weights"),
    "negative weight": (with_value("topk_weights", (0, 1, 2), -0.5), "topk_weights: expected weights of at least 0"),
    "weight beyond float32": (altered(topk_weights=np.full((2, 60, 3), 1e300)), "topk_weights: expected weights up to"),
    "weights of other shape": (altered(topk_weights=np.ones((2, 59, 3))), r"topk_weights: expected shape \(2, 60, 3\)"),
    "seqlens do not sum": (altered(seqlens=np.array([20, 41])), r"seqlens: expected a sum of 60.*found 61"),
    "seqlens overflow": (altered(seqlens=np.array([2**63, 2**63, 60], np.uint64)), "seqlens: expected a sum of 60"),
    "negative seqlens": (altered(seqlens=np.array([-20, 80])), "seqlens: expected lengths of at least 0"),
    "layers of other length": (altered(layers=np.arange(3)), r"layers: expected shape \(2,\), found \(3,\)"),
    "layers repeated": (altered(layers=np.array([1, 1])), "layers: expected distinct"),
    "other E": (altered(n_routed_experts=np.array(64)), "n_routed_experts: expected 16.*found 64"),
    "no ids": (lambda path: np.savez(path, other=np.zeros(3)), "topk_ids: expected an array.*found none"),
    "not a zip": (lambda path: path.write_bytes(b"PICKLE" * 50), "expected an npz"),
    "empty file": (lambda path: path.write_bytes(b""), "expected an npz"),
    "missing file": (lambda path: None, "expected a trace file, found none"),
    "a folder": (lambda path: path.mkdir(), "expected 1 to 1024 files"),
    "a pipe": (lambda path: os.mkfifo(path), "expected a trace file, found something else"),
    "truncated half": (cut(0.5), "expected an npz"),
    "truncated end": (cut(0.99), "expected an npz"),
    "flipped bit": (flipped, "topk_ids: expected .* found a damaged member"),
    "not an array": (raw_member(b"\x80\x04K\x01."), "topk_ids: expected a NumPy header"),
    "empty member": (raw_member(b""), "topk_ids: expected a NumPy header"),
    "header only": (raw_member(header((1, 60, 3))), "topk_ids: expected 308 bytes .* found 128 declared"),
    "10^12 elements": (raw_member(header((10**6, 10**5, 10))), r"topk_ids: expected 1000000000128 bytes"),
    "negative dimension": (raw_member(header((1, -60, 3))), "topk_ids: expected 3 dimensions"),
    "wide header": (raw_member(header((1, 60, 3), "|u1" + " " * 20000)), "topk_ids: expected a NumPy header"),
    "structured dtype": (altered(topk_ids=np.zeros((2, 60, 3), "i4,O")), "topk_ids: expected integers"),
    "lying zip bomb": (lying_bomb, "topk_ids: "),
    "other compression": (raw_member(header((1, 60, 3)), method=zipfile.ZIP_LZMA), "stored or deflated"),
    "encrypted": (encrypted, "topk_ids: expected a stored or deflated member"),
    "two of one name": (twice, "topk_ids: expected one array, found 2"),
    "many members": (many, "expected at most 64 arrays, found 70"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_malformed_traces_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    make, reason = REFUSALS[case]
    path = tmp_path / "bad.npz"
    make(path)
    with pytest.raises(ValueError, match=reason) as caught:
        read_trace(str(path), E, K)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_the_good_trace_is_accepted(tmp_path: Path) -> None:
    """The control of the refusals: unaltered, stored, deflated, Fortran-ordered and big-endian files are all read."""
    arrays = good()
    for i, ids in enumerate(
        (arrays["topk_ids"], np.asfortranarray(arrays["topk_ids"]), arrays["topk_ids"].astype(">i4"))
    ):
        np.savez(tmp_path / f"{i}.npz", **(arrays | {"topk_ids": ids}))
        trace = read_trace(str(tmp_path / f"{i}.npz"), E, K)
        assert np.array_equal(trace.topk_ids, arrays["topk_ids"]) and trace.layers == (3, 7)


def test_a_declared_bomb_is_refused_before_its_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, topk_ids=np.zeros((1, 2**20, 3), dtype=np.int64))
    monkeypatch.setattr(tracefile, "_data", lambda *_: pytest.fail("data was read"))
    limit = tracefile.Array("iu", 3)
    with pytest.raises(ValueError, match="topk_ids: expected at most 1000000 bytes, found 25165952 declared"):
        tracefile.read_npz(str(path), {"topk_ids": limit}, lambda _: None, max_array_bytes=1_000_000)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random bytes changed anywhere: the same trace, or ValueError; never another exception."""
    path = tmp_path_factory.getbasetemp() / "fuzz.npz"
    np.savez(path, **good())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        trace = read_trace(str(path), E, K)
    except ValueError:
        return
    assert trace.topk_ids.min() >= 0 and trace.topk_ids.max() < E


def test_replay_conserves_the_counts_of_a_real_trace(shared: Path) -> None:
    """DeepSeek-V2-Lite on law (ESFT): 8,327 tokens, 16 layers, E=64, k=6."""
    path = shared / "data" / "esft_deepseek_v2_lite" / "law_layers1-16.npz"
    shape = TrafficShape(n_moe_layers=16, n_routed_experts=64, num_experts_per_tok=6, ep_size=8)
    for order in ("consecutive", "mixed"):
        source = Replay.model_validate({"path": str(path), "tokens_per_rank": 128, "order": order}).start(shape, 0, 0)
        batches = [source.batch("train", step, n_ranks=8, tokens_per_rank=128) for step in range(8)]
        with pytest.raises(ValueError, match="holds 8 steps"):
            source.batch("train", 8, n_ranks=8, tokens_per_rank=128)
        with np.load(path) as raw:
            recorded = raw["topk_ids"]
        for layer in range(16):
            load = sum(
                np.bincount(batch.tokens(layer, rank).topk_ids.ravel(), minlength=64)
                for batch in batches
                for rank in range(8)
            )
            assert load.sum() == 8192 * 6
            if order == "consecutive":
                assert np.array_equal(load, np.bincount(recorded[layer, :8192].ravel(), minlength=64))
            else:  # all but the 135 tokens left over
                gap = np.bincount(recorded[layer].ravel(), minlength=64) - load
                assert gap.min() >= 0 and gap.sum() == 135 * 6


def test_digest_helper_would_notice_a_change() -> None:
    """Negative control of the digests: one flipped bit of one logit changes the hash."""
    logits = ask(Affinity(tokens_per_rank=8), 0, 0).logits
    before = hashlib.sha256(logits.tobytes()).hexdigest()
    logits.view(np.uint32)[3, 3] ^= 1
    assert hashlib.sha256(logits.tobytes()).hexdigest() != before


# ---------------------------------------------------------------- replay: sequences, domains, offsets, scores


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def scored(n_tokens: int = TOKENS, seed: int = 0) -> dict[str, np.ndarray]:
    """Generated logits, and what a recorder of the top k would have kept of them."""
    shape = TrafficShape(LAYERS, E, K, 1)
    config = Affinity(sequence_length=20, topic_tree=(Topic(name="law", popularity_sd=0.3),), layer_profile=None)
    batch = config.start(shape, seed, 0).batch("train", 0, n_ranks=1, tokens_per_rank=n_tokens)
    logits = np.stack([batch.tokens(layer, 0).logits for layer in range(LAYERS)])
    ids = np.stack([topk(layer, K) for layer in logits])
    return {
        "logits": logits,
        "topk_ids": ids,
        "topk_weights": np.take_along_axis(softmax(logits), ids, axis=2).astype(np.float16),
        "seqlens": np.full(n_tokens // 20, 20),
        "domain": np.array(["law", "math", "law"] * (n_tokens // 60)),
    }


def replayed(config: Replay, replica: int = 0, layer: int = 1) -> Any:
    source = config.start(TrafficShape(LAYERS, E, K, 1), 0, replica)
    return source.batch("train", 0, n_ranks=1, tokens_per_rank=config.tokens_per_rank).tokens(layer, 0)


def test_sequences_and_domains_of_the_file_are_handed_out(tmp_path: Path) -> None:
    path = write(tmp_path / "t.npz", scored())
    config = Replay(path=path, tokens_per_rank=30)
    assert config.topics == ("law", "math") and config.modalities == ("text", "text")
    source = config.start(TrafficShape(LAYERS, E, K, 2), 0, 0)
    second = source.batch("train", 0, n_ranks=2, tokens_per_rank=30).tokens(0, 1)
    assert second.topic.tolist() == [1] * 10 + [0] * 20
    assert second.sequence.tolist() == [0] * 10 + [1] * 20  # counted within the rank's batch
    mixed = replayed(Replay(path=path, tokens_per_rank=60, order="mixed"))
    assert np.bincount(mixed.topic).tolist() == [40, 20] and np.bincount(mixed.sequence).tolist() == [20, 20, 20]
    assert (np.diff(mixed.sequence) != 0).mean() > 0.4


def test_a_file_that_cannot_be_read_has_one_topic_until_it_is_started(tmp_path: Path) -> None:
    config = Replay(path=str(tmp_path / "later.npz"), tokens_per_rank=10)
    assert config.topics == ("replay",)
    write(tmp_path / "later.npz", scored())
    assert config.topics == ("law", "math")


def test_offset_rotates_each_replica_to_another_sequence(tmp_path: Path) -> None:
    arrays = scored()
    path = write(tmp_path / "t.npz", arrays)
    plain = [replayed(Replay(path=path, tokens_per_rank=60), r).topk_ids for r in range(2)]
    assert np.array_equal(plain[0], plain[1])  # what the option is for
    starts = set()
    for replica in range(3):
        ids = replayed(Replay(path=path, tokens_per_rank=60, offset="replica"), replica).topk_ids
        start = next(s for s in (0, 20, 40) if np.array_equal(np.roll(arrays["topk_ids"][1], -s, axis=0), ids))
        starts.add(start)
    assert starts == {0, 20, 40}
    with pytest.raises(ValidationError, match="offset is for consecutive order"):
        Replay(path=path, offset="replica", order="mixed")


def test_warm_up_of_any_batch_size_stays_within_what_is_kept(tmp_path: Path) -> None:
    arrays = good()
    config = Replay(path=write(tmp_path / "t.npz", arrays), tokens_per_rank=10, warmup_steps=1)
    source = config.start(REPLAY_SHAPE, 0, 0)
    warm = [source.batch("warmup", s, n_ranks=1, tokens_per_rank=4).tokens(0, 0).topk_ids for s in range(5)]
    train = source.batch("train", 0, n_ranks=2, tokens_per_rank=10).tokens(0, 0).topk_ids
    assert np.array_equal(np.concatenate([*warm, train]), arrays["topk_ids"][0, :30])
    for step, ranks, tokens in ((5, 1, 4), (0, 3, 10)):
        with pytest.raises(ValueError, match=r"keeps 1 train steps for it \(20 tokens"):
            source.batch("warmup", step, n_ranks=ranks, tokens_per_rank=tokens)


def test_recorded_logits_are_handed_out_exactly(tmp_path: Path) -> None:
    arrays = scored()
    config = Replay(path=write(tmp_path / "t.npz", arrays), tokens_per_rank=60, scores=True)
    tokens = replayed(config)
    assert config.provides == "logits" and tokens.logits.dtype == np.float32
    assert tokens.logits.tobytes() == arrays["logits"][1].tobytes()
    assert np.array_equal(topk(tokens.logits, K), tokens.topk_ids) and config.caveats == ()
    assert Replay(path=config.path).provides == "ids"


def test_recorded_softmax_scores_give_their_logits_back(tmp_path: Path) -> None:
    arrays = scored()
    del arrays["topk_weights"]
    logits = arrays.pop("logits")
    scores = softmax(logits).astype(np.float32)
    scores[1, 0] = np.eye(E)[3]  # as saturated as it gets
    tokens = replayed(
        Replay(path=write(tmp_path / "t.npz", arrays | {"scores": scores}), tokens_per_rank=60, scores=True)
    )
    assert np.allclose(softmax(tokens.logits), scores[1], atol=1e-6) and np.isfinite(tokens.logits).all()
    sigmoid = 1 / (1 + np.exp(-logits))
    config = Replay(path=write(tmp_path / "s.npz", arrays | {"scores": sigmoid}), tokens_per_rank=60, scores=True)
    with pytest.raises(ValueError, match="expected softmax scores that are at least 0 and sum to 1"):
        replayed(config)


def test_scores_of_a_file_without_them_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.npz", good())
    with pytest.raises(ValueError, match="with ids only no other gate can be judged, only placements"):
        replayed(Replay(path=path, tokens_per_rank=10, scores=True))
    with pytest.raises(ValidationError, match="exclude each other"):
        Replay(path=path, scores=True, impute=True)


def test_imputed_logits_keep_the_recorded_weights_and_put_the_rest_below(tmp_path: Path) -> None:
    arrays = scored()
    config = Replay(path=write(tmp_path / "t.npz", arrays), tokens_per_rank=60, impute=True)
    tokens = replayed(config)
    probabilities = softmax(tokens.logits)
    recorded = arrays["topk_weights"][1].astype(np.float64)
    assert config.provides == "logits" and "imputed" in config.caveats[0]
    assert np.allclose(np.take_along_axis(probabilities, tokens.topk_ids.astype(int), axis=1), recorded, rtol=1e-5)
    rest = tokens.logits.copy()
    np.put_along_axis(rest, tokens.topk_ids.astype(int), -np.inf, axis=1)
    lowest = np.take_along_axis(tokens.logits, tokens.topk_ids.astype(int), axis=1).min(axis=1)
    assert (rest.max(axis=1) < lowest).all()
    assert np.array_equal(np.sort(topk(tokens.logits, K)), np.sort(tokens.topk_ids))
    other = replayed(config, replica=1).logits  # another replica: other tail, same recorded weights
    assert not np.array_equal(other, tokens.logits)
    assert np.array_equal(topk(other, K), topk(tokens.logits, K))


def test_imputed_tokens_do_not_depend_on_how_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "t.npz", scored())
    whole = replayed(Replay(path=path, tokens_per_rank=60, impute=True)).logits
    source = Replay(path=path, tokens_per_rank=20, impute=True).start(TrafficShape(LAYERS, E, K, 3), 0, 0)
    batch = source.batch("train", 0, n_ranks=3, tokens_per_rank=20)
    parts = [batch.tokens(1, rank).logits for rank in (2, 0, 1)]
    assert np.concatenate([parts[1], parts[2], parts[0]]).tobytes() == whole.tobytes()


def test_the_imputed_tail_resembles_the_unseen_one() -> None:
    """E=64, k=6 on generated logits whose tail is known: weights by rank, and which experts come next."""
    shape = TrafficShape(1, 64, 6, 1)
    config = Affinity(sequence_length=400, topic_tree=(Topic(name="law", popularity_sd=0.3),), layer_profile=None)
    logits = config.start(shape, 5, 0).batch("train", 0, n_ranks=1, tokens_per_rank=4000).tokens(0, 0).logits
    ids = topk(logits, 6)
    weights = np.take_along_axis(softmax(logits), ids, axis=1)[None]
    trace = checked("generated", ids[None], topk_weights=weights, n_routed_experts=64)
    imputed = Imputed("generated", trace, 0, 0).logits(0, np.arange(4000))
    real, made = (np.sort(softmax(x), axis=1)[:, ::-1].mean(axis=0) for x in (logits, imputed))
    assert made[6:12] == pytest.approx(real[6:12], rel=0.15)
    assert made[[20, 40]] == pytest.approx(real[[20, 40]], rel=0.15)
    seventh_on = [np.bincount(topk(x, 12)[:, 6:].ravel(), minlength=64) for x in (logits, imputed)]
    assert np.corrcoef(seventh_on)[0, 1] > 0.9
    noise = np.random.Generator(np.random.Philox(0)).standard_normal((4000, 64))
    level = complete(ids.astype(np.int16), weights[0].astype(np.float32), np.exp(noise))
    unpopular = np.bincount(topk(level, 12)[:, 6:].ravel(), minlength=64)
    assert np.corrcoef(seventh_on[0], unpopular)[0, 1] < 0.7  # control: a tail that knows no popularity


def change_weights(change: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    arrays = scored()
    return arrays | {"topk_weights": change(arrays["topk_weights"].astype(np.float32))}


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (lambda: {k: v for k, v in scored().items() if k != "topk_weights"}, "impute expects recorded gate weights"),
        (lambda: change_weights(lambda w: w / w.sum(axis=2, keepdims=True)), "not renormalised.*median sum of 1,"),
        (lambda: change_weights(lambda w: 2.5 * w / w.sum(axis=2, keepdims=True)), "not renormalised.*sum of 2.5"),
        (lambda: change_weights(lambda w: w * (w > w.min())), "impute expects positive weights, found 0"),
        (lambda: change_weights(lambda w: w * 0.1), "cannot make up the sum to 1"),
    ],
)
def test_weights_that_cannot_be_completed_are_refused(
    tmp_path: Path, arrays: Callable[[], dict[str, np.ndarray]], reason: str
) -> None:
    config = Replay(path=write(tmp_path / "t.npz", arrays()), tokens_per_rank=60, impute=True)
    with pytest.raises(ValueError, match=reason) as caught:
        replayed(config)
    assert str(caught.value).startswith(config.path) and "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n_experts=st.integers(4, 24), k=st.integers(1, 3), scale=st.floats(0.01, 6))
def test_any_softmax_can_be_completed(data: st.DataObject, n_experts: int, k: int, scale: float) -> None:
    rng = np.random.Generator(np.random.Philox(data.draw(st.integers(0, 2**32))))
    probabilities = softmax(rng.standard_normal((6, n_experts)) * scale)
    ids = topk(probabilities, k)
    weights = np.take_along_axis(probabilities, ids, axis=1).astype(np.float32)
    logits = complete(ids.astype(np.int16), weights, np.exp(rng.standard_normal((6, n_experts))))
    assert np.isfinite(logits).all()
    assert np.array_equal(np.sort(topk(logits, k)), np.sort(ids))
    assert softmax(logits).max(axis=1) == pytest.approx(weights.max(axis=1), rel=2e-3)


def test_impute_on_a_real_trace(shared: Path) -> None:
    """DeepSeek-V2-Lite on law: softmax weights that sum to .39 (section 7); gpt-oss's are renormalised and refused."""
    path = shared / "data" / "esft_deepseek_v2_lite" / "law_layers1-16.npz"
    shape = TrafficShape(n_moe_layers=16, n_routed_experts=64, num_experts_per_tok=6, ep_size=1)
    config = Replay(path=str(path), tokens_per_rank=1024, impute=True)
    tokens = config.start(shape, 0, 0).batch("train", 1, n_ranks=1, tokens_per_rank=1024).tokens(9, 0)
    kept = np.take_along_axis(softmax(tokens.logits), tokens.topk_ids.astype(int), axis=1)
    assert np.allclose(kept, tokens.topk_weights, rtol=1e-4)
    assert np.array_equal(np.sort(topk(tokens.logits, 6)), np.sort(tokens.topk_ids))
    path = shared / "data" / "gptoss20b_fingerprint" / "mmlu_test_decode.npz"
    config = Replay(path=str(path), tokens_per_rank=64, impute=True, layers=(0, 1))
    assert len(config.topics) == 57
    with pytest.raises(ValueError, match="were not renormalised"):
        config.start(TrafficShape(2, 32, 4, 1), 0, 0)


@pytest.mark.parametrize("parts", [1, 2])
def test_replay_in_mixed_order_runs_and_judges_what_capacity_drops(tmp_path: Path, parts: int) -> None:
    """Whole runs: sequences are no runs of tokens in mixed order; what is dropped is not kept affinity."""
    arrays = good()
    path = write(tmp_path / "t.npz", arrays)
    text = {
        "name": "mixed",
        "model": {
            "name": "toy", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 64, "num_attention_heads": 2,
            "n_routed_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": 64, "scoring_func": "softmax",
        },
        "cluster": {"extends": "scenarios/clusters/h100.yaml", "nodes": 1},
        "traffic": {"kind": "replay", "path": path, "tokens_per_rank": 60, "order": "mixed"},
        "schedule": {"micro_batches": parts},
        "steps": {"timed": "none"},
        "policies": [
            {"name": "all", "select": "recorded"},
            {"name": "few", "select": "recorded", "capacity": {"kind": "expert_capacity", "capacity_factor": 0.5}},
        ],
    }  # fmt: skip
    result = sim.run(text)
    every, few = (result.steps[result.steps.policy == name].iloc[0] for name in ("all", "few"))
    assert every.kept_affinity == 1.0 and every.dropped_share == 0.0 and every.max_vio_sequence > 0
    assert few.dropped_share > 0.2 and 0.2 < few.kept_affinity < 0.9
