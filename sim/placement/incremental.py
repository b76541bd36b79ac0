"""Few moves instead of a fresh plan: the map in force, improved where its hottest rank gains most per moved slot.

EPLB solves every rebalance from scratch and so moves nearly all experts; vLLM issues 24069 and 37656 ask for plans that
move a few and measured 4.4 ms instead of 22-35 ms of moving on Ascend A2.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from sim.placement import Evidence, Observed, Placement, replica_counts
from sim.placement.eplb import Eplb
from sim.slots import Slots
from sim.tokens import F64, I32, I64, Bool

_NOTHING = 1e-9  # share of the hottest rank's load that is not worth a move: rounding


class Incremental(Placement):
    """From the map in force, the step with the largest gain per moved slot, again and again.

    A step relieves the rank with the largest load: it swaps one of its slots with a slot of another rank, copies one of
    its experts over a spare replica anywhere, or overwrites a spare replica on it. Its gain is by how much the ranks that
    it touches stay below the old maximum. It ends when no step gains or the moves are used up. Replicas share their
    expert's load equally; expert groups are not kept together. Without a map in force it is `eplb`.

    max_moves: slots of a layer that may come to hold an expert which their rank did not hold, per call, as counted by
    `sim.placement.moved_slots`.

    Rank 0 has 12 tokens, rank 1 has 4; one swap makes it 8 and 8:

    >>> observed = Observed(np.array([[[7.0, 5, 3, 1]]]), previous=np.array([[0, 1, 2, 3]], np.int32))
    >>> Incremental(max_moves=2).place(Slots(4, 2), observed, np.random.default_rng(0)).tolist()
    [[2, 1, 0, 3]]
    """

    kind: Literal["incremental"] = "incremental"
    needs: ClassVar[frozenset[Evidence]] = frozenset({"expert_tokens"})
    max_moves: Annotated[int, Field(ge=0)] = 8

    def seconds_per_plan(self, slots: Slots) -> float:
        return 2e-3 + 1.5e-3 * min(self.max_moves, slots.n_slots)

    def place(self, slots: Slots, observed: Observed, rng: np.random.Generator) -> I32:
        if observed.previous is None:
            return Eplb().place(slots, observed, rng)
        expected = (observed.load.shape[0], slots.n_slots)
        if observed.previous.shape != expected:
            raise ValueError(f"observed.previous has shape {observed.previous.shape}, the slots need {expected}")
        return np.stack(
            [
                self._layer(before.reshape(slots.ep_size, -1), load)
                for before, load in zip(observed.previous, observed.load, strict=True)
            ]
        )

    def _layer(self, before: I32, load: F64) -> I32:
        """Return [S] the improved map of one layer, from ``before`` [P, slots_per_rank] and ``load`` [E]."""
        placed, had, left = before.copy(), _held(before, len(load)) > 0, self.max_moves
        slots, room = placed.reshape(-1), placed.shape[1]
        while True:
            state = _State(placed, load, had)
            (swap, swap_cost), (copy, copy_cost, receives) = _swaps(state), _copies(state)
            swap_worth, copy_worth = _worth(swap, swap_cost, left), _worth(copy, copy_cost, left)
            most = max(swap_worth.max(initial=0.0), copy_worth.max(initial=0.0))
            if most <= _NOTHING * state.total[state.hot]:
                return slots
            if swap_worth.max(initial=0.0) == most:
                row, other = np.unravel_index(swap_worth.argmax(), swap.shape)
                mine = state.hot * room + row
                slots[mine], slots[other] = slots[other], slots[mine]
                left -= int(swap_cost[row, other])
            else:
                # Many copies relieve the hottest rank alike: the one whose rank ends lightest.
                row, expert = np.unravel_index(np.where(copy_worth == most, receives, np.inf).argmin(), copy.shape)
                slots[state.spare[row]] = expert
                left -= int(copy_cost[row, expert])


class _State:
    """One layer: experts ``placed`` [P, slots_per_rank], their ``load`` [E], which rank ``had`` which before [P, E].

    new: [P, E] 1 where an expert on a rank is a moved slot. held: [P, E] its slots there. share: [E] load per replica.
    total: [P] loads, ``hot`` the rank of the largest. spare: [T] slots whose expert has others.
    """

    def __init__(self, placed: I32, load: F64, had: Bool) -> None:
        self.expert, self.load, self.new = placed.reshape(-1).astype(np.int64), load, (~had).astype(np.int64)
        self.rank = np.arange(placed.size) // placed.shape[1]
        self.held = _held(placed, len(load))
        self.count = self.held.sum(axis=0)
        self.share = load / self.count
        self.total = self.share[placed].sum(axis=-1)
        self.hot = int(self.total.argmax())
        self.spare = np.flatnonzero(self.count[self.expert] > 1)


def _held(placed: I32, n_routed_experts: int) -> I64:
    return replica_counts(placed, n_routed_experts)


def _worth(gain: F64, cost: I64, left: int) -> F64:
    """Return the gain per moved slot, 0 where too many would move; steps that move back or within a rank cost one."""
    return np.where(cost <= left, gain / np.maximum(cost, 1), 0.0)


def _swaps(s: _State) -> tuple[F64, I64]:
    """Return gain and cost [slots_per_rank, S] of swapping a slot of the hottest rank with any slot.

    No gain where a rank would hold an expert twice.
    """
    e, f, rank = s.expert[s.rank == s.hot][:, None], s.expert, s.rank
    moved = s.share[e] - s.share[f]
    gain = np.minimum(moved, s.total[s.hot] - (s.total[rank] + moved))
    gain[(s.held[rank, e] > 0) | (s.held[s.hot, f] > 0)] = 0.0
    return gain, s.new[rank, e] + s.new[s.hot, f] - s.new[s.hot, e] - s.new[rank, f]


def _copies(s: _State) -> tuple[F64, I64, F64]:
    """Return gain, cost and the load of the slot's rank afterwards [T, E] of writing an expert over a spare slot.

    No gain where neither the expert nor the slot is on the hottest rank, or a rank would hold an expert twice.
    """
    rank, f = s.rank[s.spare], s.expert[s.spare]
    at, here = np.arange(len(f)), rank == s.hot
    # Each other replica of f takes over a part of the one that goes: [T, P] loads of ranks that hold one.
    grows = s.load[f] / (s.count[f] - 1) - s.share[f]
    risen = np.where(s.held.T[f] > 0, s.total + s.held.T[f] * grows[:, None], 0.0)
    on_hot = s.total[s.hot] + s.held[s.hot, f] * grows
    risen[at, rank] = risen[:, s.hot] = 0.0
    more = s.load / (s.count + 1)
    own = (s.total[rank] - s.share[f] + (s.held[rank, f] - 1) * grows)[:, None] + more
    relieved = on_hot[:, None] - s.held[s.hot] * (s.share - more)
    after = np.maximum(
        risen.max(axis=-1, initial=0.0)[:, None], np.where(here[:, None], own, np.maximum(own, relieved))
    )
    gain = s.total[s.hot] - after
    gain[(s.held[rank] > 0) | ~(here[:, None] | (s.held[s.hot] > 0))] = 0.0
    return gain, s.new[rank] - s.new[rank, f][:, None], own
