"""Which copy of an expert a token goes to. Knows experts, slots and counts only; one file per rule.

A rule turns the demand of every source rank into quotas: how many of its tokens for an expert go to which of the
expert's slots. `assign` then hands the slots out to tokens, so a rule that looks at one rank (``static``), at nodes
(``nearest``) or at the whole batch (``least_loaded``, ``lp``) is the same kind of thing.
"""

from __future__ import annotations

import importlib.util
import os
from abc import abstractmethod
from dataclasses import dataclass
from functools import cache

import numpy as np

from sim.plugin import Plugin
from sim.slots import Slots
from sim.tokens import I16, I32, I64


class ReplicaChoice(Plugin):
    """A rule that shares out an expert's tokens between its slots."""

    def seconds(self, slots: Slots) -> float:
        """Return the time that the rule takes on the device in every MoE layer, before the dispatch; 0 by default."""
        return 0.0

    @abstractmethod
    def quotas(self, demand: I64, physical_to_logical_map: I32, slots: Slots) -> I64:
        """Return [P, S] int64: tokens of each source rank that go to each slot of one layer.

        demand: [P, E] int64, (token, expert) pairs of each source rank. physical_to_logical_map: [S] int32, -1 in slots
        that hold nothing (those of a dead rank). Of every source, the slots of an expert get exactly its demand; an
        expert without a slot gets nothing. Ties by the lowest slot.
        """


@dataclass(frozen=True, slots=True)
class Copies:
    """The slots of a map that hold an expert, by expert and within it ascending (V slots, E experts); all int64.

    slot, expert, ordinal: [V], a slot, what it holds, and its place 0, 1, ... among the slots of that expert.
    counts: [E] slots per expert. start: [E + 1], expert e has entries start[e] to start[e + 1] - 1.
    """

    slot: I64
    expert: I64
    ordinal: I64
    counts: I64
    start: I64

    @classmethod
    def of(cls, physical_to_logical_map: I32, n_routed_experts: int) -> Copies:
        """Sort the slots of a map [S]; -1 holds nothing.

        >>> Copies.of(np.array([2, 0, -1, 2], dtype=np.int32), 3).slot.tolist()
        [1, 0, 3]
        """
        order = np.argsort(physical_to_logical_map, kind="stable")
        slot = order[np.count_nonzero(physical_to_logical_map < 0) :].astype(np.int64)
        expert = physical_to_logical_map[slot].astype(np.int64)
        counts = np.bincount(expert, minlength=n_routed_experts).astype(np.int64)
        start = np.concatenate([[0], np.cumsum(counts)])
        return cls(slot, expert, np.arange(len(slot)) - start[expert], counts, start)


def spread(demand: I64, total: I64, copies: Copies, n_slots: int) -> I64:
    """Return quotas [P, n_slots] that share out ``total`` [V], the tokens that the slots of ``copies`` get from all.

    The totals of an expert's slots add up to its demand [P, E] over all sources. Slot by slot, the sources' shares of
    what is left are rounded in their running sum, so each source's and each slot's tokens come out exactly.

    >>> once = Copies.of(np.array([0, 0], dtype=np.int32), 1)
    >>> spread(np.array([[3], [3], [2]]), np.array([2, 6]), once, 2).tolist()
    [[1, 2], [1, 2], [0, 2]]
    """
    quota: I64 = np.zeros((len(demand), n_slots), dtype=np.int64)
    single = copies.counts[copies.expert] == 1
    quota[:, copies.slot[single]] = demand[:, copies.expert[single]]
    left = demand.copy()
    for ordinal in range(int(copies.counts.max(initial=0))):
        entry = np.flatnonzero(~single & (copies.ordinal == ordinal))
        there = left[:, copies.expert[entry]]
        upto = np.cumsum(there, axis=0)
        whole = np.maximum(upto[-1], 1)
        taken = np.diff((2 * upto * total[entry] + whole) // (2 * whole), axis=0, prepend=0)
        quota[:, copies.slot[entry]] = taken
        left[:, copies.expert[entry]] = there - taken
    return quota


def assign(topk_ids: I16, quota: I64, physical_to_logical_map: I32) -> I16:
    """Return the slots [T, k] int16 of one source's tokens with experts [T, k] int16; -1 stays -1.

    quota: [S] int64. The tokens of an expert, in their order, take its slots in turn so that any run of them is shared
    in proportion to the quotas: slot s has its g-th turn (2 g + 1) / (2 quota[s]) of the way through the expert's
    tokens, ties to the lower slot. Tokens beyond the quotas, such as those of an expert without a slot, get -1.

    >>> ids = np.array([[0], [0], [1], [0], [0]], dtype=np.int16)
    >>> assign(ids, np.array([3, 1, 1]), np.array([0, 1, 0], dtype=np.int32)).ravel().tolist()
    [0, 0, 1, 2, 0]
    """
    experts = int(max(topk_ids.max(initial=-1), physical_to_logical_map.max(initial=-1))) + 1
    copies = Copies.of(np.where(quota > 0, physical_to_logical_map, -1), experts)
    share = quota[copies.slot]
    if copies.counts.max(initial=0) > 1 and compiled():  # loading Numba is not worth it for a table
        from sim.kernels import replicas as kernel

        slots = np.full(topk_ids.shape, -1, dtype=np.int16)
        kernel.assign(topk_ids, share, copies.start, copies.slot, slots)
        return slots
    return assign_plain(topk_ids, share, copies)


def assign_plain(topk_ids: I16, share: I64, copies: Copies) -> I16:
    """Do `assign` in NumPy, given the slots with a quota and their quotas ``share`` [V], all above 0."""
    experts = len(copies.counts)
    asked = np.bincount(topk_ids.ravel() + 1, minlength=experts + 1)
    room = np.bincount(copies.expert, weights=share, minlength=experts).astype(np.int64)
    if copies.counts.max(initial=0) <= 1 and (asked[1:] <= room).all():
        table = np.full(experts + 1, -1, dtype=np.int16)  # the last entry is where -1 looks
        table[copies.expert] = copies.slot
        return table[topk_ids]
    turns = _turns(share, room, copies)
    place = np.argsort(topk_ids, axis=None, kind="stable")[asked[0] :]
    taken = np.minimum(asked[1:], room)
    within = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
    slots = np.full(topk_ids.size, -1, dtype=np.int16)
    slots[place[np.repeat(np.cumsum(asked[1:]) - asked[1:], taken) + within]] = turns[
        np.repeat(np.cumsum(room) - room, taken) + within
    ]
    return slots.reshape(topk_ids.shape)


def _turns(share: I64, room: I64, copies: Copies) -> I16:
    """Return the slots [sum of room] in the order of their turns, expert after expert."""
    entry = np.repeat(np.arange(len(share)), share)
    turn = np.arange(len(entry)) - np.repeat(np.cumsum(share) - share, share)
    # The turns before turn g of slot s: its own earlier ones and, of another slot with quota p against q, those h with
    # (2 h + 1) / p below (2 g + 1) / q, or equal in a lower slot.
    place = turn + np.repeat((np.cumsum(room) - room)[copies.expert], share)
    siblings = copies.counts[copies.expert]
    for step in range(1, int(siblings.max(initial=1))):
        few = np.flatnonzero(np.repeat(siblings > step, share))
        own = entry[few]
        lower = copies.ordinal[own] >= step
        other = own - np.where(lower, step, step - siblings[own])
        due = (2 * turn[few] + 1) * share[other] - share[own]
        place[few] += np.where(lower, due // (2 * share[own]) + 1, -(-due // (2 * share[own])))
    turns = np.empty(len(entry), dtype=np.int16)
    turns[place] = copies.slot[entry]
    return turns


def compiled() -> bool:
    """Whether to use the Numba loops: unless GATESIM_KERNELS says ``numpy`` or Numba is not there. Results are equal."""
    return os.environ.get("GATESIM_KERNELS", "") != "numpy" and _numba_is_there()


@cache
def _numba_is_there() -> bool:
    return importlib.util.find_spec("numba") is not None
