"""Where the experts of one layer are, step after step, under one policy: first plan, later ones, and what they move."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np

from sim.conservation import check_replicas
from sim.placement import Observed, moves, per_slot_load, replica_counts
from sim.rng import stream
from sim.scenario import Scenario
from sim.settings import Policy, Rebalance
from sim.slots import Slots
from sim.tokens import F64, I16, I32, I64


def forecast(ages: F64, rule: Rebalance, *, interval: float, window: float, period: float | None) -> F64:
    """Return the weights [W] with which the next plan counts windows ``ages`` [W] ago.

    Ages, interval, window and period are in one unit, steps or seconds; age 0 is the newest. ``periodic`` looks at the
    windows that lie one period before the interval to come, and at the last window where none were seen.
    """
    if rule.forecast == "ema":
        weights: F64 = rule.ema_decay ** (ages / interval)
        return weights
    # The newest window ended now; the coming ones would have age -1 .. -interval.
    same = (ages >= period - interval) & (ages < period) if period is not None else ages < 0
    chosen = same if rule.forecast == "periodic" and same.any() else ages < window
    return chosen.astype(np.float64)


def balancedness(expert_tokens: F64, physical_to_logical_map: I32, slots: Slots) -> F64:
    """Return [...] mean over largest rank load if experts' tokens [..., E] were spread evenly over their slots [..., S]."""
    by_slot = per_slot_load(expert_tokens, physical_to_logical_map)
    ranks = by_slot.reshape(*by_slot.shape[:-1], slots.ep_size, slots.slots_per_rank).sum(axis=-1)
    largest = ranks.max(axis=-1)
    share: F64 = np.where(largest > 0, ranks.mean(axis=-1) / np.maximum(largest, 1e-300), 1.0)
    return share


class Hosting:
    """The slots of one layer.

    map: ``physical_to_logical_map`` [S] int32 in force. moved: [P, P] experts that rank s sends to rank d for the plan of
    this step, None without one.
    """

    def __init__(self, scenario: Scenario, policy: Policy, replica: int, layer: int) -> None:
        self.placement, self.replicas, self.rule = policy.placement, policy.replicas, policy.rebalance
        self.slots = scenario.slots(policy)
        self.stream = partial(stream, scenario.seed, "placement", replica, layer)
        self.loads: list[F64] = []
        self.pairs: list[F64] = []
        self.moved: I64 | None = None
        self.wants_history = bool(self.placement.needs) and self.rule.history_steps > 0
        self.watches_pairs = "coactivation" in self.placement.needs
        interval = self.rule.interval_steps
        self.kept_steps = 0 if interval is None else self._memory(interval)
        timed = "rank_times_s" in self.placement.needs
        self.rank_times_s = partial(expert_times_s, scenario, policy) if timed else None
        self._set(self._plan(Observed.nothing(1, self.slots.n_routed_experts), self.stream()))

    def _memory(self, interval: int) -> int:
        """Steps that have to be remembered."""
        rule = self.rule
        if rule.forecast == "ema":
            decay = max(rule.ema_decay, 1e-3)
            return max(interval, math.ceil(interval * math.log(1e-3) / math.log(decay)))
        return max(rule.window_steps or interval, (rule.period_steps or 0) if rule.forecast == "periodic" else 0)

    def _plan(self, observed: Observed, rng: np.random.Generator) -> I32:
        return np.asarray(self.placement.place(self.slots, observed, rng)[0])

    def _set(self, physical_to_logical_map: I32) -> None:
        self.map = physical_to_logical_map
        counts = replica_counts(self.map, self.slots.n_routed_experts)
        if (counts < 1).any() or len(self.map) != self.slots.n_slots:
            raise ValueError(
                f"placement {self.placement.kind} left out expert {int(np.argmin(counts))} or has not "
                f"{self.slots.n_slots} slots"
            )
        self.single = self.slots.n_slots == self.slots.n_routed_experts
        # Of an expert with several slots the first one.
        _, first = np.unique(self.map, return_index=True)
        self.expert_rank: I32 = self.slots.slot_rank[first]

    def observe(self, expert_tokens: I64, pairs: F64 | None) -> None:
        """Remember the tokens per expert [E] of one step, and its co-activation [E, E] where it was watched."""
        self.loads.append(expert_tokens.astype(np.float64))
        if pairs is not None:
            self.pairs.append(pairs)
        keep = max(self.kept_steps, self.rule.history_steps)
        self.loads, self.pairs = self.loads[-keep:] if keep else [], self.pairs[-keep:] if keep else []

    def first_plan(self) -> None:
        """Place the experts by the history seen; nothing has to move for that."""
        if self.wants_history and self.loads:
            seen = self._observed(np.ones(len(self.loads)))
            self._set(self._plan(replace(seen, previous=None), self.stream(-1)))

    def begin(self, step: int) -> None:
        """Plan anew before ``step`` if that is due."""
        self.moved, interval = None, self.rule.interval_steps
        if interval is None or step == 0 or step % interval or not self.loads:
            return
        ages = np.arange(len(self.loads) - 1, -1, -1, dtype=np.float64)
        window = float(self.rule.window_steps or interval)
        seen = np.array(self.loads)[ages < window].sum(axis=0)
        if balancedness(seen, self.map, self.slots) >= self.rule.threshold:
            return
        weights = forecast(
            ages,
            self.rule,
            interval=float(interval),
            window=window,
            period=None if self.rule.period_steps is None else float(self.rule.period_steps),
        )
        before = self.map
        self._set(self._plan(self._observed(weights), self.stream(step)))
        self.moved = moves(before, self.map, self.slots)

    def _observed(self, weights: F64) -> Observed:
        """What was seen, every remembered step counted by its weight [W]; those of no weight are left out."""
        counted = np.flatnonzero(weights)
        loads = np.array(self.loads)[counted, None, :] * weights[counted, None, None]
        pairs = None
        if self.watches_pairs and self.pairs:
            pairs = np.sum([self.pairs[i] * weights[i] for i in counted], axis=0)[None]
        return Observed(loads, pairs, self.map[None], self.rank_times_s)

    def quotas(self, kept: I64) -> I64:
        """Return [P, S]: each source's tokens per slot, for (token, expert) pairs ``kept`` [P, E] of one micro-batch.

        Raises ConservationError unless the slots of every expert get exactly its tokens.
        """
        if self.single:
            return kept[:, self.map]
        found = self.replicas.quotas(kept, self.map, self.slots)
        check_replicas(found, self.map, kept)
        return found

    def rank_tokens(self, quota: I64) -> I64:
        """Return [P] pairs that each rank's experts receive."""
        received: I64 = quota.sum(axis=0).reshape(self.slots.ep_size, -1).sum(axis=1)
        return received


def expert_times_s(scenario: Scenario, policy: Policy, slot_tokens: F64) -> F64:
    """Return seconds [..., P] of every rank's experts with tokens [..., P, slots_per_rank], for placements that search."""
    model = scenario.model_of(policy)
    return scenario.cost.compute.grouped_gemm_s(
        scenario.cluster.device,
        expert_tokens=slot_tokens,
        ep_tokens=slot_tokens.sum(axis=-1),
        hidden_size=model.dispatch_hidden_size,
        moe_intermediate_size=model.moe_intermediate_size or 0,
        dtype=scenario.cost.gemm_dtype,
    )


def coactivation(topk_ids: I16, n_routed_experts: int) -> F64:
    """Return [E, E] float64: tokens that chose both experts, from ids [T, k] int16 (-1: none).

    >>> coactivation(np.array([[0, 2], [2, -1]], np.int16), 3).tolist()
    [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 2.0]]
    """
    chosen = np.zeros((len(topk_ids), n_routed_experts + 1), dtype=np.float32)
    np.put_along_axis(chosen, topk_ids.astype(np.int64), 1.0, axis=1)  # -1 writes the last column
    chosen = chosen[:, :n_routed_experts]
    return (chosen.T @ chosen).astype(np.float64)  # sums of ones: exact in any order
