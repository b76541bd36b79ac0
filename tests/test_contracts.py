"""Contracts of the gating wing: every law over every registered piece, and over random compositions of them at work.

A law is a function that raises AssertionError; beside each stands a piece, defined here, that breaks it and is caught.
What a law cannot ask of a piece is decided by what the piece's class says of itself, never by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.gating import Choices, Gate, Gating, Router
from sim.gating.balance import Adjustment, Balance, Sample, Seen
from sim.gating.capacity import Asked, Capacity
from sim.gating.capacity.expert_capacity import ExpertCapacity
from sim.gating.piece import GateShape, Piece
from sim.gating.score import Score
from sim.gating.score.sigmoid import Sigmoid
from sim.gating.select import Candidates, Select
from sim.gating.select.topk import TopK
from sim.kernels.choose import Kernels
from sim.model import Model
from sim.plugin import members
from sim.rng import stream
from sim.tokens import F32, F64, I16, Routing, Tokens
from tests.strategies import KERNELS, candidates, toy_model

PLAIN = KERNELS["numpy"]
VOCABULARY = 50
FREQUENCY = 1.0 / np.arange(1, VOCABULARY + 1)
MODALITIES = ("text", "text", "image")
E, K, GROUPS = 16, 4, 4
Law = Callable[..., None]


def own(base: type[Any]) -> dict[str, type[Any]]:
    """The project's members of a family; other tests may have defined more."""
    return {kind: cls for kind, cls in members(base).items() if cls.__module__.startswith("sim.")}


def default(cls: type[Any], model: Model) -> Any:
    return cls.model_validate({"kind": cls.model_fields["kind"].default}).for_model(model)


def all_of(base: type[Any], k: int = K) -> list[Any]:
    model = toy_model(E, k, n_group=GROUPS, topk_group=2 if k <= E // 2 else GROUPS)
    return [default(cls, model) for cls in own(base).values()]


def by_kind(piece: Piece) -> str:
    return piece.kind


# --- selection rules ---


@dataclass(frozen=True)
class Given:
    """Tokens for a selection rule."""

    scores: F32
    recorded: I16
    token_ids: np.ndarray

    @staticmethod
    def of(scores: F32, k: int, rng: np.random.Generator) -> Given:
        recorded = PLAIN.topk(rng.random(scores.shape, dtype=np.float32), *_unbiased(scores.shape[1]), k)
        return Given(scores, recorded, rng.integers(0, VOCABULARY, len(scores), dtype=np.int32))


def _unbiased(n_experts: int) -> tuple[F32, F32]:
    return np.ones(n_experts, np.float32), np.zeros(n_experts, np.float32)


def _select(rule: Select, given_: Given, k: int = K, kernels: Kernels = PLAIN, shift: F32 | None = None) -> I16:
    return rule.select(
        candidates(
            given_.scores, k, shift=shift, kernels=kernels, recorded=given_.recorded, token_ids=given_.token_ids, token_frequency=FREQUENCY
        )
    )  # fmt: skip


def _experts(ids: I16) -> list[frozenset[int]]:
    return [frozenset(e for e in row if e >= 0) for row in ids.tolist()]


def later_tokens_change_earlier_ones(rule: Select, seeds: int = 20) -> bool:
    """Whether, in some batch, new tokens in the second half give tokens of the first half other experts."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        first, other = (Given.of(rng.random((16, E), dtype=np.float32), K, rng) for _ in range(2))
        mixed = Given(*(np.r_[a[:8], b[8:]] for a, b in zip(vars(first).values(), vars(other).values(), strict=True)))
        if _experts(_select(rule, first))[:8] != _experts(_select(rule, mixed))[:8]:
            return True
    return False


def one_token_decides_for_another(rule: Select, seeds: int = 20) -> bool:
    """Whether a token's experts can depend on any other token."""
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        given_ = Given.of(rng.random((12, E), dtype=np.float32), K, rng)
        scores = given_.scores.copy()
        scores[5] = scores[5, ::-1] * 3
        changed = Given(scores, given_.recorded, given_.token_ids)
        before, after = _experts(_select(rule, given_)), _experts(_select(rule, changed))
        if before[:5] + before[6:] != after[:5] + after[6:]:
            return True
    return False


@pytest.mark.parametrize("rule", all_of(Select), ids=by_kind)
def test_causality_is_as_declared(rule: Select) -> None:
    """Rules that call themselves causal ignore later tokens, those that do not can be seen to follow them; and so for
    tokens of any place. A rule that looks at no other token is causal."""
    assert later_tokens_change_earlier_ones(rule) is not rule.causal
    if rule.kind != "balanced":  # looks at places in the batch, not at other tokens
        assert one_token_decides_for_another(rule) is not rule.per_token
    assert rule.causal or not rule.per_token


class _Peeking(Select):
    """Shifts every token's scores by the batch's mean score per expert: looks at later tokens, says it does not."""

    kind: str = "peeking"

    def select(self, candidates: Candidates) -> I16:
        s = candidates.scores - 2 * candidates.scores.mean(axis=0, keepdims=True)
        return PLAIN.topk(s.astype(np.float32), *_unbiased(s.shape[1]), candidates.k)


def test_a_rule_that_peeks_is_caught() -> None:
    assert _Peeking().causal and later_tokens_change_earlier_ones(_Peeking())
    assert _Peeking().per_token and one_token_decides_for_another(_Peeking())
    assert not later_tokens_change_earlier_ones(TopK())


HARD: dict[str, Callable[[int, int], F32]] = {
    "huge": lambda t, e: np.resize(np.array([1e4, -1e4, 0, 1e4, -1e4], np.float32), (t, e)),
    "very negative": lambda t, e: np.full((t, e), -1e4, np.float32),
    "equal": lambda t, e: np.full((t, e), 0.25, np.float32),
    "zero": lambda t, e: np.zeros((t, e), np.float32),
    "one-hot": lambda t, e: np.eye(e, dtype=np.float32)[np.arange(t) % 2],
    "subnormal": lambda t, e: np.resize(np.array([1e-42, 2e-42, 0], np.float32), (t, e)),
    "spread": lambda t, e: np.resize(np.geomspace(1e-30, 1e4, 7).astype(np.float32), (t, e)),
}
SIZES = [(16, E, K), (0, E, K), (1, E, K), (5, 4, 4), (1, 1, 1), (3, 7, 2)]


def _valid(rule: Select, ids: I16, n_tokens: int, n_experts: int, k: int) -> None:
    assert ids.dtype == np.int16 and len(ids) == n_tokens
    assert ids.max(initial=-1) < n_experts and ids.min(initial=0) >= -1
    assert (np.diff((ids >= 0).astype(int), axis=1) <= 0).all(), "-1 before an expert"
    if not rule.varies:
        assert ids.shape == (n_tokens, k) and (ids >= 0).all()
    assert all(len(experts) == np.count_nonzero(row >= 0) for experts, row in zip(_experts(ids), ids, strict=True))


def law_hard_scores(rule: Select, make: Callable[[int, int], F32], n_tokens: int, n_experts: int, k: int) -> None:
    """Valid experts from any finite scores, the same from both kernels, and not one floating-point warning.

    Affinities are never negative; a bias may make what is ranked negative."""
    scores = make(n_tokens, n_experts)
    shift = scores.min(axis=0, initial=0) if rule.reads == "sizes" else None
    scores = scores if shift is None else np.maximum(scores, 0)
    given_ = Given.of(scores, k, np.random.default_rng(0))
    with np.errstate(all="raise", under="ignore"):
        ids = _select(rule, given_, k, shift=shift)
        _valid(rule, ids, n_tokens, n_experts, k)
        np.testing.assert_array_equal(_select(rule, given_, k, KERNELS["numba"], shift), ids)


@pytest.mark.parametrize("kind", sorted(own(Select)))
@pytest.mark.parametrize("hard", HARD)
def test_hard_scores(kind: str, hard: str) -> None:
    for n_tokens, n_experts, k in SIZES:
        model = toy_model(n_experts, k, n_group=1 if n_experts % 2 else 2, topk_group=1 if n_experts % 2 else 2)
        rule = default(own(Select)[kind], model)
        if not rule.problems(model):
            law_hard_scores(rule, HARD[hard], n_tokens, n_experts, k)


class _Dividing(Select):
    """Normalises by the sum of scores, which may be zero."""

    kind: str = "dividing"

    def select(self, candidates: Candidates) -> I16:
        s = candidates.scores / candidates.scores.sum(axis=1, keepdims=True)
        return PLAIN.topk(s, *_unbiased(s.shape[1]), candidates.k)


def test_a_rule_that_divides_by_zero_is_caught() -> None:
    law_hard_scores(TopK(), HARD["zero"], 16, E, K)
    with pytest.raises(FloatingPointError):
        law_hard_scores(_Dividing(), HARD["zero"], 16, E, K)


@pytest.mark.parametrize("rule", all_of(Select, k=E), ids=by_kind)
def test_all_experts_asked_for_is_an_even_load(rule: Select) -> None:
    """k = E equals dense, for every rule that gives each token exactly k; those that may give fewer say so."""
    given_ = Given.of(np.random.default_rng(1).random((20, E), dtype=np.float32), E, np.random.default_rng(2))
    loads = PLAIN.expert_tokens(_select(rule, given_, E), E)
    assert loads.tolist() == [20] * E or rule.varies


@pytest.mark.parametrize("rule", all_of(Select), ids=by_kind)
def test_twice_the_batch_is_twice_the_load(rule: Select) -> None:
    """Rules that look at one token at a time, and do not draw, give the copies the same experts."""
    rng = np.random.default_rng(3)
    given_ = Given.of(rng.random((20, E), dtype=np.float32), K, rng)
    twice = Given(*(np.r_[a, a] for a in vars(given_).values()))
    one, two = (PLAIN.expert_tokens(_select(rule, g), E) for g in (given_, twice))
    if rule.per_token and _repeats(rule):
        np.testing.assert_array_equal(two, 2 * one)
    elif not rule.per_token and not rule.varies:
        assert two.sum() == 2 * one.sum()


def _repeats(rule: Select) -> bool:
    """Whether the rule never asks for a random stream."""

    def refuse() -> np.random.Generator:
        raise LookupError

    given_ = Given.of(np.ones((2, E), np.float32), K, np.random.default_rng(0))
    c = candidates(given_.scores, K, recorded=given_.recorded, token_ids=given_.token_ids, token_frequency=FREQUENCY)
    try:
        rule.select(replace(c, rng=refuse))
    except LookupError:
        return False
    return True


# --- what pieces say ---


@pytest.mark.parametrize("piece", [p for base in (Select, Score, Balance, Capacity) for p in all_of(base)], ids=lambda p: f"{type(p).__mro__[1].__name__}-{p.kind}")  # fmt: skip
def test_problems_and_notes(piece: Piece) -> None:
    """Problems name a field of the piece; what a reader must know is a sentence; a rule that no decoder can use says so."""
    model = toy_model(E, K, n_group=GROUPS, topk_group=2)
    for field, rule in piece.for_model(model).problems(model):
        assert field in type(piece).model_fields and rule
    note = piece.note(model)
    assert not note or (len(note.split()) > 5 and note == note.strip())
    if isinstance(piece, Select) and not piece.causal:
        assert note, f"{piece.kind} is not causal and does not say so"
        served = {"training": False}
        if "training" in type(piece).model_fields:  # what is served is causal, and needs no warning
            assert piece.model_copy(update=served).note(model) == ""
            assert not later_tokens_change_earlier_ones(piece.model_copy(update=served))


# --- score functions ---


def law_score(rule: Score, logits: F32) -> None:
    """Finite float32 affinities, not negative, growing with the logit, the same from both kernels, inputs untouched."""
    before = logits.copy()
    with np.errstate(all="raise", under="ignore"):
        scores = rule.scores(logits, PLAIN)
        slope = rule.slope(scores.astype(np.float64))
    np.testing.assert_array_equal(rule.scores(logits, KERNELS["numba"]), scores)
    np.testing.assert_array_equal(logits, before)
    assert scores.dtype == np.float32 and scores.shape == logits.shape
    assert np.isfinite(scores).all() and (scores >= 0).all() and (scores.sum(axis=1) > 0).all()
    order = np.argsort(logits, axis=1, kind="stable")
    assert (np.diff(np.take_along_axis(scores, order, axis=1), axis=1) >= 0).all()
    assert np.isfinite(slope).all() and (slope >= 0).all()


def law_slope(rule: Score, logits: F32) -> None:
    """`slope` is the derivative, seen through P = s / sum(s): dP_j/dz_j = slope_j / sum(s) (1 - P_j)."""
    scores = rule.scores(logits, PLAIN).astype(np.float64)
    total = scores.sum(axis=1)
    for j in (0, 3):
        p = []
        for step in (-0.01, 0.01):
            moved = logits.copy()
            moved[:, j] += np.float32(step)
            s = rule.scores(moved, PLAIN).astype(np.float64)
            p.append(s[:, j] / s.sum(axis=1))
        expected = rule.slope(scores)[:, j] / total * (1 - scores[:, j] / total)
        np.testing.assert_allclose((p[1] - p[0]) / 0.02, expected, rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize("rule", all_of(Score), ids=by_kind)
def test_scores(rule: Score) -> None:
    rng = np.random.default_rng(4)
    law_slope(rule, rng.standard_normal((20, 8), dtype=np.float32) * 2)
    for spread in (0.01, 1.0, 30.0, 1e4):
        law_score(rule, rng.standard_normal((20, 8), dtype=np.float32) * np.float32(spread))
    for make in HARD.values():
        for n_tokens, n_experts, _ in SIZES:
            law_score(rule, np.clip(make(n_tokens, n_experts), -1e4, 1e4))


class _Plateau(Score):
    kind: str = "plateau"
    slope_of: Literal["right", "wrong"] = "wrong"

    def scores(self, logits: F32, kernels: Kernels) -> F32:
        if self.slope_of == "right":
            return (logits * logits).astype(np.float32)
        return kernels.sigmoid(logits)

    def slope(self, scores: F64) -> F64:
        return scores


def test_broken_scores_are_caught() -> None:
    logits = np.random.default_rng(5).standard_normal((20, 8), dtype=np.float32)
    with pytest.raises(AssertionError):
        law_score(_Plateau(slope_of="right"), logits)
    with pytest.raises(AssertionError):
        law_slope(_Plateau(), logits)


# --- balancing rules ---

SHAPE = GateShape(12, 3, n_group=4, topk_group=2, modalities=MODALITIES, token_frequency=FREQUENCY)


def seen_by(ids: list[I16], scores: list[F32], ranks: int = 2, logits: list[F32] | None = None) -> Seen:
    """A step in which each micro-batch of each rank chose ``ids``; all tokens are in a sample."""
    samples = []
    topics = np.zeros((3, SHAPE.n_routed_experts), np.int64)
    counts = np.zeros((len(ids) // ranks, ranks, SHAPE.n_routed_experts), np.int64)
    for i, (chosen, s) in enumerate(zip(ids, scores, strict=True)):
        topic = (np.arange(len(chosen)) % 3).astype(np.int32)
        sequence = (np.arange(len(chosen)) // 12).astype(np.int32)
        z = np.log(np.maximum(s, 1e-6)) if logits is None else logits[i]
        samples.append(Sample(i // ranks, i % ranks, z.astype(np.float32), s, chosen, topic, sequence, Sigmoid()))
        counts[i // ranks, i % ranks] = PLAIN.expert_tokens(chosen, SHAPE.n_routed_experts)
        for t in range(3):
            topics[t] += PLAIN.expert_tokens(chosen[topic == t], SHAPE.n_routed_experts)
    return Seen(counts, topics, tuple(samples))


def lopsided(rng: np.random.Generator) -> Seen:
    scores = [
        rng.random((18, 12), dtype=np.float32) * 0.5 + np.linspace(0, 0.4, 12, dtype=np.float32) for _ in range(4)
    ]
    return seen_by([PLAIN.topk(s, *_unbiased(12), 3) for s in scores], scores)


def even() -> Seen:
    """Within every topic of every sequence each expert is chosen equally often, and tokens like best what they chose."""
    ids = (np.arange(60)[:, None] // 3 % 4 * 3 + np.arange(3)).astype(np.int16)
    scores = np.full((60, 12), 0.5, np.float32)
    np.put_along_axis(scores, ids.astype(int), np.float32(0.625), axis=1)
    return seen_by([ids] * 4, [scores] * 4)


def law_starts_neutral(rule: Balance, rng: np.random.Generator) -> None:
    state = rule.start(SHAPE)
    assert state.dtype == np.float64 and np.isfinite(state).all()
    move = rule.adjust(state, SHAPE)
    assert (
        (np.asarray(move.scale) == 1).all()
        and (np.asarray(move.shift) == 0).all()
        and (np.asarray(move.offset) == 0).all()
    )


def law_update_is_a_function(rule: Balance, rng: np.random.Generator) -> None:
    """Repeatable, inputs untouched, same shape, finite; and a state moves only if the rule says that it learns."""
    seen = lopsided(rng)
    arrays = [seen.counts, seen.topic_counts, *(a for s in seen.samples for a in (s.logits, s.scores, s.topk_ids))]
    before = [np.array(a) for a in arrays]
    state = rule.start(SHAPE)
    first, again = rule.update(state, seen, SHAPE, 0), rule.update(state, seen, SHAPE, 0)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(state, rule.start(SHAPE))
    for a, b in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.shape == state.shape and first.dtype == np.float64 and np.isfinite(first).all()
    assert bool((first != state).any()) is rule.learns
    move = rule.adjust(first, SHAPE)
    for part in (move.scale, move.shift, move.offset):
        assert np.isfinite(part).all() and np.broadcast_shapes(np.shape(part), (3, 12)) == (3, 12)


def law_even_loads_let_it_rest(rule: Balance, rng: np.random.Generator) -> None:
    state = rule.start(SHAPE)
    np.testing.assert_allclose(rule.update(state, even(), SHAPE, 0), state, atol=1e-12)


def law_no_tokens_no_move(rule: Balance, rng: np.random.Generator) -> None:
    """A step without tokens teaches nothing: the state stays, or some of it is forgotten, by the same share everywhere."""
    start = rule.start(SHAPE)
    state = rule.update(start, lopsided(rng), SHAPE, 0)
    nothing = Seen(np.zeros((2, 2, 12), np.int64), np.zeros((3, 12), np.int64), ())
    away, left = (rule.update(state, nothing, SHAPE, 1) - start), state - start
    for row, before in zip(np.atleast_2d(away), np.atleast_2d(left), strict=True):
        share = row[before != 0] / before[before != 0]
        assert (row[before == 0] == 0).all() and (share > 0).all() and (share <= 1).all()
        assert np.ptp(share) <= 1e-9 if share.size else True


def law_experts_are_alike(rule: Balance, rng: np.random.Generator) -> None:
    """Other names for experts of a group: the same moves under the new names."""
    new = np.concatenate([g * 3 + rng.permutation(3) for g in range(4)])
    seen, back = lopsided(rng), np.argsort(new)
    samples = tuple(
        replace(s, logits=s.logits[:, back], scores=s.scores[:, back], topk_ids=new[s.topk_ids].astype(np.int16))
        for s in seen.samples
    )
    renamed = Seen(seen.counts[..., back], seen.topic_counts[:, back], samples)  # type: ignore[index]
    moves = [rule.adjust(rule.update(rule.start(SHAPE), s, SHAPE, 0), SHAPE) for s in (seen, renamed)]
    for name in ("scale", "shift", "offset"):
        a, b = (np.broadcast_to(getattr(move, name), (3, 12)) for move in moves)
        np.testing.assert_allclose(b, a[:, back], rtol=1e-9, atol=1e-12)


BALANCE_LAWS = [law_starts_neutral, law_update_is_a_function, law_even_loads_let_it_rest, law_no_tokens_no_move, law_experts_are_alike]  # fmt: skip


def balance_variants() -> Iterator[Balance]:
    """Every rule, once per value of each of its choices."""
    model = toy_model(12, 3, n_group=4, topk_group=2)
    for kind, cls in own(Balance).items():
        yield default(cls, model)
        for name, field in cls.model_fields.items():
            for value in [v for v in getattr(field.annotation, "__args__", ()) if isinstance(v, str)]:
                rule = cls.model_validate({"kind": kind, name: value}).for_model(model)
                if name != "kind" and value != field.default and not rule.problems(model):
                    yield rule


BALANCE_CASES = [
    (rule, law) for rule in balance_variants() for law in BALANCE_LAWS
    if not (law is law_even_loads_let_it_rest and not rule.rests_when_even)
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "law"),
    BALANCE_CASES,
    ids=lambda v: (
        "-".join(str(x) for x in v.model_dump().values() if isinstance(x, str)) if isinstance(v, Piece) else v.__name__
    ),
)
def test_every_balancing_rule_keeps_every_law(rule: Balance, law: Law) -> None:
    for seed in range(5):
        law(rule, np.random.default_rng(seed))


def test_rules_that_do_not_rest_do_not() -> None:
    """The exemption is deserved: equal loads move them."""
    for rule in balance_variants():
        if not rule.rests_when_even:
            with pytest.raises(AssertionError):
                law_even_loads_let_it_rest(rule, np.random.default_rng(0))


class _BrokenBalance(Balance):
    kind: str = "broken"
    law: str

    def start(self, shape: GateShape) -> F64:
        return np.full(shape.n_routed_experts, 0.5 if self.law == "law_starts_neutral" else 0.0)

    def adjust(self, state: F64, shape: GateShape) -> Adjustment:
        return Adjustment(shift=state)

    def update(self, state: F64, seen: Seen, shape: GateShape, step: int, gain: float = 1.0) -> F64:
        loads = seen.loads("global_batch")[0].astype(np.float64)
        match self.law:
            case "law_update_is_a_function":
                state -= loads
                return state
            case "law_even_loads_let_it_rest":
                return state - loads
            case "law_no_tokens_no_move":
                return state * 1.01 - (loads - loads.mean()) / max(1.0, loads.mean())
            case "law_experts_are_alike":
                return state - 0.1 * (np.arange(len(state)) + loads - loads.mean())
            case "not finite":
                return state - np.inf
            case _:
                return state - (loads - loads.mean()) / max(1.0, loads.mean())


@pytest.mark.parametrize("law", BALANCE_LAWS, ids=lambda law: law.__name__)
def test_every_balance_law_catches_a_rule_that_breaks_it(law: Law) -> None:
    sound = _BrokenBalance(law="none")
    law(sound, np.random.default_rng(0))
    with pytest.raises(AssertionError):
        law(_BrokenBalance(law=law.__name__), np.random.default_rng(0))
    with pytest.raises(AssertionError):
        law_update_is_a_function(_BrokenBalance(law="not finite"), np.random.default_rng(0))


def _without_force(rule: Balance) -> Balance | None:
    """The rule with every coefficient and rate at 0, or None if it has none."""
    zero = {
        name: 0.0
        for name in type(rule).model_fields
        if name.endswith(("_alpha", "_coef", "bias_update_rate")) and name != "offset_update_rate"
    }
    return rule.model_copy(update=zero) if zero else None


@pytest.mark.parametrize("rule", list(balance_variants()), ids=lambda r: "-".join(str(x) for x in r.model_dump().values() if isinstance(x, str)))  # fmt: skip
def test_no_coefficient_is_no_balancing(rule: Balance) -> None:
    """Coefficient 0 equals plain top-k after any number of steps."""
    still = _without_force(rule)
    if still is None:
        return
    gate = Gate(Gating(balance=(still,)), toy_model(12, 3, n_group=4, topk_group=2), modalities=MODALITIES)
    for step in range(4):
        gate.update(lopsided(np.random.default_rng(step)), step)
        assert gate.is_plain_topk and not gate.moved


# --- capacities ---


def asked_for(rng: np.random.Generator, n_tokens: int = 40) -> Asked:
    scores = rng.random((n_tokens, E), dtype=np.float32) + np.linspace(0, 0.6, E, dtype=np.float32)
    ids = PLAIN.topk(scores, *_unbiased(E), K)
    ids[np.arange(K) >= rng.integers(1, K + 1, n_tokens)[:, None]] = -1
    sequence = (np.arange(n_tokens) // 6).astype(np.int32)
    return Asked(ids, PLAIN.picked(scores, ids), sequence, E, lambda: stream(9, "gate"), K)


def law_keeps_some_of_what_was_asked(rule: Capacity, rng: np.random.Generator) -> None:
    """In place, the same again, inputs untouched."""
    asked = asked_for(rng)
    before = asked.topk_ids.copy(), asked.affinity.copy(), asked.sequence.copy()
    kept = rule.keep(asked)
    np.testing.assert_array_equal(rule.keep(asked), kept)
    for a, b in zip((asked.topk_ids, asked.affinity, asked.sequence), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert kept.dtype == np.int16 and ((kept == asked.topk_ids) | (kept == -1)).all()


def law_more_room_never_drops_more(rule: Capacity, rng: np.random.Generator) -> None:
    """Over factors from 0.1 to beyond all need, where nothing is dropped."""
    asked, before = asked_for(rng), None
    for factor in (0.1, 0.4, 0.8, 1.0, 1.3, 2.0, 1e4):
        kept = rule.model_copy(update={"capacity_factor": factor}).keep(asked)
        assert before is None or (kept[before >= 0] >= 0).all()
        before = kept
    np.testing.assert_array_equal(before, asked.topk_ids)


def law_padding_holds_what_is_kept(rule: Capacity, rng: np.random.Generator) -> None:
    asked = asked_for(rng)
    rows = rule.padded_tokens(len(asked.topk_ids), K, E)
    assert rows is None or PLAIN.expert_tokens(rule.keep(asked), E).max() <= rows


CAPACITY_LAWS = [law_keeps_some_of_what_was_asked, law_more_room_never_drops_more, law_padding_holds_what_is_kept]


def capacity_variants() -> Iterator[Capacity]:
    model = toy_model(E, K, n_group=GROUPS, topk_group=2)
    for kind, cls in own(Capacity).items():
        yield default(cls, model)
        for name, field in cls.model_fields.items():
            choices = (
                [True]
                if field.annotation is bool
                else [v for v in getattr(field.annotation, "__args__", ()) if isinstance(v, str)]
            )
            for value in choices:
                if name != "kind" and value != field.default:
                    yield cls.model_validate({"kind": kind, name: value}).for_model(model)


@pytest.mark.parametrize("law", CAPACITY_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("rule", list(capacity_variants()), ids=lambda r: "-".join(map(str, r.model_dump().values())))
def test_every_capacity_keeps_every_law(rule: Capacity, law: Law) -> None:
    for seed in range(8):
        law(rule, np.random.default_rng(seed))


class _BrokenCapacity(Capacity):
    kind: str = "broken"
    law: str
    capacity_factor: float = 1.0

    def padded_tokens(self, n_tokens: int, k: int, n_routed_experts: int) -> int | None:
        return 1

    def keep(self, asked: Asked) -> I16:
        ids = asked.topk_ids.copy()
        if self.law == "law_keeps_some_of_what_was_asked":  # a dropped choice goes to the next expert instead
            ids[::3, 0] = (ids[::3, 0] + 1) % asked.n_routed_experts
        elif self.law == "law_more_room_never_drops_more":
            ids[: int(min(10.0, 10 * self.capacity_factor))] = -1
        return ids


@pytest.mark.parametrize("law", CAPACITY_LAWS, ids=lambda law: law.__name__)
def test_every_capacity_law_catches_a_rule_that_breaks_it(law: Law) -> None:
    with pytest.raises(AssertionError):
        law(_BrokenCapacity(law=law.__name__), np.random.default_rng(0))


# --- random compositions at work ---

SELECTS = sorted(own(Select))
BALANCES = sorted(own(Balance))
CAPACITIES = sorted(own(Capacity))
SCORES = sorted(own(Score))


@dataclass(frozen=True)
class Turn:
    """One step of a gate: what it saw, what it did, and its states before and after it learned."""

    gate: Gate
    tokens: Tokens
    copies: list[np.ndarray]
    router: Router
    shift: F32
    choices: Choices
    again: Choices
    routing: Routing
    before: list[F64]
    routed: list[F64]
    after: list[F64]


@st.composite
def gatings(draw: st.DrawFn) -> tuple[Gating, Model]:
    """Any selection with any balancing rules, capacity and score function; settings that the pieces themselves allow."""
    n_experts = draw(st.sampled_from([8, 12, 16]))
    k = draw(st.integers(1, 4))
    n_group = draw(st.sampled_from([1, 2, 4]))
    reach = -(-k // (n_experts // n_group))
    topk_group = draw(st.integers(min(reach, n_group), n_group))
    model = toy_model(
        n_experts, k, n_group=n_group, topk_group=topk_group, norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )  # fmt: skip
    fitting = [kind for kind in SELECTS if not default(own(Select)[kind], model).problems(model)]
    select: dict[str, object] = {"kind": draw(st.sampled_from(fitting))}
    fields = own(Select)[str(select["kind"])].model_fields
    for name in ("training", "group_score", "table"):
        if name in fields:
            options = [True, False] if name == "training" else list(fields[name].annotation.__args__)  # type: ignore[union-attr]
            select[name] = draw(st.sampled_from(options))
    balance = [{"kind": kind} for kind in draw(st.lists(st.sampled_from(BALANCES), min_size=1, max_size=3))]
    for rule in balance:
        if "scope" in own(Balance)[rule["kind"]].model_fields:
            options = own(Balance)[rule["kind"]].model_fields["scope"].annotation.__args__  # type: ignore[union-attr]
            rule["scope"] = draw(st.sampled_from(list(options)))
        if rule["kind"] == "bias":
            rule |= draw(st.fixed_dictionaries({"bias_update_rate": st.sampled_from([1e-3, 0.1]), "form": st.sampled_from(["additive", "multiplicative"])}))  # type: ignore[arg-type]  # fmt: skip
            if rule["scope"] == "global_batch":
                rule["per"] = draw(st.sampled_from(["all", "modality"]))
    capacity: dict[str, object] = {"kind": draw(st.sampled_from(CAPACITIES))}
    fields = own(Capacity)[str(capacity["kind"])].model_fields
    if "capacity_factor" in fields:
        capacity["capacity_factor"] = draw(st.sampled_from([0.5, 1.0, 1.25, 4.0]))
    if "drop_policy" in fields:
        capacity["drop_policy"] = draw(st.sampled_from(list(fields["drop_policy"].annotation.__args__)))  # type: ignore[union-attr]
    gating = Gating.model_validate(
        {
            "score": draw(st.sampled_from(SCORES)),
            "select": select,
            "balance": balance,
            "capacity": capacity,
            "router_jitter_noise": draw(st.sampled_from([0.0, 0.01])),
        }
    )
    return gating, model


def play(gate: Gate, seed: int, steps: int = 3, n_tokens: int = 24, hard: bool = False) -> list[Turn]:
    """Let a gate route two ranks' tokens per step and learn from them."""
    turns = []
    n_experts = gate.n_routed_experts
    for step in range(steps):
        counts = np.zeros((1, 2, n_experts), np.int64)
        topics, samples, mine = np.zeros((3, n_experts), np.int64), [], []
        for rank in range(2):
            rng = np.random.default_rng((seed, step, rank))
            logits = (rng.standard_normal((n_tokens, n_experts)) + np.linspace(-1, 1, n_experts)).astype(np.float32)
            if hard:
                logits = (logits * np.array([1e4, 0, 1])[rng.integers(0, 3, n_tokens), None]).astype(np.float32)
                logits = np.clip(logits, -1e4, 1e4)
            tokens = Tokens(
                rank, logits, rng.integers(0, 3, n_tokens, dtype=np.int32), np.sort(rng.integers(0, 4, n_tokens)).astype(np.int32),
                rng.integers(0, VOCABULARY, n_tokens, dtype=np.int32), PLAIN.topk(rng.random(logits.shape, dtype=np.float32), *_unbiased(n_experts), gate.k),
            )  # fmt: skip
            copies = [np.array(a) for a in (logits, tokens.topic, tokens.sequence, tokens.token_ids, tokens.topk_ids)]
            before = [s.copy() for s in gate.states]

            def draw(rank: int = rank, step: int = step) -> np.random.Generator:
                return stream(seed, "gate", step, rank)

            router = gate.router(logits, tokens.topic, draw)
            choices, again = (gate.choose(router.scores, draw, tokens, logits=router.logits) for _ in range(2))
            routing = gate.route(tokens, draw)
            routed = [s.copy() for s in gate.states]
            counts[0, rank] = PLAIN.expert_tokens(choices.asked, n_experts)
            for t in range(3):
                topics[t] += PLAIN.expert_tokens(choices.asked[tokens.topic == t], n_experts)
            samples.append(
                Sample(0, rank, router.logits, router.scores, choices.asked, tokens.topic, tokens.sequence, gate.score)
            )
            mine.append((tokens, copies, router, gate.shift, choices, again, routing, before, routed))
        gate.update(Seen(counts, topics, tuple(samples)), step)
        after = [s.copy() for s in gate.states]
        turns += [Turn(gate, *parts, after) for parts in mine]
    return turns


def law_ids(turn: Turn) -> None:
    gate = turn.gate
    _valid(gate.select, turn.choices.asked, turn.tokens.n_tokens, gate.n_routed_experts, gate.k)


def law_kept_of_asked(turn: Turn) -> None:
    asked, kept = turn.choices.asked, turn.choices.kept
    assert kept.shape == asked.shape and ((kept == asked) | (kept == -1)).all()
    np.testing.assert_array_equal(turn.routing.topk_ids, kept)


def law_repeatable(turn: Turn) -> None:
    np.testing.assert_array_equal(turn.choices.asked, turn.again.asked)
    np.testing.assert_array_equal(turn.choices.kept, turn.again.kept)


def law_nothing_touched(turn: Turn) -> None:
    """Routing leaves tokens and states alone: a step selects with the state from before it."""
    t = turn.tokens
    for now, copy in zip((t.logits, t.topic, t.sequence, t.token_ids, t.topk_ids), turn.copies, strict=True):
        np.testing.assert_array_equal(now, copy)
    for now, then in zip(turn.routed, turn.before, strict=True):
        np.testing.assert_array_equal(now, then)


def law_weights(turn: Turn) -> None:
    """Finite, not negative, 0 without an expert, made of unbiased scores, normalised over what the token chose from."""
    gate, weights = turn.gate, turn.routing.topk_weights
    assert weights is not None and weights.dtype == np.float32 and np.isfinite(weights).all() and (weights >= 0).all()
    kept = turn.choices.kept
    assert (weights[kept < 0] == 0).all()
    chosen = turn.choices.asked if turn.choices.considered is None else turn.choices.considered
    affinity = np.where(
        chosen >= 0, np.take_along_axis(turn.router.scores, np.maximum(chosen, 0).astype(int), axis=1), 0
    ).astype(np.float64)
    total = affinity.sum(axis=1)
    if gate.norm_topk_prob:
        affinity /= total[:, None] + 1e-20
    expected = np.where(kept >= 0, affinity * gate.routed_scaling_factor, 0)
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-7)
    if gate.norm_topk_prob:
        whole = (kept == chosen).all(axis=1) & (total > 1e-12)  # DeepSeek's 1e-20 in the divisor
        np.testing.assert_allclose(weights.sum(axis=1)[whole], gate.routed_scaling_factor, rtol=1e-5)
        assert (weights.sum(axis=1) <= gate.routed_scaling_factor * (1 + 1e-5)).all()


def law_states(turn: Turn) -> None:
    for before, after in zip(turn.before, turn.after, strict=True):
        assert after.shape == before.shape and after.dtype == np.float64 and np.isfinite(after).all()
    assert np.isfinite(turn.router.logits).all() and np.isfinite(turn.router.scores).all()


def law_capacity_does_not_choose(turn: Turn) -> None:
    """What tokens ask for does not depend on what will be dropped, and endless capacity drops nothing."""
    gate = turn.gate
    capacity = gate.capacity
    try:
        gate.capacity = Gating().capacity
        free = gate.choose(turn.router.scores, lambda: stream(0, "unused"), turn.tokens, logits=turn.router.logits)
        assert free.kept is free.asked
        if type(capacity).model_fields.get("capacity_factor"):
            gate.capacity = capacity.model_copy(update={"capacity_factor": 1e4})
            wide = gate.choose(turn.router.scores, lambda: stream(0, "unused"), turn.tokens, logits=turn.router.logits)
            np.testing.assert_array_equal(wide.kept, wide.asked)
            np.testing.assert_array_equal(wide.asked, free.asked)
    finally:
        gate.capacity = capacity


def law_groups(turn: Turn) -> None:
    """A limit on groups holds under every bias."""
    limit, n_group = getattr(turn.gate.select, "topk_group", None), getattr(turn.gate.select, "n_group", None)
    if limit and n_group:
        size = turn.gate.n_routed_experts // n_group
        assert max(len({e // size for e in row if e >= 0}) for row in turn.choices.asked.tolist()) <= limit


def law_places(turn: Turn) -> None:
    """Each expert keeps as many as it has places for, not one more, and not one less while choices are left."""
    gate, capacity = turn.gate, turn.gate.capacity
    if isinstance(capacity, ExpertCapacity):
        places = capacity.capacity(turn.tokens.n_tokens, gate.k, gate.n_routed_experts)
        asked, kept = (
            PLAIN.expert_tokens(ids, gate.n_routed_experts) for ids in (turn.choices.asked, turn.choices.kept)
        )
        assert (kept <= places).all()
        if not gate.select.dismissed_take_places:
            np.testing.assert_array_equal(kept, np.minimum(asked, places))


TURN_LAWS = [law_ids, law_places, law_kept_of_asked, law_repeatable, law_nothing_touched, law_weights, law_states, law_capacity_does_not_choose, law_groups]  # fmt: skip


def _gate(gating: Gating, model: Model, kind: type[Gate] = Gate) -> Gate:
    return kind(gating, model, modalities=MODALITIES, token_frequency=FREQUENCY)


@given(gatings(), st.integers(0, 10_000), st.booleans())
def test_every_composition_keeps_every_law(made: tuple[Gating, Model], seed: int, hard: bool) -> None:
    """Three steps of routing and learning; ``hard``: logits of +-1e4 and tokens without any preference among them."""
    gating, model = made
    with np.errstate(all="raise", under="ignore"):
        turns = play(_gate(gating, model), seed, hard=hard)
    # States have moved on since a turn was played: laws that choose anew look at the last one.
    for turn in turns:
        for law in TURN_LAWS:
            if law is not law_capacity_does_not_choose:
                law(turn)
    gate = _gate(gating, model)
    law_capacity_does_not_choose(play(gate, seed, steps=1)[0])


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("balance", BALANCES)
def test_every_pair_of_selection_and_balance_works(select: str, balance: str) -> None:
    """No pair is left to chance."""
    model = toy_model(8, 2, n_group=2, topk_group=2)
    gating = Gating.model_validate({"select": select, "balance": balance, "capacity": "expert_capacity"})
    for turn in play(_gate(gating, model), 1, steps=2, n_tokens=8):
        for law in TURN_LAWS:
            if law is not law_capacity_does_not_choose:
                law(turn)


# --- a broken piece for each of these laws ---


class _BadIds(TopK):
    kind: str = "bad"  # type: ignore[assignment]
    fault: Literal["twice", "beyond", "random", "writes", "groups"]
    n_group: int = 4
    topk_group: int = 1
    varies: ClassVar[bool] = False

    def select(self, candidates: Candidates) -> I16:
        ids = super().select(candidates)
        if self.fault == "twice":
            ids[:, 1] = ids[:, 0]
        elif self.fault == "beyond":
            ids[0, 0] = candidates.scores.shape[1]
        elif self.fault == "random":
            ids = np.random.default_rng().permuted(ids, axis=1)
            ids = ids if np.random.default_rng().random() < 0.5 else np.roll(ids, 1, axis=0)
        elif self.fault == "writes" and candidates.token_ids is not None:
            candidates.token_ids[:] = 0
        return ids


class _Redirects(Capacity):
    kind: str = "redirects"

    def keep(self, asked: Asked) -> I16:
        return np.where(asked.topk_ids == 0, 1, asked.topk_ids).astype(np.int16)


class _Overfull(ExpertCapacity):
    kind: str = "overfull"  # type: ignore[assignment]

    def keep(self, asked: Asked) -> I16:
        return asked.topk_ids


class _Thief(Capacity):
    """Drops whatever the factor."""

    kind: str = "thief"
    capacity_factor: float = 1.0

    def keep(self, asked: Asked) -> I16:
        ids = asked.topk_ids.copy()
        ids[0] = -1
        return ids


class _Runaway(_BrokenBalance):
    law: str = "not finite"


class _BiasedWeights(Gate):
    """Weights from what selection ranked: the mistake that loss-free balancing warns of."""

    def weights(self, scores: F32, topk_ids: I16) -> F32:
        return super().weights(scores + 1 + self.shift.max(), topk_ids)


class _Unnormalised(Gate):
    def weights(self, scores: F32, topk_ids: I16) -> F32:
        return PLAIN.picked(scores, topk_ids)


CONTROLS: list[tuple[Law, dict[str, Any], type[Gate]]] = [
    (law_ids, {"select": _BadIds(fault="twice")}, Gate),
    (law_ids, {"select": _BadIds(fault="beyond")}, Gate),
    (law_kept_of_asked, {"capacity": _Redirects()}, Gate),
    (law_places, {"capacity": _Overfull(capacity_factor=0.5)}, Gate),
    (law_repeatable, {"select": _BadIds(fault="random")}, Gate),
    (law_nothing_touched, {"select": _BadIds(fault="writes")}, Gate),
    (law_weights, {}, _BiasedWeights),
    (law_weights, {}, _Unnormalised),
    (law_states, {"balance": (_Runaway(),)}, Gate),
    (law_capacity_does_not_choose, {"capacity": _Thief()}, Gate),
    (law_groups, {"select": _BadIds(fault="groups")}, Gate),
]


@pytest.mark.parametrize(("law", "broken", "kind"), CONTROLS)
def test_every_law_of_compositions_catches_a_piece_that_breaks_it(
    law: Law, broken: dict[str, Any], kind: type[Gate]
) -> None:
    model = toy_model(E, K, norm_topk_prob=True)
    law(play(_gate(Gating(), model), 0, steps=1)[0])
    with pytest.raises((AssertionError, IndexError)):
        gate = _gate(Gating.model_validate(broken), model, kind)
        for turn in play(gate, 0, steps=1):
            law(turn)


def test_every_law_has_a_control() -> None:
    assert {law for law, _, _ in CONTROLS} == set(TURN_LAWS)


# --- what holds between two gates ---


@given(gatings(), st.integers(0, 10_000))
def test_more_capacity_drops_less_in_every_composition(made: tuple[Gating, Model], seed: int) -> None:
    gating, model = made
    if "capacity_factor" not in type(gating.capacity).model_fields:
        return
    dropped = []
    for factor in (0.3, 0.7, 1.0, 1.5, 3.0, 100.0):
        capacity = gating.capacity.model_copy(update={"capacity_factor": factor})
        (turn, _) = play(_gate(gating.model_copy(update={"capacity": capacity}), model), seed, steps=1)
        dropped.append(int(np.count_nonzero(turn.choices.asked >= 0) - np.count_nonzero(turn.choices.kept >= 0)))
    assert dropped == sorted(dropped, reverse=True) and dropped[-1] == 0


@given(gatings(), st.integers(0, 10_000))
def test_a_gate_alone_is_the_gate_among_others(made: tuple[Gating, Model], seed: int) -> None:
    """No state is shared: a gate that ran after another one does what it does by itself."""
    gating, model = made
    alone = play(_gate(gating, model), seed, steps=2)[-1]
    play(_gate(Gating.model_validate({"select": "random", "balance": "bias"}), model), seed + 1)
    after = play(_gate(gating, model), seed, steps=2)[-1]
    np.testing.assert_array_equal(after.routing.topk_ids, alone.routing.topk_ids)
    for a, b in zip(after.after, alone.after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_bias_per_modality_reaches_every_rule() -> None:
    """Rules that look at logits, and rules that judge sizes, see the bias where they rank and nowhere else."""
    model = toy_model(8, 2)
    for kind in SELECTS:
        policies = [
            Gating.model_validate({"select": kind, "balance": {"kind": "bias", "per": per, "bias_update_rate": 0.05}})
            for per in ("all", "modality")
        ]
        one, each = (_gate(policy, model) for policy in policies)
        each.states = [np.repeat(np.linspace(-0.2, 0.2, 8)[None], 2, axis=0)]
        one.states = [np.linspace(-0.2, 0.2, 8)[None]]
        for gate in (one, each):
            gate._adjust()
        each.shift = np.repeat(one.shift[None], 3, axis=0)  # per topic, although all are the same
        a, b = (play(gate, 3, steps=1)[0] for gate in (one, each))
        np.testing.assert_array_equal(a.choices.asked, b.choices.asked, err_msg=kind)


def test_the_even_step_is_even() -> None:
    """A guard on this file: what the law of even loads shows to the rules."""
    seen = even()
    assert len({int(c) for c in seen.counts.ravel()}) == 1 and len({int(c) for c in seen.topic_counts.ravel()}) == 1  # type: ignore[union-attr]
    for sample in seen.samples:
        for sequence in range(5):
            for topic in range(3):
                rows = (sample.sequence == sequence) & (sample.topic == topic)
                assert PLAIN.expert_tokens(sample.topk_ids[rows], 12).tolist() == [1] * 12
