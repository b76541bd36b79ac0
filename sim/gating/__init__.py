"""A gate is composed: score x select x balance x capacity. Published gates are presets of this composition.

Knows tokens, topics and experts only; no clock, no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sim.gating.balance import Balance, Seen
from sim.gating.balance.none import NoBalance
from sim.gating.capacity import Asked, Capacity
from sim.gating.capacity.none import NoCapacity
from sim.gating.piece import GateShape, Piece
from sim.gating.score import Score
from sim.gating.select import Candidates, Select
from sim.gating.select.topk import TopK
from sim.kernels.choose import Kernels, choose
from sim.model import Model
from sim.plugin import Choice, make
from sim.tokens import F32, F64, I16, I32, Routing, Tokens

__all__ = ["Choices", "Gate", "GateShape", "Gating", "Router", "recorded_affinity"]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


class Gating(BaseModel):
    """The configuration of a gate.

    score: by default the model's ``scoring_func``. select, capacity: one rule each. balance: one rule or a list; their
    scales multiply, their shifts and offsets add. num_experts_per_tok, norm_topk_prob, routed_scaling_factor: by default
    the model's. router_jitter_noise: eps of the multiplicative noise U(1 - eps, 1 + eps) on the router's input during
    training (Switch, appendix; Megatron ``moe_input_jitter_eps``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    score: Annotated[Score, Choice(Score)] | None = None
    select: Annotated[Select, Choice(Select)] = TopK()
    balance: Annotated[tuple[Annotated[Balance, Choice(Balance)], ...], BeforeValidator(_as_list)] = (NoBalance(),)
    capacity: Annotated[Capacity, Choice(Capacity)] = NoCapacity()
    num_experts_per_tok: int | None = Field(default=None, gt=0)
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float | None = Field(default=None, ge=-1e6, le=1e6)
    router_jitter_noise: float = Field(default=0.0, ge=0, lt=1)

    @property
    def learns(self) -> bool:
        """Whether some balancing rule has a state that steps change."""
        return any(rule.learns for rule in self.balance)

    def pieces(self) -> Iterator[tuple[tuple[str | int, ...], Piece]]:
        """Yield ``(path, piece)`` of every part that is set."""
        if self.score is not None:
            yield ("score",), self.score
        yield ("select",), self.select
        for i, rule in enumerate(self.balance):
            yield ("balance", i), rule
        yield ("capacity",), self.capacity


@dataclass(frozen=True, slots=True)
class Router:
    """What a gate's router sees of some tokens: [T, E] float32 logits and affinities, its learned offsets included."""

    logits: F32
    scores: F32


@dataclass(frozen=True, slots=True)
class Choices:
    """[T, k] int16 expert ids, best first, -1 = none.

    asked: what the tokens asked for; kept: what capacity let through. considered: what they would have asked for without
    the draw that dismisses some (see `Select.before_chance`), or None if there is none.
    """

    asked: I16
    kept: I16
    considered: I16 | None = None


class Gate:
    """A gate at work in one MoE layer: its configuration, and the state of its balancing rules.

    >>> from sim.gating.select.group_limited import GroupLimited
    >>> model = Model(name="toy", num_hidden_layers=1, hidden_size=8, vocab_size=8, num_attention_heads=1,
    ...     n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, scoring_func="sigmoid",
    ...     norm_topk_prob=True)
    >>> gate = Gate(Gating(select=GroupLimited(n_group=2, topk_group=1, group_score="max")), model)
    >>> logits = np.array([[0.0, 1.0, 2.0, -1.0]], dtype=np.float32)
    >>> routing = gate.route(Tokens(rank=0, logits=logits, topic=np.zeros(1, dtype=np.int32)))
    >>> routing.topk_ids.tolist(), routing.topk_weights.astype(float).round(3).tolist()
    ([[2, 3]], [[0.766, 0.234]])
    """

    def __init__(
        self,
        gating: Gating,
        model: Model,
        kernels: Kernels | None = None,
        *,
        modalities: tuple[str, ...] = ("text",),
        token_frequency: F64 | None = None,
        dynamics: tuple[Balance, ...] = (),
    ) -> None:
        """dynamics: assumed changes of the router itself (see `Scenario.router_dynamics`); their offsets belong to the
        natural affinity, those of ``gating.balance`` do not."""
        self.k = gating.num_experts_per_tok or model.num_experts_per_tok
        self.shape = GateShape(
            model.n_routed_experts, self.k, model.n_group, model.topk_group, modalities, token_frequency
        )
        self.score = gating.score or make(Score, model.scoring_func)
        self.select = gating.select.for_model(model)
        self.dynamics, self.balance = dynamics, tuple(rule.for_model(model) for rule in gating.balance)
        self.capacity = gating.capacity.for_model(model)
        self.norm_topk_prob = model.norm_topk_prob if gating.norm_topk_prob is None else gating.norm_topk_prob
        scale = gating.routed_scaling_factor
        self.routed_scaling_factor = model.routed_scaling_factor if scale is None else scale
        self.jitter = gating.router_jitter_noise
        self.kernels = kernels or choose(0)
        self.states: list[F64] = [rule.start(self.shape) for rule in self.rules]
        self._adjust()

    @property
    def n_routed_experts(self) -> int:
        return self.shape.n_routed_experts

    @property
    def rules(self) -> tuple[Balance, ...]:
        """The rules behind ``states``, in order."""
        return (*self.balance, *self.dynamics)

    @property
    def samples(self) -> bool:
        """Whether some rule learns from sampled tokens."""
        return any(rule.samples for rule in self.rules)

    @property
    def looks_across_tokens(self) -> bool:
        """Whether a token's experts depend on its neighbours."""
        return not self.select.per_token or not isinstance(self.capacity, NoCapacity)

    def _adjust(self) -> None:
        scale, shift = np.ones((1, self.n_routed_experts)), np.zeros((1, self.n_routed_experts))
        own, natural = np.zeros(1), np.zeros(1)
        for i, (rule, state) in enumerate(zip(self.rules, self.states, strict=True)):
            move = rule.adjust(state, self.shape)
            scale, shift = scale * move.scale, shift + move.shift
            if i < len(self.balance):
                own = own + move.offset
            else:
                natural = natural + move.offset
        self.scale, self.shift = _per_topic(scale), _per_topic(shift)
        self.natural_offset, self.offset = _offset(natural), _offset(natural + own)
        self.moved = bool(np.any(own))

    @property
    def is_plain_topk(self) -> bool:
        """Whether the gate, as its states stand, picks exactly the unrestricted top-k of the unbiased scores."""
        return isinstance(self.select, TopK) and bool((self.scale == 1).all() and (self.shift == 0).all())

    def natural_logits(self, logits: F32, topic: I32) -> F32:
        """Return the logits that define a token's natural affinity: the traffic's, moved by the assumed dynamics."""
        return _moved(logits, self.natural_offset, topic)

    def router(self, logits: F32, topic: I32, rng: Callable[[], np.random.Generator], training: bool = True) -> Router:
        """Return what this gate's router makes of natural ``logits`` [T, E] of tokens with ``topic`` [T]."""
        moved = _moved(logits, self.offset, topic)
        if training and self.jitter > 0:
            # The noise multiplies each input feature; over many features it adds a normal of this spread to a logit.
            spread = np.sqrt(np.mean(np.square(moved, dtype=np.float64), axis=1, keepdims=True))
            noise = rng().standard_normal(moved.shape, dtype=np.float32)
            moved = moved + (self.jitter / 3.0**0.5 * spread).astype(np.float32) * noise
        return Router(moved, self.score.scores(moved, self.kernels))

    def choose(
        self,
        scores: F32,
        rng: Callable[[], np.random.Generator],
        tokens: Tokens | None = None,
        *,
        logits: F32 | None = None,
        plain: I16 | None = None,
    ) -> Choices:
        """Choose experts for tokens with affinities ``scores`` [T, E] float32.

        rng: makes the random stream, if a rule wants one. tokens: their topics, sequences, vocabulary indices, recorded
        choices. logits: behind the scores. plain: the unrestricted top-k of ``scores`` if the caller has it, so that it
        is not computed twice.
        """
        considered = None
        if plain is not None and self.is_plain_topk:
            asked = plain
        else:
            scale, shift = self.scale, self.shift
            ranked = scores
            if scale.ndim > 1 or shift.ndim > 1:
                if tokens is None:
                    raise ValueError("a bias per modality needs the tokens' topics")
                by_token = _rows(scale, tokens.topic), _rows(shift, tokens.topic)
                ranked = scores * by_token[0] + by_token[1]
                logits = None if logits is None else logits * by_token[0] + by_token[1]
                scale, shift = np.ones(scores.shape[1], np.float32), np.zeros(scores.shape[1], np.float32)
            candidates = Candidates(
                ranked,
                scale,
                shift,
                self.k,
                self.kernels,
                rng,
                tokens.topk_ids if tokens else None,
                logits,
                tokens.token_ids if tokens else None,
                self.shape.token_frequency,
                scores,
            )
            asked = self.select.select(candidates)
            considered = self.select.before_chance(candidates)
        return Choices(asked, self._keep(asked, considered, scores, tokens, rng), considered)

    def _keep(
        self,
        asked: I16,
        considered: I16 | None,
        scores: F32,
        tokens: Tokens | None,
        rng: Callable[[], np.random.Generator],
    ) -> I16:
        """Return ``asked`` [T, k] with -1 for what the capacity drops."""
        if isinstance(self.capacity, NoCapacity):
            return asked
        affinity = self.kernels.picked(scores, asked)
        weight = self.weights(scores, asked if considered is None else considered)
        sequence = np.zeros(len(asked), np.int32) if tokens is None else tokens.sequences
        in_line = considered if self.select.dismissed_take_places else None
        lot = None if tokens is None else tokens.lot
        return self.capacity.keep(
            Asked(asked, affinity, sequence, self.n_routed_experts, rng, self.k, weight, in_line, lot)
        )

    def keep_recorded(self, tokens: Tokens, rng: Callable[[], np.random.Generator]) -> Choices:
        """Apply the capacity to recorded choices; without recorded weights all affinities are equal."""
        asked = tokens.topk_ids
        if asked is None:
            raise ValueError("tokens carry neither logits nor recorded choices")
        if isinstance(self.capacity, NoCapacity):
            return Choices(asked, asked)
        affinity = recorded_affinity(tokens)
        # Recorders store a token's experts in any order; what ranks choices needs the best first.
        order = np.argsort(-affinity, axis=1, kind="stable")
        best_first, by = np.take_along_axis(asked, order, axis=1), np.take_along_axis(affinity, order, axis=1)
        sorted_kept = self.capacity.keep(
            Asked(best_first, by, tokens.sequences, self.n_routed_experts, rng, self.k, lot=tokens.lot)
        )
        kept = np.empty_like(asked)
        np.put_along_axis(kept, order, sorted_kept, axis=1)
        return Choices(asked, kept)

    def weights(self, scores: F32, topk_ids: I16) -> F32:
        """Return the gate weights [T, k] float32: unbiased scores, normalised and scaled as the model says.

        Normalised over ``topk_ids``, which are a token's experts before capacity: what is dropped takes its share along
        (GShard, Algorithm 1; Megatron-LM).
        """
        weights = self.kernels.picked(scores, topk_ids)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-20))
        return weights * np.float32(self.routed_scaling_factor)

    def route(self, tokens: Tokens, rng: Callable[[], np.random.Generator] = np.random.default_rng) -> Routing:
        """Route one rank's tokens: ids and weights. Raises ValueError if the tokens lack what the rule needs."""
        if tokens.logits is None:
            if tokens.topk_ids is None or self.select.needs != "ids":
                raise ValueError(f"these tokens carry recorded ids only; select {self.select.kind} needs logits")
            ids = self.keep_recorded(tokens, rng).kept
            weights = tokens.topk_weights
            if weights is None:
                weights = np.full(ids.shape, 1.0 / ids.shape[1], dtype=np.float32)
            return Routing(ids, np.where(ids >= 0, weights, np.float32(0.0)))
        router = self.router(tokens.logits, tokens.topic, rng)
        choices = self.choose(router.scores, rng, tokens, logits=router.logits)
        weights = self.weights(router.scores, choices.asked if choices.considered is None else choices.considered)
        return Routing(choices.kept, np.where(choices.kept >= 0, weights, np.float32(0.0)))

    def update(self, seen: Seen, step: int, gain: float = 1.0, *, warming_up: bool = False) -> None:
        """Let the rules learn from a step; while warming up, the assumed dynamics of training stand still."""
        moving = len(self.balance) if warming_up else len(self.rules)
        self.states = [
            rule.update(state, seen, self.shape, step, gain) if i < moving else state
            for i, (rule, state) in enumerate(zip(self.rules, self.states, strict=True))
        ]
        self._adjust()


def _per_topic(values: F64) -> F32:
    """[E] float32 where all topics share a row, [topics, E] otherwise."""
    shared = len(values) == 1 or bool((values == values[0]).all())
    found: F32 = (values[0] if shared else values).astype(np.float32)
    return found


def _offset(values: F64) -> F32 | None:
    return np.atleast_1d(values).astype(np.float32) if np.any(values) else None


def _rows(values: F32, topic: I32) -> F32:
    return values[topic] if values.ndim > 1 else values


def _moved(logits: F32, offset: F32 | None, topic: I32) -> F32:
    if offset is None:
        return logits
    moved: F32 = logits + _rows(offset, topic)
    return moved


def recorded_affinity(tokens: Tokens) -> F32:
    """Return the recorded gate weights [T, k] float32, or ones: without weights every choice weighs the same."""
    if tokens.topk_ids is None:
        raise ValueError("tokens carry neither logits nor recorded choices")
    if tokens.topk_weights is None:
        return np.ones(tokens.topk_ids.shape, dtype=np.float32)
    return tokens.topk_weights
