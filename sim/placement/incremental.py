"""Few moves instead of a fresh plan: the map in force, improved where its hottest rank gains most per moved slot.

EPLB solves every rebalance from scratch and so moves nearly all experts; vLLM issues 24069 and 37656 ask for plans that
move a few and measured 4.4 ms instead of 22-35 ms of moving on Ascend A2.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
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
        while True:
            state = _State(placed, load, had)
            steps = _join([_swaps(state), _copies(state)])
            worth = np.where(steps.cost <= left, steps.gain / np.maximum(steps.cost, 1), 0.0)
            best = int(worth.argmax())
            if worth[best] <= _NOTHING * state.total.max():
                return placed.reshape(-1)
            left -= int(steps.cost[best])
            placed.reshape(-1)[steps.slot[best]] = steps.expert[best]


class _State:
    """One layer: experts ``placed`` [P, slots_per_rank], their ``load`` [E], which rank ``had`` which before [P, E]."""

    def __init__(self, placed: I32, load: F64, had: Bool) -> None:
        self.placed, self.load, self.new = placed, load, (~had).astype(np.int64)
        self.held = _held(placed, len(load))
        self.count = self.held.sum(axis=0)
        self.share = (load / self.count)[placed]
        self.total = self.share.sum(axis=-1)
        self.hot = int(self.total.argmax())


@dataclass(frozen=True)
class _Steps:
    """Candidates: gain [n], cost in moved slots [n], and the ``expert`` [n, 2] that two slots [n, 2] hold afterwards."""

    gain: F64
    cost: I64
    slot: I64
    expert: I64


def _join(parts: list[_Steps]) -> _Steps:
    return _Steps(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(_Steps)))


def _held(placed: I32, n_routed_experts: int) -> I64:
    """Return [P, E]: slots of each rank that hold each expert."""
    return replica_counts(placed, n_routed_experts)


def _swaps(state: _State) -> _Steps:
    """Return all swaps of a slot of the hottest rank with a slot of another rank that make no second copy on a rank."""
    ranks, room = state.placed.shape
    mine, other = (
        g.ravel() for g in np.meshgrid(np.arange(room) + state.hot * room, np.arange(ranks * room), indexing="ij")
    )
    expert, share = state.placed.reshape(-1).astype(np.int64), state.share.reshape(-1)
    e, f, rank = expert[mine], expert[other], other // room
    apart = (state.held[rank, e] == 0) & (state.held[state.hot, f] == 0)
    mine, other, e, f, rank = mine[apart], other[apart], e[apart], f[apart], rank[apart]
    moved = share[mine] - share[other]
    after = np.maximum(state.total[state.hot] - moved, state.total[rank] + moved)
    cost = state.new[rank, e] + state.new[state.hot, f] - state.new[state.hot, e] - state.new[rank, f]
    return _Steps(state.total[state.hot] - after, cost, np.stack([mine, other], 1), np.stack([f, e], 1))


def _copies(state: _State) -> _Steps:
    """Return all ways to overwrite a spare replica that touch the hottest rank and make no second copy on a rank.

    Either an expert of the hottest rank gets one more replica, or a slot of that rank is overwritten.
    """
    experts, room = len(state.load), state.placed.shape[1]
    spare = np.flatnonzero(state.count[state.placed.reshape(-1)] > 1)
    pair = np.zeros((len(spare), experts), dtype=bool)
    pair[:, state.placed[state.hot]] = True
    pair[spare // room == state.hot] = True
    pair &= state.held[spare // room] == 0
    row, e = np.nonzero(pair)
    slot = spare[row]
    rank, f = slot // room, state.placed.reshape(-1)[slot].astype(np.int64)
    # What each replica of f takes over from the one that goes, and each of e hands to the one that comes.
    fewer, more = state.load[f] / np.maximum(state.count[f] - 1, 1), state.load[e] / (state.count[e] + 1)
    f_held, e_held = state.held.T[f], state.held.T[e]
    total = state.total + f_held * (fewer - state.load[f] / state.count[f])[:, None]
    total -= e_held * (state.load[e] / state.count[e] - more)[:, None]
    at = np.arange(len(slot))
    total[at, rank] += more - fewer
    touched = (f_held > 0) | (e_held > 0)
    touched[at, rank] = True
    after = np.where(touched, total, 0.0).max(axis=-1)
    cost = state.new[rank, e] - state.new[rank, f]
    return _Steps(state.total[state.hot] - after, cost, np.stack([slot, slot], 1), np.stack([e, e], 1))
