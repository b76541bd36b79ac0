"""Which copy of an expert a token goes to. Knows experts, slots and counts only; one file per rule.

A rule turns the demand of every source rank into quotas: how many of its tokens for an expert go to which of the
expert's slots. `assign` then hands the slots out to tokens, so a rule that looks at one rank (``static``), at nodes
(``nearest``) or at the whole batch (``least_loaded``, ``lp``) is the same kind of thing.
"""

from __future__ import annotations

from abc import abstractmethod

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


def assign(topk_ids: I16, quota: I64, physical_to_logical_map: I32) -> I16:
    """Return the slots [T, k] int16 of one source's tokens with experts [T, k] int16; -1 stays, and so does what the
    quota has no room for (experts without a slot).

    quota: [S] int64. The tokens of an expert, in their order, fill its slots in turn in proportion to their quotas.
    """
    raise NotImplementedError  # sim.replicas: by its helper
