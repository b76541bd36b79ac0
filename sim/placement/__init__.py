"""Which slot holds which expert, replicas included. Knows experts and slots only; one file per rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from sim.plugin import Plugin
from sim.slots import Slots
from sim.tokens import F64, I32, I64

Evidence = Literal["expert_tokens", "coactivation", "rank_times_s"]


@dataclass(frozen=True)
class Observed:
    """What is known about the traffic when experts are placed; L layers, E experts, S slots.

    expert_tokens: [W, L, E] float64, tokens that each expert received in each of W windows, oldest first.
    coactivation: [L, E, E] float64, tokens that chose both experts (the diagonal: either's own), or None.
    previous: [L, S] int32, the map in force, or None.
    rank_times_s: from tokens per slot [..., P, slots_per_rank] to seconds [..., P] of a rank's experts, or None.
    """

    expert_tokens: F64
    coactivation: F64 | None = None
    previous: I32 | None = None
    rank_times_s: Callable[[F64], F64] | None = None

    @property
    def load(self) -> F64:
        """[L, E], summed over the windows."""
        total: F64 = self.expert_tokens.sum(axis=0)
        return total

    @classmethod
    def nothing(cls, n_layers: int, n_routed_experts: int) -> Observed:
        """No traffic seen yet."""
        return cls(np.zeros((0, n_layers, n_routed_experts)))


class Placement(Plugin):
    """A placement rule."""

    needs: ClassVar[frozenset[Evidence]] = frozenset()
    """What of `Observed` the rule reads besides ``previous``; empty: it may be placed before any traffic is seen."""

    num_redundant_experts: Annotated[int, Field(ge=0, le=4096)] = 0
    """Slots of a layer beyond one per expert, over the whole EP group (SGLang ``ep_num_redundant_experts``)."""

    def seconds_per_plan(self, slots: Slots) -> float:
        """Return about how long one layer's plan takes on this machine's processor, for the estimate of a run."""
        return 2e-3

    @abstractmethod
    def place(self, slots: Slots, observed: Observed, rng: np.random.Generator) -> I32:
        """Return ``physical_to_logical_map``, [L, n_slots] int32: the expert in each slot, every expert at least once.

        Layers do not influence each other. ``slots.num_redundant_experts`` is the rule's own. rng: for ties and searches.
        """


def replica_counts(physical_to_logical_map: I32, n_routed_experts: int) -> I64:
    """Return ``logical_count`` [..., E]: the slots of every expert, from a map [..., S]."""
    physical = np.asarray(physical_to_logical_map)
    rows = physical.reshape(-1, physical.shape[-1])
    at = rows + n_routed_experts * np.arange(len(rows))[:, None]
    counts = np.bincount(at.ravel(), minlength=len(rows) * n_routed_experts)
    return counts.reshape(*physical.shape[:-1], n_routed_experts).astype(np.int64)


def moved_slots(before: I32, after: I32, slots: Slots) -> I64:
    """Return [...] how many slots of ``after`` [..., S] hold an expert that their rank did not hold before.

    A rank that keeps an expert in another slot of its own copies it in its own memory, which is not counted.
    """
    shape = (*np.shape(after)[:-1], slots.ep_size, slots.slots_per_rank)
    old, new = np.reshape(before, shape), np.reshape(after, shape)
    had = (new[..., :, None] == old[..., None, :]).any(axis=-1)
    moved: I64 = (~had).sum(axis=(-1, -2)).astype(np.int64)
    return moved


def moves(before: I32, after: I32, slots: Slots) -> I64:
    """Return [P, P] int64: slots of ``after`` [S] on rank d with an expert that d did not hold in ``before`` [S], by the
    rank s that sends it.

    Of the ranks that hold the expert one in d's node sends, else any; of several the one that has sent least so far, then
    the lowest. As in `moved_slots`, of which a second copy on one rank is not sent either; nor is what no rank holds.
    """
    p, per_node = slots.ep_size, slots.ranks_per_node
    old, new = np.reshape(before, (p, -1)), np.reshape(after, (p, -1))
    sent: I64 = np.zeros((p, p), dtype=np.int64)
    holders: dict[int, list[int]] = {}
    for rank, held in enumerate(old.tolist()):
        for expert in dict.fromkeys(held):
            holders.setdefault(expert, []).append(rank)
    load = [0] * p
    for rank in range(p):
        had = set(old[rank].tolist())
        for expert in dict.fromkeys(new[rank].tolist()):  # a second copy on the rank comes from the first
            if expert in had or expert not in holders:
                continue
            source = min(holders[expert], key=lambda r: (r // per_node != rank // per_node, load[r], r))
            load[source] += 1
            sent[source, rank] += 1
    return sent


def per_slot_load(expert_tokens: F64, physical_to_logical_map: I32) -> F64:
    """Return [..., S]: every expert's load [..., E] in equal shares on its slots [..., S]."""
    counts = replica_counts(physical_to_logical_map, expert_tokens.shape[-1])
    share = expert_tokens / np.maximum(counts, 1)
    found: F64 = np.take_along_axis(
        np.broadcast_to(share, (*physical_to_logical_map.shape[:-1], share.shape[-1])),
        physical_to_logical_map.astype(np.int64),
        axis=-1,
    )
    return found
