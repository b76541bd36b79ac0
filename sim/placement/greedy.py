"""Least-loaded-first placement of replicas (LPT, Graham 1969): what EPLB is without nodes, and with one rule more."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from sim.placement import Evidence, Observed, Placement, per_slot_load
from sim.placement.eplb import replicate_experts, seen_load
from sim.slots import Slots
from sim.tokens import F64, I32, I64, Bool


class Greedy(Placement):
    """Replicas where load per replica is largest; heaviest first, each on the lightest rank with room and without it.

    Unlike `eplb` it knows no nodes and no expert groups, gives an expert at most one replica per rank and puts no two of
    them on one rank: a second copy in the same memory takes a slot and relieves nobody. Where only ranks that hold the
    expert have room, it trades places with a slot of another rank; only if no trade helps, a rank holds two.

    A hot and a cold expert in four slots, by EPLB and by this rule:

    >>> from sim.placement.eplb import rebalance_experts
    >>> slots, observed = Slots(2, 2, 2), Observed(np.array([[[100.0, 10.0]]]))
    >>> rebalance_experts(observed.load, 4, num_groups=1, num_nodes=1, num_gpus=2)[0].tolist()
    [[0, 0, 0, 1]]
    >>> Greedy().place(slots, observed, np.random.default_rng(0)).tolist()
    [[0, 1, 0, 1]]
    """

    kind: Literal["greedy"] = "greedy"
    needs: ClassVar[frozenset[Evidence]] = frozenset({"expert_tokens"})

    def place(self, slots: Slots, observed: Observed, rng: np.random.Generator) -> I32:
        load = seen_load(observed)
        crowded = slots.n_slots > slots.n_routed_experts * slots.ep_size
        most = slots.n_slots if crowded else slots.ep_size
        expert, _, count = replicate_experts(load, slots.n_slots, most)
        share = np.take_along_axis(load / count, expert, axis=-1)
        placed = _lightest_first(expert, share, slots)
        for layer in np.flatnonzero(_twice(placed, slots).any(axis=(-1, -2))):
            _separate(placed[layer], load[layer], slots)
        return placed.reshape(len(load), -1)


def _lightest_first(expert: I64, share: F64, slots: Slots) -> I32:
    """Return [L, P, slots_per_rank] int32: replicas of ``expert`` [L, S] with loads ``share`` [L, S] on ranks."""
    layers = np.arange(len(expert))
    order = np.argsort(-share, axis=-1, kind="stable")
    load = np.zeros((len(expert), slots.ep_size))
    filled = np.zeros((len(expert), slots.ep_size), dtype=np.int64)
    holds = np.zeros((len(expert), slots.n_routed_experts, slots.ep_size), dtype=bool)
    placed = np.empty((len(expert), slots.ep_size, slots.slots_per_rank), dtype=np.int32)
    for item in order.T:
        what = expert[layers, item]
        roomy = np.where(filled < slots.slots_per_rank, load, np.inf)
        apart = np.where(holds[layers, what], np.inf, roomy)
        stuck = np.isinf(apart).all(axis=-1, keepdims=True)
        rank = np.where(stuck, roomy, apart).argmin(axis=-1)
        placed[layers, rank, filled[layers, rank]] = what
        filled[layers, rank] += 1
        load[layers, rank] += share[layers, item]
        holds[layers, what, rank] = True
    return placed


def _twice(placed: I32, slots: Slots) -> Bool:
    """Return [..., P, slots_per_rank]: slots whose expert an earlier slot of the same rank holds too."""
    earlier = np.tri(slots.slots_per_rank, k=-1, dtype=bool)
    same: Bool = np.equal(placed[..., :, None], placed[..., None, :])
    found: Bool = (same & earlier).any(axis=-1)
    return found


def _separate(placed: I32, load: F64, slots: Slots) -> None:
    """Trade each second copy on a rank of ``placed`` [P, slots_per_rank] for a slot elsewhere, in place, if one helps.

    The trade is the one that keeps the heavier of the two ranks lightest; it makes no new pair.
    """
    share = per_slot_load(load, placed.reshape(-1)).reshape(placed.shape)
    for rank, slot in np.argwhere(_twice(placed, slots)):
        mine, total = placed[rank, slot], share.sum(axis=-1)
        moved = share[rank, slot] - share
        heavier = np.maximum(total[rank] - moved, total[:, None] + moved)
        heavier[(placed == mine).any(axis=-1)] = np.inf
        heavier[np.isin(placed, placed[rank])] = np.inf
        there = np.unravel_index(heavier.argmin(), heavier.shape)
        if np.isfinite(heavier[there]):
            placed[rank, slot], placed[there] = placed[there], mine
            share[rank, slot], share[there] = share[there], share[rank, slot]
