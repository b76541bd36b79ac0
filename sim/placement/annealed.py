"""Local search on simulated time: simulated annealing (Kirkpatrick et al. 1983) from EPLB's plan."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from sim.placement import Evidence, Observed, Placement, replica_counts
from sim.placement.eplb import Eplb
from sim.slots import Slots
from sim.tokens import F64, I32, Bool


class Annealed(Placement):
    """Random steps at the slowest rank; the best plan met is kept, so it is never worse than EPLB's on what it saw.

    The cost of a plan is the time of the slowest rank's experts (``observed.rank_times_s``; without it their tokens),
    averaged over the windows: few tokens on many experts take longer than many on few, and a plan that is even over a day
    may be uneven in each hour, which sums of tokens do not show. A step swaps a slot of the slowest rank with any other
    slot, or writes the expert of one of the two over the other where that is a spare replica. A step that costs more is
    taken while it does so by less than the temperature times an exponential variate (the Metropolis rule without a
    logarithm); the temperature falls linearly to 0. All layers take their steps at once, each by itself. Expert groups
    are not kept together.

    steps: tried per layer. start_temperature: as a share of the cost of EPLB's plan.
    """

    kind: Literal["annealed"] = "annealed"
    needs: ClassVar[frozenset[Evidence]] = frozenset({"expert_tokens", "rank_times_s"})
    steps: Annotated[int, Field(ge=0, le=100_000)] = 1000
    start_temperature: Annotated[float, Field(ge=0, le=1)] = 0.001

    def seconds_per_plan(self, slots: Slots) -> float:
        return 2e-3 + 0.4e-3 * self.steps

    def place(self, slots: Slots, observed: Observed, rng: np.random.Generator) -> I32:
        placed = Eplb().place(slots, observed, rng)
        if not len(observed.expert_tokens):
            return placed
        layers = len(placed)
        cost, hot = _cost(placed, slots, observed)
        best, least, start = placed.copy(), cost.copy(), cost
        for step in range(self.steps):
            tried = _step(placed, hot, slots, rng)
            found, its_hot = _cost(tried, slots, observed)
            warmth = self.start_temperature * (1 - step / self.steps) * start * rng.standard_exponential(layers)
            taken = found - cost <= warmth
            placed = np.where(taken[:, None], tried, placed)
            cost, hot = np.where(taken, found, cost), np.where(taken, its_hot, hot)
            better = cost < least
            best[better], least[better] = placed[better], cost[better]
        return best


def _cost(placed: I32, slots: Slots, observed: Observed) -> tuple[F64, I32]:
    """Return the cost [L] of a map [L, S] and the rank [L] that is slowest on average."""
    layers = np.arange(len(placed))[:, None]
    tokens = observed.expert_tokens / replica_counts(placed, slots.n_routed_experts)
    per_rank = tokens[:, layers, placed].reshape(len(tokens), len(placed), slots.ep_size, slots.slots_per_rank)
    times = per_rank.sum(axis=-1) if observed.rank_times_s is None else observed.rank_times_s(per_rank)
    return times.max(axis=-1).mean(axis=0), times.mean(axis=0).argmax(axis=-1).astype(np.int32)


def _step(placed: I32, hot: I32, slots: Slots, rng: np.random.Generator) -> I32:
    """Return ``placed`` [L, S] with one step tried in every layer; a layer where it makes no sense is left as it is."""
    layers = np.arange(len(placed))
    mine = hot * slots.slots_per_rank + rng.integers(slots.slots_per_rank, size=len(placed))
    other = rng.integers(slots.n_slots, size=len(placed))
    kind = rng.integers(4, size=len(placed))  # 0, 1: swap; 2: my expert over the other; 3: the other's over mine
    count = replica_counts(placed, slots.n_routed_experts)
    e, f = placed[layers, mine], placed[layers, other]
    by_rank = placed.reshape(len(placed), slots.ep_size, -1)
    there = by_rank[layers, other // slots.slots_per_rank]
    here = by_rank[layers, hot]
    e_fits: Bool = ~(there == e[:, None]).any(axis=-1)
    f_fits: Bool = ~(here == f[:, None]).any(axis=-1)
    # Overwriting the slot of a sole replica would lose its expert: those layers swap instead.
    over_other = (kind == 2) & (count[layers, f] > 1)
    over_mine = (kind == 3) & (count[layers, e] > 1)
    e_goes = e_fits & (over_other | (~over_mine & f_fits))
    f_goes = f_fits & (over_mine | (~over_other & e_fits))
    tried = placed.copy()
    tried[layers[e_goes], other[e_goes]] = e[e_goes]
    tried[layers[f_goes], mine[f_goes]] = f[f_goes]
    return tried
