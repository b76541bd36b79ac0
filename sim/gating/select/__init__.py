"""Which experts a token goes to, given its (biased) scores. One file per rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sim.gating.piece import Piece
from sim.kernels.choose import Kernels
from sim.tokens import F32, F64, I16, I32


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a selection rule may look at; it never sees a clock, a device or another token's future.

    scores: [T, E] float32 affinities. scale, shift: [E] float32; selection ranks ``scores * scale + shift``. affinity:
    [T, E] float32 unbiased affinities where ``scores`` already hold a bias (one per modality). k: experts per token. kernels: the numeric kernels to use.
    rng: makes the stream of this (replica, step, layer, rank), the same for every policy. recorded: [T, k] int16 choices
    of a replayed trace, or None. logits: [T, E] float32 router logits behind ``scores``, or None. token_ids: [T] int32
    vocabulary indices, or None. token_frequency: [V] float64 how often each occurs, or None.

    Tokens are those of one source rank and micro-batch, in their order.
    """

    scores: F32
    scale: F32
    shift: F32
    k: int
    kernels: Kernels
    rng: Callable[[], np.random.Generator]
    recorded: I16 | None = None
    logits: F32 | None = None
    token_ids: I32 | None = None
    token_frequency: F64 | None = None
    affinity: F32 | None = None

    @property
    def unbiased(self) -> F32:
        """[T, E] float32, what gate weights are made of."""
        return self.scores if self.affinity is None else self.affinity

    @property
    def biased(self) -> F32:
        """[T, E] float32, what selection ranks."""
        ranked: F32 = self.scores * self.scale + self.shift
        return ranked


class Select(Piece):
    """A selection rule."""

    needs: ClassVar[Literal["logits", "ids", "token_ids"]] = "logits"
    """What the traffic has to provide: router logits, recorded choices, or logits and a vocabulary."""
    per_token: ClassVar[bool] = True
    """Whether a token's experts depend on that token alone; if not, rules see one rank's micro-batch at a time."""
    causal: ClassVar[bool] = True
    """Whether no token's experts depend on later tokens; a decoder cannot use rules that do."""
    reads: ClassVar[Literal["nothing", "order", "differences", "sizes"]] = "order"
    """What decides which experts a token gets: nothing of the scores, their order (any increasing function of all scores
    leaves the choice), their differences (any constant added to all does) or their sizes."""
    extra_s_per_token: ClassVar[float] = 0.0
    """Seconds per token and layer beyond a top-k's, roughly, on one core with 128 experts: for the estimate."""
    varies: ClassVar[bool] = False
    """Whether tokens may get more or fewer than k experts; unused places hold -1."""

    @abstractmethod
    def select(self, candidates: Candidates) -> I16:
        """Return expert ids, [T, k] int16, best first, distinct per token; equal scores go to the lower expert.

        Rules that vary return [T, any width] with -1 after a token's experts.
        """

    def before_chance(self, candidates: Candidates) -> I16 | None:
        """Return [T, k] experts of which `select` dismissed some by a draw, or None if it does not draw any away.

        Gate weights are normalised over these; with ``dismissed_take_places`` they also stand in line for capacity.
        """
        return None

    @property
    def dismissed_take_places(self) -> bool:
        """Whether an expert that a draw dismissed has used up a place of its capacity all the same."""
        return False
