"""The order of a serving iteration's operations on the two streams of a device, and how long they take together.

One batch: per layer attention -> dispatch -> experts -> combine, the shared experts while the dispatch is in flight. Two
half batches (two-batch overlap) fill each other's waiting, in the orders that DeepSeek's inference profiles show
(deepseek-ai/profile-data, open-infra-index day 6):

* normal kernels: the dispatch of one half beside attention and experts of the other, its combine beside the experts,
  shared experts and next attention of the other.
* low-latency kernels: attention in two stages. Shared experts and what comes before the other half's attention beside
  the dispatch, the other half's attention beside the combine, nothing beside the experts.

All ranks start a layer's exchange together, since everyone sends to everyone: a program has one device, whose operations
last as long as those of the slowest rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Literal, NamedTuple

import numpy as np

from sim.engine.plan import Op, Plan
from sim.tokens import I64, Bool

Layer = Literal["moe", "dense", "head", "merge"]
Phase = Literal[
    "before", "core", "all_reduce", "gate", "dispatch", "shared", "experts", "combine", "dense", "ffn_reduce", "head",
    "merge",
]  # fmt: skip
EVEN: tuple[Phase, ...] = ("before", "core", "all_reduce", "gate", "shared", "dense", "ffn_reduce", "head", "merge")
"""Phases that last equally long in all layers; the others have one duration per sampled layer."""
ROUTED: tuple[Phase, ...] = ("dispatch", "experts", "combine")
PARTS = {"before": 0, "core": 0, "gate": 0, "experts": 1, "shared": 1, "dense": 2, "head": 2, "merge": 2}
"""Where a phase counts: attention, experts, other. What no computation hides is communication."""


class Step(NamedTuple):
    """One operation of one half batch; ``layer`` is its number in the program, heads included."""

    half: int
    layer: int
    phase: Phase


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """Operations in program order, n in all.

    after: [n, 2] operations that must have ended, -1 for none. value: [n] where an operation's duration stands among the
    durations of all halves: `EVEN`, then `ROUTED` by sampled layer. parts: [3, values], how often each of these counts
    for attention, experts and other.
    """

    steps: tuple[Step, ...]
    communicates: Bool
    after: I64
    value: I64
    parts: I64

    def plan(self, duration_ps: I64) -> Plan:
        """Return the program as a `Plan` of one rank."""
        ops = [
            Op(
                step.phase,
                step.layer,
                step.half,
                False,
                "communication" if self.communicates[i] else "compute",
                tuple(sorted(int(j) for j in self.after[i] if j >= 0)),
                duration_ps[self.value[i : i + 1]],
            )
            for i, step in enumerate(self.steps)
        ]
        return Plan(1, tuple(ops))


@lru_cache(maxsize=64)
def program(
    layers: tuple[Layer, ...], sampled: int, *, halves: int, staged: bool, exchanges: bool, shared: bool, reduces: bool
) -> Program:
    """Return the program of ``layers``.

    sampled: layers whose routed durations are given; the i-th of n MoE layers has those of number i x sampled // n, those
    behind the first head have the last. A ``merge`` brings a proposed token's embedding and the hidden state together for
    the MTP module's layer behind it. halves: 1, or 2 for two-batch overlap. staged: in the order of low-latency
    kernels. exchanges: there are other ranks to send tokens to. shared: MoE layers have shared experts. reduces:
    attention and dense FFN end with an all-reduce.
    """
    phases = [_phases(kind, exchanges, shared, reduces) for kind in layers]
    order: list[Step] = []
    if halves == 2 and staged:
        parts = [(number, part) for number, both in enumerate(phases) for part in both]
        for leading, following in zip_longest(parts, [None, *parts]):
            here = [
                [Step(half, part[0], phase) for phase in part[1]]
                for half, part in ((0, leading), (1, following))
                if part
            ]
            order += _staged(*here)
    else:
        for number, (attention, ffn) in enumerate(phases):
            for half in range(halves):
                order += [Step(half, number, phase) for phase in attention]
            late = [(_PLACE[phase] if halves == 2 else 0, half, phase) for half in range(halves) for phase in ffn]
            order += [Step(half, number, phase) for _, half, phase in sorted(late, key=lambda item: item[0])]
    return _numbered(order, layers, sampled)


# The FFNs of two halves under normal kernels, phase by phase.
_PLACE = {"dense": 0, "head": 0, "merge": 0, "ffn_reduce": 1, "dispatch": 0, "experts": 1, "combine": 2, "shared": 3}


def _phases(kind: Layer, exchanges: bool, shared: bool, reduces: bool) -> tuple[tuple[Phase, ...], tuple[Phase, ...]]:
    """Return the phases of a layer up to its gate, and the others."""
    if kind in ("head", "merge"):
        return (), (kind,)
    attention: tuple[Phase, ...] = ("before", "core", "all_reduce") if reduces else ("before", "core")
    if kind == "dense":
        return attention, ("dense", "ffn_reduce") if reduces else ("dense",)
    beside: tuple[Phase, ...] = ("shared",) if shared else ()
    ffn: tuple[Phase, ...] = ("dispatch", *beside, "experts", "combine") if exchanges else (*beside, "experts")
    return (*attention, "gate"), ffn


def _staged(one: list[Step], other: list[Step] | None = None) -> list[Step]:
    """Merge the attention of one half with the FFN of the other."""
    if other is None:
        return one
    attention, ffn = (one, other) if one and one[0].phase == "before" else (other, one)
    cut = next((i for i, step in enumerate(ffn) if step.phase == "experts"), len(ffn))
    return [*ffn[:cut], *attention[:1], *ffn[cut:], *attention[1:]]


def _numbered(order: list[Step], layers: tuple[Layer, ...], sampled: int) -> Program:
    index = {step: i for i, step in enumerate(order)}
    n_moe = layers[: layers.index("head")].count("moe") if "head" in layers else layers.count("moe")
    width = len(EVEN) + len(ROUTED) * sampled
    after, value = np.full((len(order), 2), -1, dtype=np.int64), np.zeros(len(order), dtype=np.int64)
    parts: I64 = np.zeros((3, (max(step.half for step in order) + 1) * width), dtype=np.int64)
    for i, step in enumerate(order):
        for place, before in enumerate(_before(step, index)):
            after[i, place] = before
        if step.phase in EVEN:
            at = EVEN.index(step.phase)
        else:
            number = min(layers[: step.layer].count("moe") * sampled // max(1, n_moe), sampled - 1)
            at = len(EVEN) + ROUTED.index(step.phase) * sampled + number
        value[i] = step.half * width + at
        if step.phase in PARTS:
            parts[PARTS[step.phase], value[i]] += 1
    communicates = np.array([step.phase not in PARTS for step in order])
    return Program(tuple(order), communicates, after, value, parts)


_WAITS: dict[Phase, tuple[Phase, ...]] = {
    "core": ("before",), "all_reduce": ("core",), "gate": ("all_reduce", "core"), "dispatch": ("gate",),
    "shared": ("gate",), "experts": ("dispatch", "gate"), "combine": ("experts",), "dense": ("all_reduce", "core"),
    "ffn_reduce": ("dense",),
}  # fmt: skip
_LAST: tuple[tuple[Phase, ...], ...] = (("combine", "experts", "ffn_reduce", "dense", "head", "merge"), ("shared",))


def _before(step: Step, index: dict[Step, int]) -> list[int]:
    """Return the operations that ``step`` waits for: of its own layer, or the last ones of the layer before."""
    layer, choices = step.layer, [_WAITS[step.phase]] if step.phase in _WAITS else list(_LAST)
    if step.phase not in _WAITS:
        layer -= 1
    found = []
    for names in choices:  # of the phases named, the first that the layer has
        there = [index[key] for name in names if (key := Step(step.half, layer, name)) in index]
        found += there[:1]
    return found


def makespan_plain(communicates: Bool, after: I64, duration: I64) -> int:
    """Return the end of the last operation: each starts when the one before it on its stream and those it waits for have
    ended (see `sim.engine.plan`)."""
    end: list[int] = []
    free = [0, 0]
    stages = zip(communicates.tolist(), after.tolist(), duration.tolist(), strict=True)
    for stream, waits, lasts in stages:
        start = max(free[stream], *(end[i] if i >= 0 else 0 for i in waits))
        free[stream] = start + lasts
        end.append(start + lasts)
    return max(end, default=0)
