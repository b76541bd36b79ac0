"""Losses on the router: values written out from the papers, gradients against finite differences, what they settle at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.gating.balance import Balance, Sample, Seen
from sim.gating.balance.aux_loss import AuxLoss
from sim.gating.balance.communication_loss import CommunicationLoss
from sim.gating.balance.device_loss import DeviceLoss
from sim.gating.balance.router_loss import BalanceLoss, RouterLoss
from sim.gating.balance.z_loss import ZLoss
from sim.gating.piece import GateShape
from sim.gating.score import Score
from sim.kernels import plain
from sim.plugin import make, members
from sim.tokens import F32, F64, I16
from tests.strategies import seeds, toy_model

E, K, D, M = 12, 3, 4, 2  # experts, experts per token, devices, devices per token
SCORES = sorted(members(Score))
ONE, ZERO = np.ones(E, np.float32), np.zeros(E, np.float32)
SHAPE = GateShape(E, K, n_group=D, topk_group=M, modalities=("text", "text", "image"))
SCOPES = ("sequence", "micro_batch", "ep_group", "global_batch")
PER_SAMPLE = 16


def exact_scores(kind: str, logits: F64) -> F64:
    """The score functions in float64."""
    if kind == "softmax":
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)
    if kind == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    assert kind == "sqrtsoftplus"
    return np.sqrt(np.logaddexp(0, logits))


def _seen(seed: int, kind: str, parts: int = 2, ranks: int = 2, ids: I16 | None = None) -> Seen:
    """A step of ``parts`` x ``ranks`` micro-batches in which every token is in a sample; sequences of uneven length."""
    rng = np.random.default_rng(seed)
    score, samples = make(Score, kind), []
    counts = np.zeros((parts, ranks, E), np.int64)
    for part in range(parts):
        for rank in range(ranks):
            logits = (rng.standard_normal((PER_SAMPLE, E)) + np.linspace(-1, 1, E) * (1 + part - rank)).astype(
                np.float32
            )
            scores = score.scores(logits, plain)  # type: ignore[arg-type]
            biased = (scores + rng.random(E, dtype=np.float32) * scores.mean()).astype(np.float32)
            chosen = plain.topk(biased, ONE, ZERO, K) if ids is None else ids
            topic = rng.integers(0, 3, PER_SAMPLE, dtype=np.int32)
            sequence = np.repeat(np.arange(3, dtype=np.int32), [4, 7, 5])
            samples.append(Sample(part, rank, logits, scores, chosen, topic, sequence, score))
            counts[part, rank] = plain.expert_tokens(chosen, E)
    return Seen(counts, np.zeros((3, E), np.int64), tuple(samples))


def _groups(seen: Seen, scope: str, buffer: bool = False) -> list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """Pairs of (tokens whose P the group's loss takes, tokens that F counts), a token = (sample, row)."""
    every = [(i, t) for i in range(len(seen.samples)) for t in range(PER_SAMPLE)]
    if scope == "sequence":
        keys = {at: (at[0], int(seen.samples[at[0]].sequence[at[1]])) for at in every}
    elif scope == "micro_batch":
        keys = {at: (at[0], 0) for at in every}
    elif scope == "ep_group":
        keys = {at: (seen.samples[at[0]].part, 0) for at in every}
    else:
        keys = dict.fromkeys(every, (0, 0))
    found = []
    for key in sorted(set(keys.values())):
        mine = [at for at in every if keys[at] == key]
        counted = mine
        if buffer:  # micro-batches up to this one, of the same rank or of all
            first = seen.samples[mine[0][0]]
            counted = [
                at
                for at in every
                if seen.samples[at[0]].part <= first.part
                and (scope == "ep_group" or seen.samples[at[0]].rank == first.rank)
            ]
        found.append((mine, counted))
    return found


def written_out(
    name: str, seen: Seen, kind: str, scope: str, logits: list[F64], buffer: bool = False, f_from: str = "chosen", first: bool = False
) -> float:  # fmt: skip
    """sum_i f_i P_i and its relatives, group by group as the papers write them, mean over tokens; f from ``seen``."""
    total = 0.0
    for mine, counted in _groups(seen, scope, buffer):
        f = np.zeros(E)
        sent = np.zeros(D)
        for i, t in counted:
            sample = seen.samples[i]
            ids = sample.topk_ids[t].tolist()
            if f_from == "plain_topk":
                ids = sorted(range(E), key=lambda e, s=sample.scores[t]: (-s[e], e))[:K]
            ids = ids[:1] if first else ids
            for e in ids:
                f[e] += E / (len(ids) * len(counted))  # f_i = N / (K T) x tokens that chose i
            for d in {e // (E // D) for e in ids}:
                sent[d] += D / (M * len(counted))  # f''_d = D / (M T) x tokens sent to d
        p = np.zeros(E)
        for i, t in mine:
            s = exact_scores(kind, logits[i][t : t + 1])[0]
            p += s / s.sum() / len(mine)
        p_device = p.reshape(D, -1).sum(axis=1)
        loss = {
            "aux_loss": float(f @ p),
            "device_loss": float(f.reshape(D, -1).mean(axis=1) @ p_device),
            "communication_loss": float(sent @ p_device),
        }[name]
        total += loss * len(mine)
    return total / (len(seen.samples) * PER_SAMPLE)


@pytest.mark.parametrize("kind", SCORES)
def test_scores_are_the_closed_forms(kind: str) -> None:
    logits = np.random.default_rng(0).standard_normal((400, E), dtype=np.float32) * 6
    logits[:3] = [[0.0], [-20.0], [20.0]]
    found = make(Score, kind).scores(logits, plain)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, exact_scores(kind, logits.astype(np.float64)), rtol=3e-6, atol=1e-12)
    near = np.abs(logits).max(axis=1) < 8  # exp's argument is a float32, so its relative error grows with its size
    np.testing.assert_allclose(found[near], exact_scores(kind, logits[near].astype(np.float64)), rtol=1.2e-6)


def test_slopes_are_the_closed_forms() -> None:
    """In float64, far into both tails: sigmoid's s (1 - s), and sigmoid(z) / 2s for sqrt(softplus(z))."""
    z = np.linspace(-40, 40, 801)[:, None]
    logistic = 1 / (1 + np.exp(-z))
    for kind, expected in (
        ("sigmoid", logistic * (1 - logistic)),
        ("sqrtsoftplus", logistic / (2 * exact_scores("sqrtsoftplus", z))),
    ):
        np.testing.assert_allclose(make(Score, kind).slope(exact_scores(kind, z)), expected, rtol=1e-8, atol=1e-16)


LOSSES: dict[str, type[BalanceLoss]] = {
    "aux_loss": AuxLoss,
    "device_loss": DeviceLoss,
    "communication_loss": CommunicationLoss,
}
GROUPED: dict[str, dict[str, int]] = {"aux_loss": {}, "device_loss": {"n_group": D}, "communication_loss": {"n_group": D, "topk_group": M}}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {},
    {"f_from": "plain_topk"},  # DeepSeek-V3, eq. 18
    {"first_choice_only": True},  # GShard, Algorithm 1
]
CASES = [
    (name, scope, buffer, variant)
    for name in LOSSES
    for scope in SCOPES
    for buffer in ((False, True) if scope in ("micro_batch", "ep_group") else (False,))
    for variant in (VARIANTS if name != "communication_loss" else VARIANTS[:1])
]


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("name", "scope", "buffer", "variant"), CASES)
def test_losses_are_the_papers_and_their_gradients_are_right(
    name: str, scope: str, buffer: bool, variant: dict[str, Any], kind: str
) -> None:
    """Value against the written-out formula in float64; gradient with respect to each topic's offset against central
    differences of it, F held fixed."""
    rule = LOSSES[name].model_validate({"kind": name, "scope": scope, "buffer": buffer} | GROUPED[name] | variant)
    seen = _seen(5, kind)
    logits = [sample.logits.astype(np.float64) for sample in seen.samples]
    words = {"f_from": variant.get("f_from", "chosen"), "first": variant.get("first_choice_only", False)}

    def loss(theta: F64) -> float:
        moved = [z + theta[s.topic] for z, s in zip(logits, seen.samples, strict=True)]
        return written_out(name, seen, kind, scope, moved, buffer, **words)

    zero = np.zeros((3, E))
    assert rule.value(seen, SHAPE) == pytest.approx(loss(zero), rel=1e-5)
    gradient, _, n_tokens = rule.gradient(seen, SHAPE)
    n = len(seen.samples) * PER_SAMPLE
    assert n_tokens.sum() == n
    for topic, expert in [(0, 0), (1, 5), (2, 11), (0, 7)]:
        step = zero.copy()
        step[topic, expert] = 1e-5
        slope = (loss(step) - loss(-step)) / 2e-5
        # The rule gives the mean over a topic's tokens, the loss is a mean over all.
        assert gradient[topic, expert] * n_tokens[topic] / n == pytest.approx(slope, rel=2e-4, abs=1e-7)


def test_the_scopes_are_not_one_another() -> None:
    """Negative control of the cases above: every scope, buffer and way of counting gives another value."""
    seen = _seen(5, "softmax")
    for name in LOSSES:
        values = [
            LOSSES[name].model_validate({"kind": name, "scope": s, "buffer": b} | GROUPED[name] | v).value(seen, SHAPE)
            for other, s, b, v in CASES
            if other == name
        ]
        # With one rank per group the buffer of the last micro-batch differs too; only exact repeats would be equal.
        assert len(set(np.round(values, 9))) == len(values), name


@pytest.mark.parametrize("kind", SCORES)
def test_value_is_one_at_perfect_balance(kind: str) -> None:
    """f = 1 makes sum_i f_i P_i = 1 for every score function, whatever the scores: experts, devices, communication."""
    rows = (np.arange(PER_SAMPLE)[:, None] * K + np.arange(K)) % E
    ids = rows.astype(np.int16)
    assert plain.expert_tokens(ids, E).tolist() == [PER_SAMPLE * K // E] * E
    seen = _seen(1, kind, ids=ids)
    for scope in ("micro_batch", "ep_group", "global_batch"):
        assert AuxLoss(scope=scope).value(seen, SHAPE) == pytest.approx(1.0, abs=1e-6)
        assert DeviceLoss(scope=scope, n_group=D).value(seen, SHAPE) == pytest.approx(1.0, abs=1e-6)
        # 3 consecutive experts of 12 lie on one device of four: each token reaches one device, M = 1.
        one = CommunicationLoss(scope=scope, n_group=D, topk_group=1)
        assert one.value(seen, SHAPE) == pytest.approx(1.0, abs=1e-6)
        # The value depends on the M actually reached: with M = 2 allowed and 1 used it is 1/2.
        assert one.model_copy(update={"topk_group": 2}).value(seen, SHAPE) == pytest.approx(0.5, abs=1e-6)
    for rule in (AuxLoss(), DeviceLoss(n_group=D), CommunicationLoss(n_group=D, topk_group=1)):
        np.testing.assert_allclose(rule.gradient(seen, SHAPE)[0], 0.0, atol=1e-7)


def test_switch_and_megatron_write_the_same_loss() -> None:
    """Switch, eq. 4: N sum f_i P_i with f the share of tokens (top-1); Megatron-LM: E / (K T^2) sum (P summed x count)."""
    seen = _seen(2, "softmax", 1, 1)
    (sample,) = seen.samples
    p, count = sample.scores.astype(float), seen.counts[0, 0]
    megatron = E / (K * PER_SAMPLE**2) * float((p.sum(axis=0) * count).sum())
    assert AuxLoss(scope="micro_batch").value(seen, SHAPE) == pytest.approx(megatron, rel=1e-6)
    top1 = Sample(
        0, 0, sample.logits, sample.scores, sample.topk_ids[:, :1], sample.topic, sample.sequence, sample.score
    )
    share = plain.expert_tokens(top1.topk_ids, E) / PER_SAMPLE
    one = Seen(plain.expert_tokens(top1.topk_ids, E)[None, None], None, (top1,))
    assert AuxLoss(scope="micro_batch").value(one, GateShape(E, 1, modalities=SHAPE.modalities)) == pytest.approx(
        E * float((share * p.mean(axis=0)).sum()), rel=1e-6
    )


def test_gshards_loss_is_ours_over_experts_squared() -> None:
    """GShard, Algorithm 1: l_aux = 1/E sum_e c_e / S m_e with first-choice counts. Ours is 1 at balance, that one 1/E^2
    (Mesh-TensorFlow multiplies it by E^2 as well)."""
    seen = _seen(3, "softmax", 1, 1)
    (sample,) = seen.samples
    first = plain.expert_tokens(np.ascontiguousarray(sample.topk_ids[:, :1]), E)
    l_aux = float((first / PER_SAMPLE * sample.scores.astype(float).mean(axis=0)).sum()) / E
    ours = AuxLoss(scope="micro_batch", first_choice_only=True).value(seen, SHAPE)
    assert ours == pytest.approx(E**2 * l_aux, rel=1e-6)


def test_counts_of_all_tokens_serve_where_samples_hold_some() -> None:
    """F of a wide scope is exact although P is sampled."""
    seen = _seen(4, "softmax", 1, 1)
    counts = np.zeros((1, 1, E), np.int64)
    counts[0, 0, 2] = 3000
    value = AuxLoss().value(Seen(counts, seen.topic_counts, seen.samples), SHAPE)
    assert value == pytest.approx(E * float(seen.samples[0].scores[:, 2].mean(dtype=float)), rel=1e-6)


# --- z-loss ---


@pytest.mark.parametrize("kind", SCORES)
def test_z_loss(kind: str) -> None:
    """ST-MoE, eq. 5: mean over tokens of logsumexp(z)^2, whatever the score function; gradient by differences."""
    seen, rule = _seen(6, kind), ZLoss()
    logits = [sample.logits.astype(np.float64) for sample in seen.samples]

    def loss(theta: F64) -> float:
        levels = [np.logaddexp.reduce(z + theta[s.topic], axis=1) for z, s in zip(logits, seen.samples, strict=True)]
        return float(np.mean(np.square(np.concatenate(levels))))

    zero = np.zeros((3, E))
    assert rule.value(seen, SHAPE) == pytest.approx(loss(zero), rel=1e-5)
    gradient, _, n_tokens = rule.gradient(seen, SHAPE)
    for topic, expert in [(0, 0), (1, 5), (2, 11)]:
        step = zero.copy()
        step[topic, expert] = 1e-5
        slope = (loss(step) - loss(-step)) / 2e-5
        assert gradient[topic, expert] * n_tokens[topic] / n_tokens.sum() == pytest.approx(slope, rel=2e-4, abs=1e-7)
    assert rule.value(Seen(np.zeros((1, 1, E), np.int64)), SHAPE) == 0.0


# --- every registered loss ---


def losses() -> list[RouterLoss]:
    model = toy_model(E, K, n_group=D, topk_group=M)
    found = [make(Balance, kind).for_model(model) for kind in members(Balance)]
    return [rule for rule in found if isinstance(rule, RouterLoss)]


@pytest.mark.parametrize("rule", losses(), ids=lambda rule: rule.kind)
@pytest.mark.parametrize("kind", SCORES)
def test_a_loss_settles_where_its_gradient_meets_the_pull_back(rule: RouterLoss, kind: str) -> None:
    """With F fixed, alpha / lambda g(theta) + theta = 0 in the end: theta rests, and coefficient 0 never moves it."""
    seen = _seen(7, kind)
    still = rule.model_copy(
        update={name: 0.0 for name in ("aux_loss_alpha", "router_z_loss_coef") if hasattr(rule, name)}
    )
    start = rule.start(SHAPE)
    np.testing.assert_array_equal(still.update(start, seen, SHAPE, 0), start)
    rule = rule.model_copy(update={"pull_back": rule.coefficient, "offset_update_rate": 0.5})  # alpha / lambda = 1
    theta, score = start, make(Score, kind)
    for step in range(100):
        samples = []
        for sample in seen.samples:
            logits: F32 = (sample.logits + theta[sample.topic]).astype(np.float32)
            scores = score.scores(logits, plain)  # type: ignore[arg-type]
            samples.append(
                Sample(sample.part, sample.rank, logits, scores, sample.topk_ids, sample.topic, sample.sequence, score)
            )
        moved = Seen(seen.counts, seen.topic_counts, tuple(samples))
        theta = rule.update(theta, moved, SHAPE, step)
    gradient, _, _ = rule.gradient(moved, SHAPE)
    assert np.abs(theta).max() > 1e-3
    np.testing.assert_allclose(theta, -gradient, atol=2e-4)
    assert rule.value(moved, SHAPE) < rule.value(seen, SHAPE)


@pytest.mark.parametrize("rule", losses(), ids=lambda rule: rule.kind)
def test_topics_without_tokens_stay_where_they_are(rule: RouterLoss) -> None:
    seen = _seen(8, "sigmoid")
    samples = tuple(
        Sample(s.part, s.rank, s.logits, s.scores, s.topk_ids, np.zeros_like(s.topic), s.sequence, s.score)
        for s in seen.samples
    )
    state = np.random.default_rng(0).standard_normal((3, E))
    moved = rule.update(state, Seen(seen.counts, seen.topic_counts, samples), SHAPE, 0)
    np.testing.assert_array_equal(moved[1:], state[1:])
    assert (moved[0] != state[0]).all()


@given(seeds, st.sampled_from(SCORES), st.sampled_from([1e-6, 1e-3, 1.0, 1e6]))
def test_no_coefficient_makes_offsets_run_away(seed: int, kind: str, coefficient: float) -> None:
    """Each step goes a tenth of the way to rest at most: huge coefficients stay finite and bounded, at huge logits too."""
    for rule in losses():
        name = "router_z_loss_coef" if isinstance(rule, ZLoss) else "aux_loss_alpha"
        rule = rule.model_copy(update={name: coefficient})
        seen, theta = _seen(seed % 100, kind, 1, 1), rule.start(SHAPE)
        with np.errstate(all="raise", under="ignore"):
            for step in range(5):
                theta = rule.update(theta, seen, SHAPE, step)
        assert np.isfinite(theta).all() and np.abs(theta).max() < 1e3


def test_a_buffer_needs_micro_batches() -> None:
    model = toy_model(E, K)
    assert AuxLoss(buffer=True, scope="ep_group").problems(model) == []
    for scope in ("sequence", "global_batch"):
        assert AuxLoss(buffer=True, scope=scope).problems(model)[0][0] == "buffer"
    groups = {rule.kind: rule for rule in (DeviceLoss(n_group=5), CommunicationLoss(n_group=5, topk_group=6))}
    assert [field for field, _ in groups["device_loss"].problems(model)] == ["n_group"]
    assert [field for field, _ in groups["communication_loss"].problems(model)] == ["n_group", "topk_group"]


def test_offsets_stand_still_after_their_last_step() -> None:
    """``stop_after_step``: constant or falling to 0 by then, and from there on nothing moves."""
    seen, state = _seen(9, "sigmoid"), np.full((3, E), 0.25)
    for decay, rates in (("constant", [0.1, 0.1, 0.1, 0.1, 0.0, 0.0]), ("linear", [0.1, 0.075, 0.05, 0.025, 0.0, 0.0])):
        rule = AuxLoss.model_validate({"kind": "aux_loss", "stop_after_step": 4, "decay": decay})
        assert [rule.rate(step) for step in range(6)] == pytest.approx(rates)
        np.testing.assert_array_equal(rule.update(state, seen, SHAPE, 4), state)
        assert (rule.update(state, seen, SHAPE, 3) != state).all()
    assert AuxLoss(stop_after_step=0).rate(0) == 0.0 and AuxLoss(decay="linear").rate(10**6) == 0.1
