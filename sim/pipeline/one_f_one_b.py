"""1F1B: as many forwards as there are later stages, then one forward and one backward in turn."""

from __future__ import annotations

from typing import Literal

from sim.pipeline import Chunk, Pass, Pipeline


class OneForwardOneBackward(Pipeline):
    """PipeDream-Flush (arXiv 2006.09503): bubble (PP - 1)(F + B), at most PP micro-batches alive on a rank."""

    kind: Literal["1f1b"] = "1f1b"

    def program(self, rank: int, pp_size: int, micro_batches: int) -> list[Chunk]:
        ahead = min(pp_size - 1 - rank, micro_batches)
        forward = [Chunk("forward", forward=Pass(m, rank)) for m in range(micro_batches)]
        backward = [Chunk("backward", backward=Pass(m, rank)) for m in range(micro_batches)]
        steady = [chunk for pair in zip(forward[ahead:], backward, strict=False) for chunk in pair]
        return [*forward[:ahead], *steady, *backward[micro_batches - ahead :]]
