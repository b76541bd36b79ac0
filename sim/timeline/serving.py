"""Serving as a timeline: a process per group of a unit, whose iterations are one thread since its devices run in step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from sim.engine.recording import RecordedService
from sim.timeline.events import SHORTEST_ARROW_PS, Scribe, members
from sim.tokens import F64, I64
from sim.units import to_ps

PIECES = 1000
ARROWS = 500
"""Requests whose hand-over is drawn, evenly spread over all."""

Series = tuple[I64, list[dict[str, Any]]]  # moments, and what a counter shows from then on


class ServiceView:
    """What a trace shows of one run of requests. ``counts`` [pieces, groups]: events by thousandth of the recorded time
    and by group, so that both can be left out from the end."""

    units = ("thousandths of the time", "unit groups")

    def __init__(self, recorded: RecordedService) -> None:
        self.recorded, self.policy, self.until_ps = recorded, recorded.policy, recorded.until_ps
        group = recorded.iterations["group"]
        self._rows = [np.flatnonzero(group == number) for number in range(len(recorded.groups))]

    def _piece(self, at_ps: Any) -> Any:
        return np.minimum(np.asarray(at_ps, dtype=np.float64) * PIECES / max(1, self.until_ps), PIECES - 1).astype(int)

    @cached_property
    def counts(self) -> I64:
        found = np.zeros((PIECES, len(self.recorded.groups)), dtype=np.int64)
        found[0] += 4  # names and places of the process and its thread
        for number, rows in enumerate(self._rows):
            moments = [self.recorded.iterations["start_ps"][rows]]
            moments += [times for times, _ in self._counters(number).values()]
            moments += [np.array([at for at, _, _ in self._marks(number)], dtype=np.int64)]
            for times in moments:
                np.add.at(found[:, number], self._piece(times), 1)
        for (source, _), (target, row) in self._arrows:
            found[self._piece(self.recorded.iterations["start_ps"][row]), max(source, target)] += 2
        return found

    def _counters(self, number: int) -> dict[str, Series]:
        """Return the counters of a group by name."""
        log, rests, rows = self.recorded.iterations, self.recorded.rests, self._rows[number]
        still = np.flatnonzero(rests["group"] == number)
        columns = ("start_ps", "end_ps", "waiting", "running", "used_blocks")
        busy = np.stack([log[name][rows] for name in columns], axis=1)
        none = np.zeros(len(still), dtype=np.int64)
        idle = np.stack([rests[name][still] if name != "running" else none for name in columns], axis=1)
        held = np.concatenate([busy, idle])
        held = held[np.argsort(held[:, 0], kind="stable")]
        # What is held between two rows of the log, and after the last one: nothing.
        after = np.append(held[1:, 0] > held[:-1, 1], len(held) > 0)[: len(held)]
        gone = np.zeros((int(after.sum()), len(columns)), dtype=np.int64)
        gone[:, 0] = held[after, 1]
        points = np.concatenate([held, gone])
        points = points[np.argsort(points[:, 0], kind="stable")]
        blocks, busiest = points[:, [0, 4]], np.stack([log["start_ps"][rows]], axis=1)
        return {
            "requests": _changes(points[:, [0, 2, 3]], ("waiting", "running")),
            "KV cache blocks": _changes(blocks, ("used",)),
            "imbalance": _changes(busiest, ("max/mean",), self.recorded.imbalance[rows]),
        }

    def _marks(self, number: int) -> list[tuple[int, str, dict[str, Any]]]:
        """Return what happened to a group, as (moment, name, args)."""
        group, found = self.recorded.groups[number], []
        for row in self.recorded.rebalances:
            if row["unit"] == group.unit:
                found.append((_ps(row["time_s"]), "rebalance" if row["done"] else "rebalance skipped", dict(row)))
                if row["done"]:
                    found.append((_ps(row["effective_s"]), "placement changed", {"planned_s": row["time_s"]}))
        for row in self.recorded.faults:
            if (row["unit"], row["index"]) == (group.unit, group.number):
                found.append((_ps(row["time_s"]), row["kind"], dict(row)))
        return [mark for mark in found if mark[0] <= self.until_ps]

    @cached_property
    def _arrows(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Return ((group, iteration), (group, iteration)): the one that ends a prompt, and the first that decodes it."""
        log, found = self.recorded.iterations, []
        handovers = self.recorded.handovers
        sample = np.unique(np.linspace(0, len(handovers) - 1, min(ARROWS, len(handovers))).astype(int))
        for _, source, target, done_ps, landed_ps in handovers[sample].tolist():
            before, behind = self._rows[source], self._rows[target]
            i = int(np.searchsorted(log["end_ps"][before], done_ps))
            j = int(np.searchsorted(log["start_ps"][behind], landed_ps))
            if i < len(before) and log["end_ps"][before[i]] == done_ps and j < len(behind):
                ends = (source, int(before[i])), (target, int(behind[j]))
                if all(log["end_ps"][row] - log["start_ps"][row] >= SHORTEST_ARROW_PS for _, row in ends):
                    found.append(ends)
        return found

    def events(self, scribe: Scribe, pieces: int, groups: int) -> Iterator[str]:
        """Yield the events of the first ``pieces`` thousandths of the time in the first ``groups`` groups."""
        ids, log = [], self.recorded.iterations
        for number, group in enumerate(self.recorded.groups[:groups]):
            name = (
                f"{self.policy}: {group.unit} {group.number} ({group.devices} devices, {group.capacity_blocks} blocks)"
            )
            pid, lines = scribe.process(name)
            yield from lines
            tid, lines = scribe.thread(pid, "iterations")
            yield from lines
            ids.append((pid, tid))
            yield from self._slices(scribe, pid, tid, number, pieces)
            for counter, (times, values) in self._counters(number).items():
                for at_ps, piece, value in zip(times.tolist(), self._piece(times).tolist(), values, strict=True):
                    if piece < pieces:
                        yield scribe.counter(pid, counter, at_ps, value)
            for at_ps, mark, args in self._marks(number):
                if self._piece(at_ps) < pieces:
                    yield scribe.instant(pid, tid, mark, at_ps, args)
        for ends in self._arrows:
            late = self._piece(log["start_ps"][ends[1][1]])
            if late < pieces and all(number < groups for number, _ in ends):
                arrow = scribe.arrow_number()
                for kind, (number, row) in zip("sf", ends, strict=True):
                    span = int(log["start_ps"][row]), int(log["end_ps"][row])
                    yield scribe.arrow(kind, *ids[number], arrow, "KV cache", *span)

    def _slices(self, scribe: Scribe, pid: int, tid: int, number: int, pieces: int) -> Iterator[str]:
        log, rows, decodes = self.recorded.iterations, self._rows[number], self.recorded.groups[number].role == "decode"
        rows = rows[self._piece(log["start_ps"][rows]) < pieces]
        shares = {
            f"{part}_us": log[f"{part}_ps"][rows] / 1e6 for part in ("attention", "experts", "communication", "other")
        }
        counted = ("decoding", "prompt_tokens", "cached_tokens", "output_tokens", "context", "waiting")
        columns = {name: log[name][rows].tolist() for name in ("start_ps", "end_ps", "running", *counted)}
        columns |= {name: values.tolist() for name, values in shares.items()}
        columns["imbalance"] = self.recorded.imbalance[rows].tolist()
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            start, end, asking = row.pop("start_ps"), row.pop("end_ps"), row["decoding"]
            prompts = row["prompt_tokens"] and not decodes
            kind = ("mixed" if asking else "prefill") if prompts else "decode"
            args = {"batch": row.pop("running")} | row
            yield scribe.slice(pid, tid, kind, start, end, members(args), "iteration")


def _changes(points: I64, names: tuple[str, ...], values: F64 | None = None) -> Series:
    """Return a counter from ``points`` [n, 1 + names], moments and values (or ``values`` [n]), where it changes."""
    shown = points[:, 1:] if values is None else values[:, None]
    changed = np.append(True, (shown[1:] != shown[:-1]).any(axis=1))[: len(shown)]
    return points[changed, 0], [dict(zip(names, row, strict=True)) for row in shown[changed].tolist()]


def _ps(seconds: float) -> int:
    return int(to_ps(seconds))
