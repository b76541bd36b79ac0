"""The split of replicated experts that a linear program finds for every batch (github.com/deepseek-ai/LPLB, README)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from sim.replicas import Copies, ReplicaChoice, spread
from sim.replicas.interior import affine_scaling
from sim.replicas.round_robin import RoundRobin
from sim.slots import Slots
from sim.tokens import F64, I32, I64
from sim.units import Seconds


class Lp(ReplicaChoice):
    """Minimise the largest rank load, given the demand of all sources; every source must know that of the others.

    method: ``interior_point`` takes ``iterations`` affine-scaling steps, as LPLB's kernel takes five, and rounds to whole
    tokens; it keeps ``round_robin``'s split where that is better. ``highs`` solves to the end: no split into whole tokens
    has a smaller largest load. solve_s: time on the device in every layer; LPLB's README gives about 100 us inside a node
    and more between nodes. Nothing is charged, nor solved, without redundant experts.
    """

    kind: Literal["lp"] = "lp"
    method: Literal["interior_point", "highs"] = "interior_point"
    iterations: Annotated[int, Field(ge=1, le=100)] = 5
    """Steps of ``interior_point``."""
    solve_s: Seconds = 100e-6

    def seconds(self, slots: Slots) -> float:
        return self.solve_s if slots.num_redundant_experts else 0.0

    def quotas(self, demand: I64, physical_to_logical_map: I32, slots: Slots) -> I64:
        copies = Copies.of(physical_to_logical_map, slots.n_routed_experts)
        even = RoundRobin().quotas(demand, physical_to_logical_map, slots).sum(axis=0)[copies.slot]
        rank = copies.slot // slots.slots_per_rank
        problem = Problem.of(even, rank, copies, slots.ep_size)
        if not len(problem.entry):
            return spread(demand, even, copies, slots.n_slots)
        tokens = even.copy()
        if self.method == "highs":
            tokens[problem.entry] = exact(problem)
        else:
            shares = affine_scaling(problem.rank, problem.expert, problem.demand, problem.base, self.iterations)
            tokens[problem.entry] = rounded(shares, problem.expert, problem.demand)
        if _largest(tokens, rank) > _largest(even, rank):
            tokens = even
        return spread(demand, tokens, copies, slots.n_slots)


@dataclass(frozen=True, slots=True)
class Problem:
    """What there is to decide in one layer: n slots of the m experts that have several and are asked for; int64.

    entry: [n] the slots' places among all copies. rank, expert: [n] where each is, and whose, experts renumbered from 0
    and ascending. demand: [m] tokens of each expert. base: [P] tokens that every rank gets from all others.
    """

    entry: I64
    rank: I64
    expert: I64
    demand: I64
    base: I64

    @classmethod
    def of(cls, even: I64, rank: I64, copies: Copies, n_ranks: int) -> Problem:
        """Pick what can be decided, given the tokens [V] of any split that is not."""
        total = np.bincount(copies.expert, weights=even, minlength=len(copies.counts)).astype(np.int64)
        free = ((copies.counts > 1) & (total > 0))[copies.expert]
        entry = np.flatnonzero(free)
        experts, expert = np.unique(copies.expert[entry], return_inverse=True)
        base = np.bincount(rank[~free], weights=even[~free], minlength=n_ranks).astype(np.int64)
        return cls(entry, rank[entry], expert.astype(np.int64), total[experts], base)


def rounded(shares: F64, expert: I64, demand: I64) -> I64:
    """Return tokens [n] int64 near ``shares`` [n] that add up to each expert's ``demand`` [m], which the shares nearly do.

    Largest remainders get what whole numbers leave over, ties the lower slot.
    """
    whole = np.floor(shares).astype(np.int64)
    missing = demand - np.bincount(expert, weights=whole, minlength=len(demand)).astype(np.int64)
    order = np.lexsort((whole - shares, expert))
    counts = np.bincount(expert, minlength=len(demand))
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    whole[order] += missing[expert[order]] > place
    return whole


def exact(problem: Problem) -> I64:
    """Return the tokens [n] int64 of a split whose largest rank load is the smallest that whole tokens allow.

    With the largest load fixed at a whole number, what is left is a transport problem, whose corners are whole: the
    second solve is at the first one's optimum, rounded up. Raises RuntimeError if HiGHS fails.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csc_array

    n, m, ranks = len(problem.entry), len(problem.demand), len(problem.base)
    slot, ones = np.arange(n), np.ones(n)
    on_rank: Any = csc_array(
        (np.r_[ones, -np.ones(ranks)], (np.r_[problem.rank, np.arange(ranks)], np.r_[slot, np.full(ranks, n)])),
        shape=(ranks, n + 1),
    )
    of_expert: Any = csc_array((ones, (problem.expert, slot)), shape=(m, n + 1))
    lowest, highest, tokens = 0.0, np.inf, ones
    for _ in range(2):
        done = linprog(
            np.r_[np.zeros(n), 1.0],
            A_ub=on_rank,
            b_ub=-problem.base.astype(np.float64),
            A_eq=of_expert,
            b_eq=problem.demand.astype(np.float64),
            bounds=np.c_[np.r_[np.zeros(n), lowest], np.r_[np.full(n, np.inf), highest]],
            method="highs-ds",
        )
        if done.status != 0 or done.x is None:
            raise RuntimeError(f"the linear program of replicas failed: {done.message}")
        tokens = done.x[:n]
        # The optimum is a mean over some of the ranks: if not whole, it is 1 / ranks or more above the whole number below.
        lowest = highest = float(np.ceil(done.x[n] - 0.5 / ranks))
    return np.rint(tokens).astype(np.int64)


def _largest(tokens: I64, rank: I64) -> int:
    return int(np.bincount(rank, weights=tokens).max(initial=0))
