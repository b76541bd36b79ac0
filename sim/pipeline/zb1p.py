"""ZB1P: 1F1B whose backward is split, so that gradients of weights fill what waiting would leave empty."""

from __future__ import annotations

from typing import Literal

from sim.pipeline import Chunk, Pass, Pipeline


class ZeroBubble(Pipeline):
    """ZB-H1 of "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241): bubble (PP - 1)(F + B - 2W), memory of 1F1B.

    B is the whole backward, W its weight gradients (the names of DualPipe's README). A rank puts off the gradients of
    as many micro-batches as it is stages away from the first, so that none keeps more than PP activations.
    """

    kind: Literal["zb1p"] = "zb1p"

    def program(self, rank: int, pp_size: int, micro_batches: int) -> list[Chunk]:
        ahead = min(pp_size - 1 - rank, micro_batches)
        chunks = [Chunk("forward", forward=Pass(m, rank)) for m in range(ahead)]
        owed = 0
        for m in range(micro_batches):
            if ahead + m < micro_batches:
                chunks.append(Chunk("forward", forward=Pass(ahead + m, rank)))
            chunks.append(Chunk("input_gradients", backward=Pass(m, rank)))
            if m - owed >= rank:
                chunks.append(Chunk("weight_gradients", backward=Pass(owed, rank)))
                owed += 1
        return [*chunks, *(Chunk("weight_gradients", backward=Pass(m, rank)) for m in range(owed, micro_batches))]
