"""Count level against token level: blocks and draws, two-sample tests over 200 batches and 200 seeds, whole runs."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chi2, ks_2samp, levene, ttest_1samp, ttest_ind

import sim
import sim.countlevel
import sim.report
from sim import rollout
from sim.conservation import ConservationError
from sim.countlevel import BLOCKS_PER_PART, Cut, block_counts, draw, joined, noise_of_a_step
from sim.estimate import estimate
from sim.exchange import dispatch_layout
from sim.gating import Gate
from sim.gating.balance import Seen
from sim.kernels import plain
from sim.loading import load
from sim.metrics.balance import max_vio, uniform_max_vio
from sim.rng import stream
from sim.rollout import Task
from sim.scenario import Scenario
from sim.tally import Counts
from sim.tokens import F64, I64
from sim.yamlfile import ScenarioError
from tests.strategies import seeds
from tests.test_determinism import fresh, in_process

SAMPLES = 200
FAMILY = 0.01
"""Probability that a family of tests, divided among its members by Bonferroni's rule, fails without a reason."""


def test_worked_examples() -> None:
    result = doctest.testmod(sim.countlevel)
    assert result.attempted > 0 and result.failed == 0


# --- blocks ---


@st.composite
def ranks_of_tokens(draw_: st.DrawFn) -> tuple[np.ndarray, int]:
    """Sequence [T] of each token of a rank, of equal lengths but perhaps the last or of any, and micro-batches."""
    parts, size = draw_(st.sampled_from([1, 2, 3, 4])), draw_(st.integers(1, 24))
    if draw_(st.booleans()):
        length = draw_(st.integers(1, parts * size))
        return np.arange(parts * size, dtype=np.int32) // length, parts
    jumps = draw_(st.lists(st.booleans(), min_size=parts * size, max_size=parts * size))
    return np.cumsum(jumps).astype(np.int32), parts


@given(ranks_of_tokens())
def test_blocks_end_where_sequences_and_micro_batches_end(given_: tuple[np.ndarray, int]) -> None:
    sequence, micro_batches = given_
    n_tokens = len(sequence)
    size = n_tokens // micro_batches
    cut = Cut.of(sequence, n_tokens, micro_batches)
    assert 1 <= cut.per_part <= BLOCKS_PER_PART and cut.cell * cut.per_part == size
    assert (cut.parts == 1 or cut.per_part == 1) and micro_batches % cut.parts == 0
    block = cut.cell * cut.parts
    ends = np.arange(block, n_tokens, block)
    assert (sequence[ends] != sequence[ends - 1]).all()


def test_cuts() -> None:
    """Short sequences are put together, long ones hold micro-batches together, odd ones the whole rank."""

    def cut(length: int, n_tokens: int, micro_batches: int) -> Cut:
        return Cut.of(np.arange(n_tokens, dtype=np.int32) // length, n_tokens, micro_batches)

    assert cut(1, 4096, 1) == Cut(512, 1, 8)
    assert cut(1, 4096, 2) == Cut(256, 1, 8)
    assert cut(128, 4096, 4) == Cut(128, 1, 8)
    assert cut(4096, 4096, 1) == Cut(4096, 1, 1)
    assert cut(4096, 4096, 4) == Cut(1024, 4, 1)
    assert cut(2048, 4096, 4) == Cut(1024, 2, 1)
    assert cut(1000, 4096, 4) == Cut(1024, 4, 1)
    assert cut(1, 4093, 1) == Cut(4093, 1, 1)  # a prime number of sequences
    assert Cut.of(None, 4096, 4) == Cut(1024, 4, 1)


@given(seeds, st.integers(1, 5), st.integers(1, 12), st.sampled_from([1, 2, 4]), st.sampled_from([0.0, 0.2, 1.0]))
def test_block_counts_are_the_layout_in_pieces(seed: int, k: int, cells: int, parts: int, missing: float) -> None:
    """Summed over blocks: DeepEP's layout of all tokens, also with -1; each block: that of its own tokens."""
    rng = np.random.default_rng(seed)
    n_experts, n_ranks, per_node = 16, 8, 4
    cell = int(rng.integers(1, 9))
    ids = np.argsort(rng.random((cells * parts * cell, n_experts)), axis=1)[:, :k].astype(np.int16)
    ids[rng.random(ids.shape) < missing] = -1
    expert_rank = rng.permutation(np.repeat(np.arange(n_ranks, dtype=np.int32), 2))
    found = block_counts(ids, Cut(cell, parts, 1), expert_rank, n_ranks, per_node, n_experts)
    assert found.shape == (cells, parts, n_experts + n_ranks + 2)
    for rows, counts in [
        (slice(None), found.sum(axis=(0, 1))),
        (slice((cells * parts - 1) * cell, None), found[-1, -1]),
    ]:
        layout = dispatch_layout(ids[rows], expert_rank, n_ranks, per_node, n_experts, plain)
        expected = [layout.num_tokens_per_expert, layout.num_tokens_per_rank, layout.num_tokens_per_rdma_rank]
        np.testing.assert_array_equal(counts, np.concatenate(expected))


@given(seeds, st.integers(2, 9), st.sampled_from([(1, 1), (1, 3), (2, 1), (4, 1)]))
def test_a_draw_is_a_sum_of_blocks(seed: int, n_blocks: int, shape: tuple[int, int]) -> None:
    """With blocks of distinct powers of a base, each micro-batch shows which blocks it holds, and how often."""
    parts, per_part = shape
    base = 16
    blocks = np.zeros((n_blocks, parts, n_blocks), np.int32)
    for i in range(n_blocks):
        blocks[i, :, i] = base ** np.arange(parts)  # a block's parts stay together and in order
    drawn = draw(blocks, Cut(1, parts, per_part), np.random.default_rng(seed), 5, 4)
    assert drawn.shape == (4, 5, n_blocks) and drawn.dtype == np.int64
    place = base ** (np.arange(4) % parts)
    whole = drawn / place[:, None, None]
    assert (whole == np.rint(whole)).all() and (whole.sum(axis=2) == per_part).all()
    grouped = whole.reshape(4 // parts, parts, 5, n_blocks)
    assert (grouped == grouped[:, :1]).all()


def test_ranks_with_different_cuts_are_joined_whole() -> None:
    """Cells of either cut end up in their micro-batch, and nothing is lost."""
    fine, coarse = Cut(2, 1, 3), Cut(6, 2, 1)
    a = np.arange(12, dtype=np.int32).reshape(6, 1, 2)  # two micro-batches of three cells
    b = np.array([[[100, 101], [102, 103]]], np.int32)
    cut, blocks = joined([(fine, a), (coarse, b)], 2)
    assert cut == Cut(6, 2, 1) and blocks.dtype == np.int32
    np.testing.assert_array_equal(blocks, [[[6, 9], [24, 27]], b[0]])
    cut, blocks = joined([(fine, a), (fine, a)], 2)
    assert cut == fine and len(blocks) == 12


def test_a_draw_has_the_pilots_mean_and_covariance() -> None:
    rng = np.random.default_rng(0)
    blocks = (rng.gamma(2.0, 10.0, (40, 1, 3)) @ rng.random((3, 3))).astype(np.int32)
    drawn = draw(blocks, Cut(10, 1, 4), stream(0, "test"), 50_000, 1)[0]
    flat = blocks[:, 0].astype(float)
    np.testing.assert_allclose(drawn.mean(axis=0), 4 * flat.mean(axis=0), rtol=0.005)
    np.testing.assert_allclose(np.cov(drawn.T), 4 * np.cov(flat.T, bias=True), rtol=0.05)


# --- two-sample tests ---

BASE = {
    "name": "count",
    "model": {
        "name": "toy", "num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 64, "num_attention_heads": 2,
        "n_routed_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "scoring_func": "sigmoid",
        "n_group": 4, "topk_group": 2,
    },
    "cluster": {"extends": "scenarios/clusters/h800.yaml", "nodes": 2, "devices_per_node": 2},
    "parallel": {"ep_size": 4},
    "traffic": {
        "kind": "affinity", "tokens_per_rank": 128, "sequence_length": 32,
        "topic_tree": [
            {"name": "a", "popularity_sd": 0.4}, {"name": "b", "popularity_sd": 0.4}, {"name": "c", "weight": 0.5}
        ],
    },
    "policies": [{"name": "plain"}, {"name": "limited", "select": "group_limited"}],
}  # fmt: skip
RANKS = 4
PLAIN = 'policies=[{"name": "plain"}]'


def scenario(*overrides: str) -> Scenario:
    return load(BASE, overrides)


def count(pilot_ranks: int) -> list[str]:
    return ["steps.resolution=count", f"steps.pilot_ranks={pilot_ranks}"]


def rolled(*overrides: str, replica: int = 0) -> list[Counts]:
    given_ = scenario(*overrides)
    layers = range(given_.model.n_moe_layers)
    return rollout.run(Task(given_, tuple(range(len(given_.policies))), replica, layers))


def batches(*overrides: str) -> list[Counts]:
    return rolled("steps.timed=all", f"steps.count={SAMPLES}", *overrides)


def rows(counts: Counts, name: str) -> I64:
    """[steps, ranks, ...] of one array of the exchanges, micro-batches added up."""
    found = [np.sum([getattr(e, name) for e in counts.exchanges[step]], axis=0) for step in sorted(counts.exchanges)]
    return np.array(found)


def statistics(counts: Counts) -> dict[str, F64]:
    """Of every timed step [steps]: what balance and exchange are about."""
    loads, pairs = rows(counts, "expert_tokens"), rows(counts, "pairs")
    ranks, nodes = rows(counts, "rank_tokens"), rows(counts, "node_tokens")
    total = loads.sum(axis=1)
    return {
        "MaxVio": max_vio(total),
        "load of expert 3": total[:, 3].astype(float),
        "load of expert 17": total[:, 17].astype(float),
        "least load": total.min(axis=1).astype(float),
        "rank MaxVio": max_vio(pairs.sum(axis=1)),
        "MaxVio of one source": max_vio(loads[:, 0]),
        "copies to rank 3": ranks[:, :, 3].sum(axis=1).astype(float),
        "copies of source 2 to rank 1": ranks[:, 2, 1].astype(float),
        "copies to ranks": ranks.sum(axis=(1, 2)).astype(float),
        "copies to node 1": nodes[:, :, 1].sum(axis=1).astype(float),
        "copies to nodes": nodes.sum(axis=(1, 2)).astype(float),
    }


def p_values(a: F64, b: F64) -> Iterator[tuple[str, float]]:
    """Of equal distribution (Kolmogorov-Smirnov), equal means (Welch) and equal spread (Brown-Forsythe)."""
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        yield "value", float(a[0] == b[0])
        return
    yield "distribution", float(ks_2samp(a, b).pvalue)
    yield "mean", float(ttest_ind(a, b, equal_var=False).pvalue)
    yield "spread", float(levene(a, b, center="median").pvalue)


def differences(a: dict[str, F64], b: dict[str, F64]) -> dict[tuple[str, str], float]:
    """Return the p-value of each (statistic, test), times the number of them (Bonferroni)."""
    found = {(name, test): p for name in a for test, p in p_values(a[name], b[name])}
    return {key: p * len(found) for key, p in found.items()}


def worst(found: dict[tuple[str, str], float]) -> tuple[str, str]:
    return min(found, key=lambda key: found[key])


@pytest.fixture(scope="module")
def routed() -> list[Counts]:
    return batches()


@pytest.fixture(scope="module")
def drawn() -> list[Counts]:
    return batches(*count(PILOT))


PILOT = 256 * RANKS
"""Its error is 1/16 of a batch's own noise, less than the standard error 1/10 of the difference of two means of 200."""


@pytest.mark.parametrize("policy", [0, 1])
def test_draws_look_like_routed_batches(policy: int, routed: list[Counts], drawn: list[Counts]) -> None:
    """200 batches of one layer, routed and drawn: distribution, mean and spread of every statistic."""
    found = differences(statistics(routed[policy]), statistics(drawn[policy]))
    assert len(found) >= 31
    assert found[worst(found)] > FAMILY, (worst(found), found[worst(found)])


def test_a_sequence_over_two_micro_batches() -> None:
    """Draws keep the halves of a rank's sequence together: nothing changes, nor how much the halves have in common."""
    shape = ["traffic.sequence_length=64", "traffic.tokens_per_rank=64", "schedule.micro_batches=2", PLAIN]
    token, count_ = batches(*shape)[0], batches(*shape, *count(PILOT // 2))[0]
    found = differences(statistics(token), statistics(count_))
    assert found[worst(found)] > FAMILY, (worst(found), found[worst(found)])
    shared = []
    for counts in (token, count_):
        halves = np.array([[e.expert_tokens for e in counts.exchanges[step]] for step in range(SAMPLES)])
        one, other = (halves[:, part].reshape(-1, 32) for part in (0, 1))
        one, other = one - one.mean(axis=0), other - other.mean(axis=0)
        shared.append((one * other).mean() / (one.std() * other.std()))
    assert shared[0] > 0.2
    # The standard error of a correlation of 800 ranks is below 1/sqrt(800) = 0.035, and experts are averaged.
    assert abs(shared[0] - shared[1]) < 0.05


def test_the_tests_see_what_is_wrong(routed: list[Counts]) -> None:
    """Negative controls, at the same threshold: independent tokens, normal rows, a pilot that is too small."""
    loads = rows(routed[0], "expert_tokens")
    flat = loads.reshape(-1, 32)
    share, pairs = flat.sum(axis=0) / flat.sum(), 128 * 4
    rng = stream(0, "test")

    def of(given_: F64 | I64) -> dict[str, F64]:
        each = np.asarray(given_, dtype=float).reshape(SAMPLES, RANKS, 32)
        total = each.sum(axis=1)
        return {
            "MaxVio": max_vio(total),
            "load of expert 3": total[:, 3],
            "rank MaxVio": max_vio(total.reshape(SAMPLES, RANKS, 8).sum(axis=2)),
            "MaxVio of one source": max_vio(each[:, 0]),
            "least load of one source": each[:, 0].min(axis=1),
        }

    other = of(rows(batches(PLAIN, "seed=0", *count(PILOT))[0], "expert_tokens"))
    found = differences(of(loads), other)
    assert found[worst(found)] > FAMILY
    for wrong in (rng.multinomial(pairs, share, SAMPLES * RANKS), rng.poisson(pairs * share, (SAMPLES * RANKS, 32))):
        found = differences(of(loads), of(wrong))
        for key in [("load of expert 3", "spread"), ("MaxVio", "spread"), ("MaxVio of one source", "mean")]:
            assert found[key] < FAMILY, key
    normal = rng.multivariate_normal(flat.mean(axis=0), np.cov(flat.T), SAMPLES * RANKS)
    found = differences(of(loads), of(normal))
    assert found["least load of one source", "mean"] < FAMILY
    found = differences(statistics(routed[0]), statistics(batches(PLAIN, *count(RANKS // 2))[0]))
    assert found[worst(found)] < FAMILY  # half a batch as a pilot: its error is 1.4 times a batch's noise


def test_two_hundred_seeds() -> None:
    """Independent seeds, each with its own model, traffic and pilot of four batches: the distributions over them, and
    the mean of the differences, which is sharper, as both runs of a seed share the popularity of experts.

    Extremes are moved outwards by the error of a pilot, here by some quarter of their spread over seeds.
    """
    shape = ["traffic.tokens_per_rank=64", "traffic.sequence_length=16", f"replicas={SAMPLES}"]
    found = {}
    for name, more in {"token": [], "count": count(4 * RANKS)}.items():
        given_ = scenario(*shape, *more)
        each = [rollout.run(Task(given_, (0, 1), replica, range(1))) for replica in range(SAMPLES)]
        found[name] = [[statistics(counts[policy]) for counts in each] for policy in (0, 1)]
    for policy in (0, 1):
        token, count_ = (
            {key: np.concatenate([one[key] for one in found[name][policy]]) for key in found[name][policy][0]}
            for name in ("token", "count")
        )
        marginal = differences(token, count_)
        assert marginal[worst(marginal)] > FAMILY, (policy, worst(marginal), marginal[worst(marginal)])
        for name in token:
            change = count_[name] - token[name]
            if "MaxVio" in name or "least" in name:
                assert abs(change.mean()) < 0.4 * token[name].std(), (policy, name)
            elif np.ptp(change) > 0:
                assert ttest_1samp(change, 0.0).pvalue * 8 > FAMILY, (policy, name)


def test_the_error_that_a_pilot_leaves(routed: list[Counts]) -> None:
    """Draws after pilots of m ranks spread around the truth like sqrt((m - 1) / m + n / m) times a batch of n ranks."""
    flat = rows(routed[0], "expert_tokens").reshape(-1, 32)
    noise = flat.reshape(SAMPLES, RANKS, 32).sum(axis=1).var(axis=0, ddof=1)
    truth = flat.mean(axis=0) * RANKS
    for pilot in (4, 16):
        groups = flat.reshape(-1, pilot, 1, 32).astype(np.int32)
        drawn = [draw(g, Cut(128, 1, 1), stream(i, "test"), RANKS, 1)[0].sum(axis=0) for i, g in enumerate(groups)]
        seen = (np.square(np.array(drawn) - truth) / noise).mean()
        # Each expert gives a chi-square of as many draws; experts move together, so they count as if there were 8.
        low, high = chi2.ppf([0.005, 0.995], 8 * len(groups)) / (8 * len(groups))
        expected = (pilot - 1) / pilot + RANKS / pilot
        assert low * expected < seen < high * expected, pilot


def test_the_noise_of_a_step_that_is_its_own_pilot(routed: list[Counts]) -> None:
    """16 ranks of which 4 are routed: the variance of the whole against that of 16 routed ranks."""
    flat = rows(routed[0], "expert_tokens").reshape(-1, 4, 32)
    truth, noise = flat.mean(axis=(0, 1)) * 16, flat.reshape(-1, 32).var(axis=0, ddof=1) * 16
    total = []
    for i, pilot in enumerate(flat):
        others = draw(pilot[:, None].astype(np.int32), Cut(128, 1, 1), stream(i, "test"), 12, 1)[0]
        total.append(pilot.sum(axis=0) + others.sum(axis=0))
    seen = (np.square(np.array(total) - truth) / noise).mean()
    low, high = chi2.ppf([0.005, 0.995], 8 * len(flat)) / (8 * len(flat))
    assert low < seen / noise_of_a_step(16, 4) ** 2 < high
    assert noise_of_a_step(16, 16) == 1.0


# --- whole runs ---


def frames(*overrides: str) -> dict[str, pd.DataFrame]:
    result = sim.run(scenario(*overrides))
    return {"steps": result.steps, "layers": result.layers, "devices": result.devices, "experts": result.experts}


LEARNER = 'policies=[{"name": "bias", "balance": {"kind": "bias", "bias_update_rate": 0.01}}]'


def test_a_moving_gate_with_a_pilot_of_all_ranks_is_token_level() -> None:
    """Also a gate that stands still, under traffic that does not: nothing is left to draw."""
    still = "policies.0={name: plain}"
    moving = "policies.1={name: bias, balance: bias}"
    shift = "traffic.shifts=[{step: 1, weights: {a: 1}}]"
    token = frames(still, moving, "steps.count=3", "steps.timed=all")
    counted = frames(still, moving, "steps.count=3", "steps.timed=all", *count(RANKS))
    for name, table in token.items():
        for policy, same in (("bias", True), ("plain", False)):
            a, b = (t[t.policy == policy].reset_index(drop=True) for t in (table, counted[name]))
            assert a.equals(b) == same, (name, policy)
    with pytest.raises(ScenarioError, match=r"steps.pilot_ranks: must be < parallel.ep_size = 4: no gate stands still"):
        scenario(shift, *count(RANKS))


def test_a_controller_settles_as_at_token_level() -> None:
    """The bias rule sees 2 of 4 ranks and blocks drawn from them: noisier, hence a larger ripple, but the same rest.

    Late loads summed over 40 steps are as even, and the biases that keep them so are the same but for noise.
    """
    found = {}
    for name, overrides in {"token": [], "again": ["seed=1"], "count": count(2)}.items():
        (found[name],) = rolled(
            LEARNER, "steps.count=120", "steps.timed=none", "traffic.tokens_per_rank=256", *overrides
        )
    late = {name: counts.expert_tokens[-40:].sum(axis=0) for name, counts in found.items()}
    start = found["token"].expert_tokens[:5].sum(axis=0)
    assert max_vio(start) > 0.5
    assert max_vio(late["token"]) < 0.3 * max_vio(start) and max_vio(late["count"]) < 0.4 * max_vio(start)
    bias = {name: counts.state[0].ravel() for name, counts in found.items()}
    assert np.corrcoef(bias["token"], bias["count"])[0, 1] > 0.9
    assert np.corrcoef(bias["again"], bias["count"])[0, 1] < 0.5  # another seed is another model


def test_losses_learn_from_the_pilots_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence-wise loss, sampled from 2 of 4 ranks, balances about as well as from all, and sees as many tokens."""
    seen: list[int] = []
    update = Gate.update

    def spy(gate: Gate, given_: Seen, *more: Any, **options: Any) -> None:
        seen.append(sum(len(sample.topic) for sample in given_.samples))
        update(gate, given_, *more, **options)

    monkeypatch.setattr(Gate, "update", spy)
    monkeypatch.setattr("sim.tally.SAMPLE_TOKENS", 128)
    loss = 'policies=[{"name": "loss", "balance": {"kind": "aux_loss", "scope": "sequence", "aux_loss_alpha": 0.01}}]'
    late = {}
    for name, overrides in {"token": [], "count": count(2)}.items():
        (counts,) = rolled(loss, "steps.count=40", "steps.timed=none", *overrides)
        late[name] = float(max_vio(counts.expert_tokens[-20:].sum(axis=0)))
        first = float(max_vio(counts.expert_tokens[:2].sum(axis=0)))
        assert late[name] < 0.5 * first
    assert 0.5 < late["count"] / late["token"] < 2
    assert len(seen) == 80 and 0.8 < seen[40] / seen[0] < 1.25


def test_policies_and_layers_meet_the_same_blocks() -> None:
    """Two equal gates draw equal rows; the loads of two layers are tied to each other as at token level."""
    twins = 'policies=[{"name": "a"}, {"name": "b"}]'
    two = ["model.num_hidden_layers=2", "steps.timed=all", f"steps.count={SAMPLES}", "traffic.sequence_length=128"]
    between = {}
    for name, overrides in {"token": [], "count": count(64)}.items():
        a0, a1, b0, _ = rolled(twins, *two, *overrides)
        np.testing.assert_array_equal(a0.expert_tokens, b0.expert_tokens)
        between[name] = np.corrcoef(a0.expert_tokens.T, a1.expert_tokens.T)[:32, 32:]
    assert np.abs(between["token"]).mean() > 0.15
    assert np.corrcoef(between["token"].ravel(), between["count"].ravel())[0, 1] > 0.8


def test_a_run_says_what_was_drawn() -> None:
    result = sim.run(scenario("policies.1.balance=bias", "steps.count=3", *count(2)))
    text = sim.report.terminal(result).replace("\n  ", " ")
    assert "all ranks of all steps are drawn from blocks of a pilot of 2 ranks, whose means err by 1.41 times" in text
    assert (
        "limited: of each step's 4 ranks 2 are routed token by token, the others drawn from them; that makes a batch's "
        "sampling noise 1.50 times too large" in text
    )
    assert "loads drawn at count level" in text
    plain_, limited = result.scenario.policies
    assert rollout.token_layers_of(result.scenario, plain_) == 2 * 128
    assert rollout.token_layers_of(result.scenario, limited) == 3 * 2 * 128
    assert result.layers.kept_affinity.notna().all() and result.layers.max_vio_sequence.notna().any()
    assert not np.isnan(result.summary_rows["mean"][0])


def test_same_bytes_in_any_process_with_any_kernels(tmp_path: Path) -> None:
    more = [word for value in count(16) for word in ("--set", value)]
    golden = in_process(tmp_path / "here", *more)
    assert fresh(tmp_path / "there", *more, "--jobs", "2", GATESIM_KERNELS="numba") == golden


@pytest.mark.parametrize(("at", "law"), [(0, "C1 a pilot's blocks"), (32, "C2 a pilot's blocks")])
@pytest.mark.parametrize("policy", ["{name: still}", "{name: moving, balance: bias}"])
def test_a_pilot_that_loses_tokens_is_noticed(policy: str, at: int, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(*given_: Any) -> np.ndarray:
        blocks = block_counts(*given_)
        blocks[0, 0, at + np.argmax(blocks[0, 0, at : at + RANKS])] -= 1
        return blocks

    monkeypatch.setattr("sim.drawn.block_counts", lossy)
    with pytest.raises(ConservationError, match=law):
        rolled(f"policies=[{policy}]", *count(2))


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("policies.0.select=dense", "policies.0.select: select dense cannot be drawn: set steps.resolution: token"),
        ("policies.0.select=expert_choice", "policies.0.select: select expert_choice cannot be drawn"),
        ("policies.0.select=gshard", "policies.0.select: select gshard cannot be drawn"),
        ("policies.0.capacity=expert_capacity", "policies.0.capacity: what capacity drops cannot be drawn"),
        ("policies.0.capacity=device_budget", "policies.0.capacity: what capacity drops cannot be drawn"),
        ("steps.pilot_ranks=1", "steps.pilot_ranks: must be >= 2"),
    ],
)
def test_what_cannot_be_drawn_is_refused(override: str, complaint: str) -> None:
    with pytest.raises(ScenarioError, match=complaint):
        scenario("steps.resolution=count", override)


def test_the_estimate_knows_what_is_drawn() -> None:
    """Ten thousand steps of draws cost far less than routing them, and more than one."""
    many, one, token = (
        estimate(scenario(PLAIN, "traffic.tokens_per_rank=4096", *overrides)).seconds
        for overrides in (["steps.count=10000", *count(64)], ["steps.count=1", *count(64)], ["steps.count=10000"])
    )
    assert one < many < 0.1 * token


def test_the_floor_of_a_long_run_needs_no_array_of_its_tokens() -> None:
    """Where only the middle of the binomial is summed, the floor is the same; a hundred billion tokens are quick."""
    for n_tokens, n_experts, k in [(60_000, 256, 8), (40_000, 32, 4)]:
        x = np.arange(n_tokens + 1)
        whole = 1.0 - binom.cdf(x, n_tokens, k / n_experts) ** n_experts
        expected = whole.sum() / (n_tokens * k / n_experts) - 1.0
        assert uniform_max_vio(n_tokens, n_experts, k) == pytest.approx(expected, rel=1e-6)
    assert 0 < uniform_max_vio(10**11, 256, 8) < 1e-3
