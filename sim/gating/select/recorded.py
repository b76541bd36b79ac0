"""The choices of a replayed trace. With ids only no other gate can be judged on it, placements and capacities can."""

from __future__ import annotations

from typing import ClassVar, Literal

from sim.gating.select import Candidates, Select
from sim.tokens import I16


class Recorded(Select):
    """The ids that the real router chose.

    >>> import numpy as np
    >>> from sim.kernels import plain
    >>> scores, one = np.array([[0.2, 0.9, 0.6]], np.float32), np.ones(3, np.float32)
    >>> ids = np.array([[2, 0]], np.int16)
    >>> Recorded().select(Candidates(scores, one, 0 * one, 2, plain, np.random.default_rng, ids)).tolist()
    [[2, 0]]
    """

    kind: Literal["recorded"] = "recorded"
    needs: ClassVar[Literal["logits", "ids", "token_ids"]] = "ids"
    reads: ClassVar[Literal["nothing", "order", "differences", "sizes"]] = "nothing"

    def select(self, candidates: Candidates) -> I16:
        if candidates.recorded is None:
            raise ValueError("these tokens carry no recorded choices; select recorded needs traffic kind replay")
        return candidates.recorded
