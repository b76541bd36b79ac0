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

    Unlike `eplb` it knows no nodes and no expert groups, gives an expert at most one replica per rank (while slots are no
    more than experts times ranks) and puts no two of them on one rank: a second copy in the same memory takes a slot and
    relieves nobody. Where only ranks that hold the expert have room, it trades places with a slot of another rank; only
    if no trade helps, a rank holds two.

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
        most = slots.ep_size * -(-slots.n_slots // (slots.n_routed_experts * slots.ep_size))
        expert, _, count = replicate_experts(load, slots.n_slots, most)
        share = np.take_along_axis(load / count, expert, axis=-1)
        placed = lightest_first(expert, share, slots.ep_size, slots.n_routed_experts)
        for layer in np.flatnonzero(_twice(placed, slots).any(axis=(-1, -2))):
            _separate(placed[layer], load[layer], slots)
        return placed.reshape(len(load), -1)


def lightest_first(expert: I64, share: F64, n_ranks: int, n_routed_experts: int) -> I32:
    """Return [X, n_ranks, n / n_ranks] int32: replicas of ``expert`` [X, n] with loads ``share`` [X, n] on ranks.

    Heaviest first, each to the lightest rank with room that does not hold the expert, else to the lightest with room.
    """
    rows, room = np.arange(len(expert)), expert.shape[1] // n_ranks
    order = np.argsort(-share, axis=-1, kind="stable")
    load = np.zeros((len(expert), n_ranks))
    filled = np.zeros((len(expert), n_ranks), dtype=np.int64)
    holds = np.zeros((len(expert), n_routed_experts, n_ranks), dtype=bool)
    placed = np.empty((len(expert), n_ranks, room), dtype=np.int32)
    for item in order.T:
        what = expert[rows, item]
        roomy = np.where(filled < room, load, np.inf)
        apart = np.where(holds[rows, what], np.inf, roomy)
        stuck = np.isinf(apart).all(axis=-1, keepdims=True)
        rank = np.where(stuck, roomy, apart).argmin(axis=-1)
        placed[rows, rank, filled[rows, rank]] = what
        filled[rows, rank] += 1
        load[rows, rank] += share[rows, item]
        holds[rows, what, rank] = True
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
