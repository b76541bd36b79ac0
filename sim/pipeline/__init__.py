"""Which micro-batch is where on a pipeline, and in which order: pure integers, no seconds. One file per schedule.

A schedule gives every pipeline rank a static program of chunks. A chunk is one micro-batch passing the layers of one
stage: forward, backward, or the forward of one overlapped with the backward of another. A backward may put off the
gradients of its weights (zero bubble, arXiv 2401.10241); a later chunk then makes up for them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from math import inf
from typing import Literal, NamedTuple

from sim.plugin import Plugin

ChunkKind = Literal["forward", "backward", "input_gradients", "weight_gradients", "overlapped"]


class Pass(NamedTuple):
    """A micro-batch at a stage."""

    micro_batch: int
    stage: int


class Chunk(NamedTuple):
    """One entry of a rank's program.

    forward: whose forward pass. backward: whose backward pass, or, with kind ``weight_gradients``, whose weights.
    ``input_gradients`` is a backward that leaves the weights for later; ``overlapped`` runs both passes at once.
    """

    kind: ChunkKind
    forward: Pass | None = None
    backward: Pass | None = None


class Pipeline(Plugin):
    """A pipeline schedule."""

    copies: int = 1
    """Stages that each rank holds, and ranks that hold each stage."""

    @abstractmethod
    def program(self, rank: int, pp_size: int, micro_batches: int) -> list[Chunk]:
        """Return the chunks of pipeline rank ``rank`` in order; every micro-batch passes every stage once."""

    def stages(self, rank: int, pp_size: int) -> tuple[int, ...]:
        """Return the stages whose layers rank ``rank`` holds."""
        return (rank,)

    def problems(self, pp_size: int, micro_batches: int) -> Iterator[tuple[str, str]]:
        """Yield ``(field, rule)`` for sizes that the schedule cannot run; the fields are pp_size and micro_batches."""
        if pp_size < 2:
            yield "pp_size", f"must be >= 2 for pipeline {self.kind}"


def passes(chunk: Chunk) -> Iterator[tuple[Pass, bool]]:
    """Yield what ``chunk`` has to wait for a neighbour with, as (pass, backward)."""
    if chunk.forward is not None:
        yield chunk.forward, False
    if chunk.backward is not None and chunk.kind != "weight_gradients":
        yield chunk.backward, True


def alive(program: Sequence[Chunk], weight: Sequence[float]) -> float:
    """Return the peak of activations that a rank keeps: ``weight[stage]`` (say, layers) per micro-batch, summed.

    A micro-batch's activations are kept from its forward until the gradients of its weights are done.

    >>> from sim.pipeline.one_f_one_b import OneForwardOneBackward
    >>> [alive(OneForwardOneBackward().program(r, 4, 8), [1, 1, 1, 1]) for r in range(4)]
    [4.0, 3.0, 2.0, 1.0]
    """
    now = peak = 0.0
    for chunk in program:
        if chunk.forward is not None:
            now += weight[chunk.forward.stage]
            peak = max(peak, now)
        if chunk.backward is not None and chunk.kind != "input_gradients":
            now -= weight[chunk.backward.stage]
    return peak


@lru_cache(maxsize=64)
def split_layers(cost: tuple[float, ...], pp_size: int) -> tuple[range, ...]:
    """Cut ``cost`` (one entry per layer) into ``pp_size`` runs, none empty, whose dearest is as cheap as possible.

    Among these, the runs with the least sum of squares; then early stages with as few layers as they can. Raises
    ValueError for fewer layers than stages.

    >>> split_layers((1.0, 1.0, 1.0, 3.0), 2)
    (range(0, 3), range(3, 4))
    """
    n = len(cost)
    if not 1 <= pp_size <= n:
        raise ValueError(f"{n} layers cannot fill {pp_size} stages")
    total = [0.0, *accumulate(cost)]

    def best(limit: float, join: Callable[[float, float], float]) -> list[list[float]]:
        """[s][i]: the least value when layers i.. fill s stages, none dearer than ``limit``."""
        least = [[inf] * (n + 1) for _ in range(pp_size + 1)]
        least[0][n] = 0.0
        for stages in range(1, pp_size + 1):
            for i in range(n - stages, -1, -1):
                for j in range(i + 1, n - stages + 2):
                    if total[j] - total[i] > limit:
                        break
                    least[stages][i] = min(least[stages][i], join(total[j] - total[i], least[stages - 1][j]))
        return least

    limit = best(inf, max)[pp_size][0] * (1 + 1e-12)
    squares = best(limit, lambda mine, rest: mine * mine + rest)
    cuts, i = [], 0
    for stages in range(pp_size, 0, -1):
        options = [
            ((total[j] - total[i]) ** 2 + squares[stages - 1][j], j)
            for j in range(i + 1, n + 1)
            if total[j] - total[i] <= limit
        ]
        cuts.append(range(i, min(options)[1]))
        i = cuts[-1].stop
    return tuple(cuts)
