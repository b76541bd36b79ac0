"""How many tokens an expert or device accepts, and which ones are dropped when there are more."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sim.gating.piece import Piece
from sim.tokens import F32, F64, I16, I32


@dataclass(frozen=True, slots=True)
class Asked:
    """The choices of one source rank's micro-batch (T tokens), in the order of its tokens.

    topk_ids: [T, k] int16, best first, -1 = none. affinity: [T, k] float32 unbiased scores of the choices. sequence: [T]
    int32. n_routed_experts: E. rng: makes the stream of this (replica, step, layer, rank), the same for every policy.
    num_experts_per_tok: the model's K where tokens may get another number. weight: [T, k] float32 gate weights of the
    choices if they are not the affinities. in_line: [T, k] choices that use up places where that is more than those made
    (GShard's dismissed second experts). lot: `Tokens.lot`, or None.
    """

    topk_ids: I16
    affinity: F32
    sequence: I32
    n_routed_experts: int
    rng: Callable[[], np.random.Generator]
    num_experts_per_tok: int | None = None
    weight: F32 | None = None
    in_line: I16 | None = None
    lot: F64 | None = None

    @property
    def experts_per_token(self) -> int:
        """K, on which capacities rest."""
        return self.num_experts_per_tok or int(self.topk_ids.shape[1])


class Capacity(Piece):
    """A capacity rule, applied to the tokens of one source rank and micro-batch after selection."""

    lots: ClassVar[bool] = False
    """Whether the rule asks for `Tokens.lot`."""

    @abstractmethod
    def keep(self, asked: Asked) -> I16:
        """Return ``topk_ids`` [T, k] with -1 in place of dropped choices."""

    def padded_tokens(self, n_tokens: int, k: int, n_routed_experts: int) -> int | None:
        """Return the rows that every expert computes for ``n_tokens`` of one rank, empty ones included; None: only real
        ones."""
        return None
