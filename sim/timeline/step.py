"""A step as a timeline: a process per node, a thread per device and stream.

An exchange is drawn as what `sim.engine.accounting` counts it as: "waiting for peers" until the last peer that sends to the
device has started (its own sends are under way meanwhile), then the exchange itself. The two stand side by side, not inside
each other: Perfetto adds up slices of one name, and ties an arrow to the slice that began last, over or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from sim.engine.recording import Label, RecordedStep
from sim.timeline.events import SHORTEST_ARROW_PS, Scribe, members
from sim.tokens import I64

_ROUTED = ("dispatch", "experts", "combine")
_SHORTEST_WAIT_PS = 1000


class StepView:
    """What a trace shows of one step. ``counts`` [nodes, layers]: events by node and by the layer they belong to, so that
    both can be left out from the end."""

    units = ("nodes", "layers")

    def __init__(self, recorded: RecordedStep) -> None:
        self.recorded = recorded
        ranks = recorded.start_ps.shape[1]
        self.layers = sorted({label.layer for label in recorded.labels})
        self.nodes = [
            range(first, min(ranks, first + recorded.devices_per_node))
            for first in range(0, ranks, recorded.devices_per_node)
        ]
        self.policy, self.until_ps = recorded.policy, recorded.makespan_ps

    @cached_property
    def _place(self) -> dict[int, int]:
        return {layer: place for place, layer in enumerate(self.layers)}

    @cached_property
    def _described(self) -> list[tuple[str, str, str]]:
        return [_described(label) for label in self.recorded.labels]

    @cached_property
    def _streams(self) -> tuple[str, ...]:
        """Streams on which anything lasts at all; a single device has nobody to talk to."""
        found = {label.stream for label, lasts in zip(self.recorded.labels, self._lasts, strict=True) if lasts.any()}
        return tuple(name for name in ("compute", "communication") if name in found)

    @cached_property
    def _lasts(self) -> I64:
        return self.recorded.end_ps - self.recorded.start_ps

    @cached_property
    def _waits(self) -> I64:
        """[n, P] how long after an operation's start the last peer that sends to the device starts it."""
        return self.recorded.peer_start_ps - self.recorded.start_ps

    @cached_property
    def _chains(self) -> list[tuple[int, int, int]]:
        """Operations that an arrow joins: dispatch, experts and combine of a layer and micro-batch, in one direction."""
        found: dict[tuple[int, int, bool], dict[str, int]] = {}
        for i, label in enumerate(self.recorded.labels):
            if label.phase in _ROUTED:
                found.setdefault((label.layer, label.micro_batch, label.backward), {})[label.phase] = i
        return [(ops["dispatch"], ops["experts"], ops["combine"]) for ops in found.values() if len(ops) == len(_ROUTED)]

    @cached_property
    def _tied(self) -> I64:
        """[n, P] 1 where an arrow can be tied to the operation, after any wait for peers."""
        return (self._lasts - self._waits >= SHORTEST_ARROW_PS).astype(np.int64)

    def _joined(self, chain: tuple[int, int, int]) -> I64:
        """[P] events of the chain's arrow."""
        dispatch, experts, combine = (self._tied[i] for i in chain)
        joined: I64 = dispatch * combine * (2 + experts)
        return joined

    @cached_property
    def counts(self) -> I64:
        found = np.zeros((len(self.nodes), len(self.layers)), dtype=np.int64)
        firsts = [node.start for node in self.nodes]
        per_op = (self._lasts > 0).astype(np.int64) + (self._waits >= _SHORTEST_WAIT_PS)
        for label, row in zip(self.recorded.labels, np.add.reduceat(per_op, firsts, axis=1), strict=True):
            found[:, self._place[label.layer]] += row + (label.phase == "experts")
        for chain in self._chains:
            place = self._place[self.recorded.labels[chain[0]].layer]
            found[:, place] += np.add.reduceat(self._joined(chain), firsts)
        for i, node in enumerate(self.nodes):
            found[i, 0] += 2 + 2 * len(self._streams) * len(node) + len(self._waiting(node)[0])
        return found

    def _waiting(self, node: range) -> tuple[I64, I64]:
        """Return moments and how many devices of ``node`` have had nothing to compute since: the queue of the step."""
        compute = [i for i, label in enumerate(self.recorded.labels) if label.stream == "compute"]
        here = np.ix_(compute, list(node))
        starts, ends = self.recorded.start_ps[here].ravel(), self.recorded.end_ps[here].ravel()
        times = np.concatenate([[0], starts, ends])
        changes = np.concatenate([[len(node)], np.full(len(starts), -1), np.full(len(ends), 1)])
        order = np.argsort(times, kind="stable")
        times, idle = times[order], np.cumsum(changes[order])
        last = np.append(times[1:] != times[:-1], True)  # of those at one instant
        times, idle = times[last], idle[last]
        changed = np.append(True, idle[1:] != idle[:-1])
        return times[changed], idle[changed]

    def events(self, scribe: Scribe, nodes: int, layers: int) -> Iterator[str]:
        """Yield the events of the first ``nodes`` nodes and ``layers`` layers."""
        kept = [i for i, label in enumerate(self.recorded.labels) if self._place[label.layer] < layers]
        for number, node in enumerate(self.nodes[:nodes]):
            pid, lines = scribe.process(f"{self.policy}: node {number}")
            yield from lines
            threads: dict[tuple[int, str], int] = {}
            for rank in node:
                for stream in self._streams:
                    threads[rank, stream], lines = scribe.thread(pid, f"device {rank} {stream}")
                    yield from lines
                    yield from self._slices(scribe, pid, threads[rank, stream], kept, rank, stream)
            yield from self._arrows(scribe, pid, threads, layers)
            yield from self._counters(scribe, pid, node, kept)

    def _slices(self, scribe: Scribe, pid: int, tid: int, kept: list[int], rank: int, stream: str) -> Iterator[str]:
        step = self.recorded
        columns = (step.start_ps, step.end_ps, step.peer_start_ps, step.tokens, step.sent_bytes)
        start, end, peer, tokens, sent = (values[:, rank].tolist() for values in columns)
        for i in kept:
            if step.labels[i].stream != stream or end[i] == start[i]:
                continue
            name, direction, where = self._described[i]
            args, begin = f'{where},"tokens":{tokens[i]}', start[i]
            if stream == "communication":
                args += f',"bytes":{sent[i]}'
                if peer[i] - begin >= _SHORTEST_WAIT_PS:
                    begin = peer[i]
                    yield scribe.slice(pid, tid, "waiting for peers", start[i], begin, where, direction)
            yield scribe.slice(pid, tid, name, begin, end[i], args, direction)

    def _arrows(self, scribe: Scribe, pid: int, threads: dict[tuple[int, str], int], layers: int) -> Iterator[str]:
        step = self.recorded
        for chain in self._chains:
            if self._place[step.labels[chain[0]].layer] >= layers:
                continue
            joined = self._joined(chain)
            for rank, stream in threads:
                if stream == "compute" and joined[rank]:
                    number = scribe.arrow_number()
                    for kind, i in zip("stf", chain, strict=True):
                        if self._tied[i, rank]:
                            tid = threads[rank, step.labels[i].stream]
                            span = int(step.peer_start_ps[i, rank]), int(step.end_ps[i, rank])
                            yield scribe.arrow(kind, pid, tid, number, "tokens", *span)

    def _counters(self, scribe: Scribe, pid: int, node: range, kept: list[int]) -> Iterator[str]:
        step, here = self.recorded, slice(node.start, node.stop)
        for at_ps, n in zip(*(values.tolist() for values in self._waiting(node)), strict=True):
            yield scribe.counter(pid, "devices", at_ps, {"waiting": n})
        for i in kept:
            if step.labels[i].phase == "experts":
                load = step.tokens[i] / max(1.0, float(step.tokens[i].mean()))
                values = {"fullest device": float(load[here].max()), "node": float(load[here].mean())}
                at_ps = int(step.start_ps[i, here].min())
                yield scribe.counter(pid, "expert tokens/mean", at_ps, values)


def _described(label: Label) -> tuple[str, str, str]:
    """Return the name of a slice, by which Perfetto colours and sums, its direction, and what its args begin with."""
    direction = "backward" if label.backward else "forward"
    name = f"{label.phase} backward" if label.backward and label.phase != "experts_wgrad" else label.phase
    return name, direction, members({"layer": label.layer, "micro_batch": label.micro_batch, "direction": direction})
