"""DualPipe: micro-batches enter from both ends, and each forward is overlapped with the backward of another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from sim.pipeline import Chunk, Pass, Pipeline


class DualPipe(Pipeline):
    """DeepSeek-V3 report (arXiv 2412.19437), section 3.2.1, and the DualPipe repository's README.

    Bubble (PP/2 - 1)(F&B + B - 3W); every rank holds two stages, its own and the one mirrored about the middle, and at
    most PP + 1 micro-batches are alive. Half of the micro-batches start at either end. Seen from a rank at distance d
    from the nearer end, ``near`` ones come from that end and meet stage d, ``far`` ones meet stage PP - 1 - d.
    """

    kind: Literal["dualpipe"] = "dualpipe"
    copies: Literal[2] = 2

    def stages(self, rank: int, pp_size: int) -> tuple[int, ...]:
        return tuple(sorted({rank, pp_size - 1 - rank}))

    def problems(self, pp_size: int, micro_batches: int) -> Iterator[tuple[str, str]]:
        if pp_size < 2 or pp_size % 2:
            yield "pp_size", "must be even for pipeline dualpipe"
        elif micro_batches % 2 or micro_batches < 2 * pp_size:
            yield "micro_batches", f"must be even and at least 2 x pp_size = {2 * pp_size} for pipeline dualpipe"

    def program(self, rank: int, pp_size: int, micro_batches: int) -> list[Chunk]:
        half, each = pp_size // 2, micro_batches // 2
        d = min(rank, pp_size - 1 - rank)
        first = {"near": 0 if rank < half else each, "far": each if rank < half else 0}
        stage = {"near": d, "far": pp_size - 1 - d}
        done = {("near", False): 0, ("far", False): 0, ("near", True): 0, ("far", True): 0}
        chunks: list[Chunk] = []
        owed: list[Pass] = []

        def step(side: str, backward: bool) -> Pass:
            at = done[side, backward]
            done[side, backward] += 1
            return Pass(first[side] + at, stage[side])

        def forward(side: str) -> None:
            chunks.append(Chunk("forward", forward=step(side, False)))

        def back(side: str, put_off: bool = False) -> None:
            what = step(side, True)
            chunks.append(Chunk("input_gradients" if put_off else "backward", backward=what))
            if put_off:
                owed.append(what)

        def weights() -> None:
            chunks.append(Chunk("weight_gradients", backward=owed.pop(0)))

        def both(ahead: str, behind: str) -> None:
            chunks.append(Chunk("overlapped", step(ahead, False), step(behind, True)))

        inner = half - 1 - d  # ranks between this one and the middle
        for _ in range(2 * inner):
            forward("near")
        for _ in range(d + 1):
            forward("near")
            forward("far")
        for _ in range(inner):
            back("far", put_off=True)
            weights()
            forward("far")
        for i in range(each - pp_size + d + 1):
            if i == 0 and inner == 0:  # the two middle ranks would wait for each other
                forward("near")
                back("far")
            else:
                both("near", "far")
            both("far", "near")
        for _ in range(inner):
            back("far")
            both("far", "near")
        for i in range(2 * (d + 1)):
            back("near" if i % 2 else "far", put_off=i > d)
        for _ in range(inner):
            weights()
            back("near", put_off=True)
        for _ in range(d + 1):
            weights()
        return chunks
