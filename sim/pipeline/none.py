"""No pipeline in time: one expert-parallel group passes all layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from sim.pipeline import Chunk, Pipeline


class NoPipeline(Pipeline):
    """One group of devices runs the whole model; ``parallel.pp_size`` divides memory, not time, and adds no bubble."""

    kind: Literal["none"] = "none"

    def program(self, rank: int, pp_size: int, micro_batches: int) -> list[Chunk]:
        return []

    def problems(self, pp_size: int, micro_batches: int) -> Iterator[tuple[str, str]]:
        yield from ()
