"""A pipelined step as a timeline: a process per pipeline rank, a thread per expert-parallel group."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from sim.engine.recording import RecordedPipeline
from sim.pipeline import Chunk, passes
from sim.timeline.events import SHORTEST_ARROW_PS, Scribe, members
from sim.tokens import F64, I64

_LETTER = {"backward": "B", "input_gradients": "I", "weight_gradients": "W", "overlapped": "B"}


class PipelineView:
    """What a trace shows of one pipelined step. ``counts`` [groups, pipeline ranks] events, so that both can be left out
    from the end."""

    units = ("expert-parallel groups", "pipeline ranks")

    def __init__(self, recorded: RecordedPipeline) -> None:
        self.recorded, self.policy, self.until_ps = recorded, recorded.policy, recorded.optimizer_ps[1]
        self.n_groups = len(recorded.start_ps[0])

    @cached_property
    def _ways(self) -> dict[tuple[int, bool], list[tuple[int, int]]]:
        """Where (pipeline rank, chunk) each micro-batch passes, forward or backward, stage by stage."""
        found: dict[tuple[int, bool], dict[int, tuple[int, int]]] = {}
        for rank, program in enumerate(self.recorded.programs):
            for i, chunk in enumerate(program):
                for (micro, stage), backward in passes(chunk):
                    found.setdefault((micro, backward), {})[stage] = rank, i
        return {way: [at for _, at in sorted(stops.items(), reverse=way[1])] for way, stops in sorted(found.items())}

    @cached_property
    def _held(self) -> list[list[int]]:
        """Per pipeline rank: micro-batches whose activations it keeps, once each chunk has begun."""
        found = []
        for program in self.recorded.programs:
            now, held = 0, []
            for chunk in program:
                now += chunk.forward is not None
                held.append(now)
                now -= chunk.backward is not None and chunk.kind != "input_gradients"
            found.append(held)
        return found

    @cached_property
    def _against_mean(self) -> list[F64]:
        """Per pipeline rank [G, chunks]: a chunk's time over the mean of those of its kind and stages."""
        found = []
        for rank, program in enumerate(self.recorded.programs):
            lasts = (self.recorded.end_ps[rank] - self.recorded.start_ps[rank]).astype(np.float64)
            alike: dict[Any, list[int]] = {}
            for i, chunk in enumerate(program):
                key = (chunk.kind, *(at.stage if at else -1 for at in (chunk.forward, chunk.backward)))
                alike.setdefault(key, []).append(i)
            for numbers in alike.values():
                lasts[:, numbers] /= max(1.0, float(lasts[:, numbers].mean()))
            found.append(lasts)
        return found

    @cached_property
    def counts(self) -> I64:
        n = [len(program) for program in self.recorded.programs]
        found = np.array([[2 + 1 + 2 * chunks for chunks in n] for _ in range(self.n_groups)], dtype=np.int64)
        found[0] += 2  # the process itself
        for way in self._ways.values():
            for group in range(self.n_groups):
                for rank, _ in self._arrow(way, group, len(n)):
                    found[group, rank] += 1
        return found

    def _arrow(self, way: list[tuple[int, int]], group: int, ranks: int) -> list[tuple[int, int]]:
        """The stops of ``way`` that an arrow joins, if it does not lead out of the trace."""
        step = self.recorded
        if len(way) < 2 or any(rank >= ranks for rank, _ in way):
            return []
        short = any(step.end_ps[r][group, i] - step.start_ps[r][group, i] < SHORTEST_ARROW_PS for r, i in way)
        return [] if short else way

    def events(self, scribe: Scribe, groups: int, ranks: int) -> Iterator[str]:
        """Yield the events of the first ``groups`` groups of the first ``ranks`` pipeline ranks."""
        groups, threads, pids = min(groups, self.n_groups), {}, []
        for rank, program in enumerate(self.recorded.programs[:ranks]):
            stages = sorted({at.stage for chunk in program for at in (chunk.forward, chunk.backward) if at})
            many = "stages" if len(stages) > 1 else "stage"
            held = " and ".join(map(str, stages))
            pid, lines = scribe.process(f"{self.policy}: pipeline rank {rank} ({many} {held})")
            pids.append(pid)
            yield from lines
            for group in range(groups):
                threads[rank, group], lines = scribe.thread(pid, f"EP group {group}")
                yield from lines
                yield from self._thread(scribe, pid, threads[rank, group], rank, group)
        for (_, backward), way in self._ways.items():
            for group in range(groups):
                stops = self._arrow(way, group, min(ranks, len(pids)))
                number = scribe.arrow_number() if stops else 0
                for place, (rank, i) in enumerate(stops):
                    kind = "s" if place == 0 else "f" if place == len(stops) - 1 else "t"
                    span = int(self.recorded.start_ps[rank][group, i]), int(self.recorded.end_ps[rank][group, i])
                    name = "gradients" if backward else "activations"
                    yield scribe.arrow(kind, pids[rank], threads[rank, group], number, name, *span)

    def _thread(self, scribe: Scribe, pid: int, tid: int, rank: int, group: int) -> Iterator[str]:
        step = self.recorded
        starts, ends = step.start_ps[rank][group].tolist(), step.end_ps[rank][group].tolist()
        held, against = self._held[rank], self._against_mean[rank][group].tolist()
        for i, (chunk, start, end) in enumerate(zip(step.programs[rank], starts, ends, strict=True)):
            name, args = _described(chunk)
            yield scribe.slice(pid, tid, name, start, end, members(args | {"tokens": step.tokens}), chunk.kind)
            values = {"micro-batches held": held[i], "chunk time/mean": against[i]}
            yield scribe.counter(pid, f"EP group {group}", start, values)
        yield scribe.slice(pid, tid, "optimizer", *step.optimizer_ps, "", "optimizer")


def _described(chunk: Chunk) -> tuple[str, dict[str, Any]]:
    """Return a chunk's name, like F3, B3, I3 (input gradients), W3 (weight gradients) or F7+B3, and its args."""
    names: list[str] = []
    args: dict[str, Any] = {"direction": chunk.kind}
    if chunk.forward is not None:
        names.append(f"F{chunk.forward.micro_batch}")
        args |= {"forward_micro_batch": chunk.forward.micro_batch, "forward_stage": chunk.forward.stage}
    if chunk.backward is not None:
        names.append(f"{_LETTER[chunk.kind]}{chunk.backward.micro_batch}")
        args |= {"backward_micro_batch": chunk.backward.micro_batch, "backward_stage": chunk.backward.stage}
    return "+".join(names), args
