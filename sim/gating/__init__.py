"""A gate is composed: score x select x balance x capacity. Published gates are presets of this composition.

Knows tokens and experts only; no clock, no device, no topic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict

from sim.gating.balance import Balance
from sim.gating.balance.none import NoBalance
from sim.gating.capacity import Capacity
from sim.gating.capacity.none import NoCapacity
from sim.gating.score import Score
from sim.gating.select import Candidates, Select
from sim.gating.select.topk import TopK
from sim.kernels.choose import Kernels, choose
from sim.model import Model
from sim.plugin import Choice, make
from sim.tokens import F32, F64, I16, I64, Routing, Tokens

__all__ = ["Gate", "Gating"]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


class Gating(BaseModel):
    """The configuration of a gate.

    score: by default the model's ``scoring_func``. select, capacity: one rule each. balance: one rule or a list; their
    scales multiply, their shifts add. norm_topk_prob, routed_scaling_factor: by default the model's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    score: Annotated[Score, Choice(Score)] | None = None
    select: Annotated[Select, Choice(Select)] = TopK()
    balance: Annotated[tuple[Annotated[Balance, Choice(Balance)], ...], BeforeValidator(_as_list)] = (NoBalance(),)
    capacity: Annotated[Capacity, Choice(Capacity)] = NoCapacity()
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float | None = None

    @property
    def learns(self) -> bool:
        """Whether some balancing rule has a state that steps change."""
        return any(rule.kind != "none" for rule in self.balance)


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

    def __init__(self, gating: Gating, model: Model, kernels: Kernels | None = None) -> None:
        self.n_routed_experts = model.n_routed_experts
        self.k = model.num_experts_per_tok
        self.score = gating.score or make(Score, model.scoring_func)
        self.select = gating.select.for_model(model)
        self.balance: Sequence[Balance] = gating.balance
        self.capacity = gating.capacity
        self.norm_topk_prob = model.norm_topk_prob if gating.norm_topk_prob is None else gating.norm_topk_prob
        scale = gating.routed_scaling_factor
        self.routed_scaling_factor = model.routed_scaling_factor if scale is None else scale
        self.kernels = kernels or choose(0)
        self.states: list[F64] = [rule.start(self.n_routed_experts) for rule in self.balance]
        self._adjust()

    def _adjust(self) -> None:
        scale, shift = np.ones(self.n_routed_experts), np.zeros(self.n_routed_experts)
        for rule, state in zip(self.balance, self.states, strict=True):
            factor, term = rule.adjust(state)
            scale, shift = scale * factor, shift + term
        self.scale, self.shift = scale.astype(np.float32), shift.astype(np.float32)

    @property
    def is_plain_topk(self) -> bool:
        """Whether the gate, as its states stand, picks exactly the unrestricted top-k of the unbiased scores."""
        return isinstance(self.select, TopK) and bool((self.scale == 1).all() and (self.shift == 0).all())

    def choose(
        self, scores: F32, rng: Callable[[], np.random.Generator], recorded: I16 | None = None, plain: I16 | None = None
    ) -> I16:
        """Return the expert ids, [T, k] int16, after capacity.

        scores: [T, E] float32 of this gate's score function. rng: makes the random stream, if the rule wants one.
        plain: the unrestricted top-k of ``scores`` if the caller has it, so that it is not computed twice.
        """
        if plain is not None and self.is_plain_topk:
            ids = plain
        else:
            ids = self.select.select(Candidates(scores, self.scale, self.shift, self.k, self.kernels, rng, recorded))
        if isinstance(self.capacity, NoCapacity):
            return ids
        return self.capacity.keep(ids, self.kernels.picked(scores, ids), self.n_routed_experts)

    def weights(self, scores: F32, topk_ids: I16) -> F32:
        """Return the gate weights [T, k] float32: unbiased scores, normalised and scaled as the model says."""
        weights = self.kernels.picked(scores, topk_ids)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-20))
        return weights * np.float32(self.routed_scaling_factor)

    def route(self, tokens: Tokens, rng: Callable[[], np.random.Generator] = np.random.default_rng) -> Routing:
        """Route one rank's tokens: ids and weights. Raises ValueError if the tokens lack what the rule needs."""
        if tokens.logits is None:
            if tokens.topk_ids is None or self.select.needs != "ids":
                raise ValueError(f"these tokens carry recorded ids only; select {self.select.kind} needs logits")
            weights = tokens.topk_weights
            if weights is None:
                weights = np.full(tokens.topk_ids.shape, 1.0 / tokens.topk_ids.shape[1], dtype=np.float32)
            return Routing(tokens.topk_ids, weights)
        scores = self.score.scores(tokens.logits, self.kernels)
        ids = self.choose(scores, rng, tokens.topk_ids)
        return Routing(ids, self.weights(scores, ids))

    def update(self, counts: I64, step: int, gain: float = 1.0) -> None:
        """Let the balancing rules learn from ``counts`` [M, P, E] (see `Balance.update`)."""
        self.states = [
            rule.update(state, counts, step, gain) for rule, state in zip(self.balance, self.states, strict=True)
        ]
        self._adjust()
