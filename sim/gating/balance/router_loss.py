"""What the losses on a router share: logit offsets that a loss pushes and the language model pulls back.

A loss moves a trained router; here nothing is trained, so each topic's tokens get an offset theta per expert, and a step is

    theta <- theta - rate (alpha / lambda * g + theta)

with g the mean gradient of the published loss with respect to the logits of that topic's tokens and lambda the strength
of the language model's own preference. What it settles at depends on alpha / lambda alone; `PULL_BACK` says how lambda
was set. Balance losses are L = sum_i F_i P_i with F detached (Switch, arXiv 2101.03961, eq. 4-6; GShard, arXiv
2006.16668, Algorithm 1; DeepSeek-V2 report, section 2.2.3; DeepSeek-V3 report, eq. 17-20) and differ in F only.
Knows no language-model loss: kept affinity is the only cost of balance that is seen.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from sim.gating.balance import Adjustment, Balance, Sample, Scope, Seen, scheduled
from sim.gating.piece import GateShape
from sim.kernels import plain
from sim.model import Model
from sim.tokens import F64, I16, I64

PULL_BACK = 7.3e-6
"""lambda: ``scenarios/aux_loss.yaml`` shows MaxVio_global 0.72 at alpha = 1e-3, as arXiv 2408.15664 reports in Table 2.
Known to about a quarter: MaxVio goes as lambda^0.75 there, and replicas with other popularities differ by a fifth."""


@dataclass(frozen=True, slots=True)
class Push:
    """What a loss does to sampled tokens [S, E] float64: its gradient and, roughly, by how much a logit's rise raises it."""

    gradient: F64
    response: F64


class RouterLoss(Balance):
    """A loss that acts through one logit offset per topic and expert, from 0.

    pull_back: lambda. offset_update_rate: share of the way to rest that a step goes in each expert; the step is shortened
    by 1 + loop gain, so that any coefficient is stable. Warm-up's gain is not used: a step is as long as it may be.
    stop_after_step: from this step on the offsets stand still, as a trained router does on a validation set; with
    ``decay: linear`` their rate has fallen to 0 linearly by then, so that they do not keep the last batches' noise.
    Topics without tokens in a step stay where they are.
    """

    pull_back: float = Field(default=PULL_BACK, ge=1e-15, le=1e15)
    offset_update_rate: float = Field(default=0.1, gt=0, le=1)
    stop_after_step: int | None = Field(default=None, ge=0)
    decay: Literal["constant", "linear"] = "constant"
    """How the rate reaches 0 at ``stop_after_step``."""
    samples: ClassVar[bool] = True

    @property
    @abstractmethod
    def coefficient(self) -> float:
        """The factor alpha of the loss."""

    @abstractmethod
    def pushes(self, seen: Seen, shape: GateShape) -> Iterator[tuple[Sample, Push]]:
        """Yield what the loss, without its coefficient, does to each sample."""

    @abstractmethod
    def value(self, seen: Seen, shape: GateShape) -> float:
        """Return the loss without its coefficient, mean over the sampled tokens."""

    def gradient(self, seen: Seen, shape: GateShape) -> tuple[F64, F64, I64]:
        """Return [topics, E] mean gradient and mean response of each topic's tokens, and [topics] sampled tokens."""
        size = (shape.n_topics, shape.n_routed_experts)
        gradient, response, n_tokens = np.zeros(size), np.zeros(size), np.zeros(len(shape.modalities), dtype=np.int64)
        for sample, push in self.pushes(seen, shape):
            for topic in np.unique(sample.topic):
                rows = sample.topic == topic
                gradient[topic] += push.gradient[rows].sum(axis=0)
                response[topic] += push.response[rows].sum(axis=0)
                n_tokens[topic] += np.count_nonzero(rows)
        tokens = np.maximum(n_tokens, 1)[:, None]
        return gradient / tokens, response / tokens, n_tokens

    def rate(self, step: int) -> float:
        """Return the share of the way to rest that step ``step`` (from 0) goes."""
        return scheduled(self.offset_update_rate, step, self.stop_after_step, self.decay)

    def start(self, shape: GateShape) -> F64:
        return np.zeros((shape.n_topics, shape.n_routed_experts))

    def adjust(self, state: F64, shape: GateShape) -> Adjustment:
        return Adjustment(offset=state)

    def update(self, state: F64, seen: Seen, shape: GateShape, step: int, gain: float = 1.0) -> F64:
        share = self.rate(step)
        if share == 0.0:
            return state
        gradient, response, n_tokens = self.gradient(seen, shape)
        strength = self.coefficient / self.pull_back
        rate = share / (1.0 + strength * response)
        moved: F64 = state - np.where(n_tokens[:, None] > 0, rate * (strength * gradient + state), 0.0)
        return moved

    def note(self, model: Model) -> str:
        return (
            f"Losses act through logit offsets whose pull-back (lambda = {self.pull_back:g}) was calibrated on one "
            "published figure (MaxVio 0.72 at alpha = 1e-3, arXiv 2408.15664 Table 2, 64 experts); other rows are predictions."
            + (
                ""
                if model.n_routed_experts == 64
                else f" At {model.n_routed_experts} experts lambda is not calibrated (a loss pulls as 1/E against it)."
            )
        )


class BalanceLoss(RouterLoss):
    """alpha sum_i F_i P_i, averaged over the groups of tokens of a scope; F is detached and P_i the mean of s_i / sum(s).

    aux_loss_alpha: alpha (DeepSeek's name; ``router_aux_loss_coef`` in Qwen, Mixtral and GShard ports). scope: the tokens
    over which F is counted. buffer: micro-batch j counts all micro-batches up to j of the same step (Qwen's buffer over
    gradient accumulation, arXiv 2501.11873); for scopes micro_batch and ep_group.

    A subclass says which units (experts, devices) a token used, and what F follows from the counts of units.
    """

    aux_loss_alpha: float = Field(default=1e-3, ge=0, le=1e15)
    scope: Scope = "global_batch"
    buffer: bool = False
    exact: ClassVar[bool] = True
    """Whether units are experts, so that the counts of all tokens serve where no sample is needed."""

    @property
    def coefficient(self) -> float:
        return self.aux_loss_alpha

    def problems(self, model: Model) -> list[tuple[str, str]]:
        if self.buffer and self.scope not in ("micro_batch", "ep_group"):
            return [("buffer", f"accumulates over micro-batches; scope {self.scope} counts no micro-batch by itself")]
        return []

    def n_units(self, shape: GateShape) -> int:
        """Return U, the number of units."""
        return shape.n_routed_experts

    @property
    def counts_samples(self) -> bool:
        """Whether F is counted in the samples rather than in `Seen.counts`."""
        return self.scope == "sequence" or not self.exact

    def units(self, sample: Sample, shape: GateShape) -> I16:
        """Return [S, any] units that each token used, -1 = none."""
        return sample.topk_ids

    @abstractmethod
    def factors(self, counts: F64, n_tokens: F64, shape: GateShape) -> F64:
        """Return F [G, E] of groups that used units ``counts`` [G, U] times and hold ``n_tokens`` [G] tokens."""

    def _by_micro_batch(self, seen: Seen, shape: GateShape) -> tuple[F64, F64]:
        """[M, P, U] counts and [M, P] tokens of the scope's group around each rank's micro-batch."""
        if self.counts_samples:
            counts = np.zeros((*seen.counts.shape[:2], self.n_units(shape)))
            n_tokens = np.zeros(seen.counts.shape[:2])
            for sample in seen.samples:
                zero = np.zeros(len(sample.topic), dtype=np.int64)
                counts[sample.part, sample.rank] = tally(self.units(sample, shape), zero, 1, counts.shape[-1])[0]
                n_tokens[sample.part, sample.rank] = len(zero)
        else:
            counts = seen.counts.astype(np.float64)
            n_tokens = counts.sum(axis=-1) / shape.num_experts_per_tok
        axes = {"global_batch": (0, 1), "ep_group": (1,)}.get(self.scope, ())
        grouped, tokens = counts.sum(axis=axes, keepdims=True), n_tokens.sum(axis=axes, keepdims=True)
        if self.buffer:
            grouped, tokens = grouped.cumsum(axis=0), tokens.cumsum(axis=0)
        return np.broadcast_to(grouped, counts.shape), np.broadcast_to(tokens, n_tokens.shape)

    def _weighted(self, seen: Seen, shape: GateShape) -> Iterator[tuple[Sample, F64]]:
        """Yield each sample with F of its tokens' groups, [S, E] or [1, E]."""
        if self.scope != "sequence":
            counts, n_tokens = self._by_micro_batch(seen, shape)
            for sample in seen.samples:
                at = np.s_[sample.part, sample.rank]
                yield sample, self.factors(counts[at][None], n_tokens[at][None], shape)
            return
        for sample in seen.samples:
            _, group, size = np.unique(sample.sequence, return_inverse=True, return_counts=True)
            counts = tally(self.units(sample, shape), group, len(size), self.n_units(shape))
            yield sample, self.factors(counts, size.astype(np.float64), shape)[group]

    def pushes(self, seen: Seen, shape: GateShape) -> Iterator[tuple[Sample, Push]]:
        spread = _spread(seen)
        for sample, factors in self._weighted(seen, shape):
            scores = sample.scores.astype(np.float64)
            total = ordered_sum(scores)
            mean = ordered_sum(factors * scores) / total
            slope = sample.score.slope(scores) / total
            # Raising a logit raises its own P, and F the more the thicker the tail it stands in: for a normal tail of a
            # tenth or less, by about twice F per standard deviation.
            response = slope * (np.maximum(factors, 1.0) * (1.0 + 2.0 / spread))
            yield sample, Push(slope * (factors - mean), response)

    def value(self, seen: Seen, shape: GateShape) -> float:
        total, n_tokens = 0.0, 0
        for sample, factors in self._weighted(seen, shape):
            scores = sample.scores.astype(np.float64)
            total += float((ordered_sum(factors * scores) / ordered_sum(scores)).sum())
            n_tokens += len(scores)
        return total / max(1, n_tokens)


class ExpertLoss(BalanceLoss):
    """A loss whose F comes from f_i = E / (K T) x tokens that chose expert i.

    f_from: the choices ``chosen`` by the gate, or the ``plain_topk`` of the unbiased scores whatever the gate chose
    (DeepSeek-V3's complementary loss, eq. 18). first_choice_only: count each token's best choice alone (GShard).
    """

    f_from: Literal["chosen", "plain_topk"] = "chosen"
    first_choice_only: bool = False

    @property
    def counts_samples(self) -> bool:
        return super().counts_samples or self.f_from == "plain_topk" or self.first_choice_only

    def units(self, sample: Sample, shape: GateShape) -> I16:
        ids = sample.topk_ids
        if self.f_from == "plain_topk":
            n_experts = sample.scores.shape[1]
            one, zero = np.ones(n_experts, np.float32), np.zeros(n_experts, np.float32)
            ids = plain.topk(sample.scores, one, zero, shape.num_experts_per_tok)
        return ids[:, :1] if self.first_choice_only else ids

    def factors(self, counts: F64, n_tokens: F64, shape: GateShape) -> F64:
        # K T is the sum of the counts, also where a token may take fewer than K experts.
        found: F64 = counts * counts.shape[-1] / np.maximum(counts.sum(axis=-1, keepdims=True), 1.0)
        return found


def tally(units: I16, group: I64, n_groups: int, n_units: int) -> F64:
    """Count [n_groups, n_units] uses of ``units`` [S, any] by tokens of ``group`` [S]; -1 counts nowhere."""
    cell = group.astype(np.int64)[:, None] * (n_units + 1) + units + 1
    counts = np.bincount(cell.ravel(), minlength=n_groups * (n_units + 1)).reshape(n_groups, n_units + 1)
    return counts[:, 1:].astype(np.float64)


def ordered_sum(values: F64) -> F64:
    """Sum [S, E] over experts, [S, 1], the upper half onto the lower until one is left: np.sum's order may depend on the
    CPU, a running sum is five times slower."""
    while (width := values.shape[1]) > 1:
        half = (width + 1) // 2
        folded = values[:, :half].copy()
        folded[:, : width - half] += values[:, half:]
        values = folded
    return values


def _spread(seen: Seen) -> float:
    """Standard deviation of a logit around its mean over a sample's tokens, typical of all experts; at least 0.05."""
    variance = 0.0
    for sample in seen.samples:
        logits = sample.logits.astype(np.float64)
        away = logits - logits.sum(axis=0) / len(logits)
        variance += float((away * away).sum(axis=0).cumsum()[-1]) / away.size
    return float(np.sqrt(max(variance / max(1, len(seen.samples)), 0.0025)))
