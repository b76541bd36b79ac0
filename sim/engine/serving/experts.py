"""Where a policy's experts are while its units serve: plans from what was served, moves, and what a death leaves.

MoE layers are sampled (`sim.pool`): each layer here stands for as many of the model's.
"""

from __future__ import annotations

from functools import cached_property, partial

import numpy as np

from sim.cluster import build_network
from sim.engine.iteration import IterationTimes
from sim.engine.moves import chunk_s, expert_bytes
from sim.engine.served import Served
from sim.engine.serving.policy import Move, Repair, State
from sim.hosting import balancedness, coactivation, expert_times_s, forecast
from sim.placement import Observed, moves
from sim.pool import Pool
from sim.rng import stream
from sim.scenario import Scenario
from sim.settings import Policy, Rebalance
from sim.slots import Slots
from sim.tokens import F64, I32, Bool
from sim.units import to_ps

_SEEN_TOKENS = 1e6  # behind a first plan, which is made from expected loads


class Experts:
    """The experts of ``policy`` on the units of ``scenario``; a `sim.engine.serving.policy.ServingPolicy`."""

    def __init__(self, scenario: Scenario, policy: Policy, replica: int) -> None:
        assert scenario.serving is not None
        self.scenario, self.policy, self.replica, self.units = scenario, policy, replica, scenario.serving.units
        self.model = scenario.model_of(policy)
        self.pool: Pool | None = None
        if self.model.is_moe:
            serving = scenario.serving
            self.pool = Pool.of(
                scenario, policy, replica, sampled_layers=serving.sampled_layers, pool_tokens=serving.pool_tokens
            )
            self.per_layer = self.model.n_moe_layers / len(self.pool.layers)
        self._times: dict[tuple[int, bytes, State], IterationTimes] = {}
        self._moves: dict[tuple[int, bytes, bytes], Move] = {}
        self._plans = 0

    @property
    def rebalance(self) -> Rebalance:
        return self.policy.rebalance

    def _slots(self, unit: int) -> Slots:
        return self.scenario.slots(self.policy, self.units[unit].parallel)

    def _pool(self) -> Pool:
        assert self.pool is not None
        return self.pool

    @cached_property
    def _rates(self) -> F64:
        """[topics, L, E] tokens that each expert receives per token of a topic."""
        pool = self._pool()
        shelf = pool.decode
        n_layers, experts = len(shelf.ids), pool.n_routed_experts
        rates = np.zeros((len(shelf.first) - 1, n_layers, experts))
        for topic, (begin, end) in enumerate(zip(shelf.first[:-1], shelf.first[1:], strict=True)):
            ids = shelf.ids[:, begin:end].reshape(n_layers, -1).astype(np.int64)
            for layer, chosen in enumerate(ids):
                rates[topic, layer] = np.bincount(chosen[chosen >= 0], minlength=experts) / max(1, end - begin)
        return rates

    def loads(self, topic_tokens: F64) -> F64:
        """Return [..., L, E] tokens that experts receive of ``topic_tokens`` [..., topics]; a pool without topics has one."""
        rates = self._rates
        tokens = topic_tokens if topic_tokens.shape[-1] == len(rates) else topic_tokens.sum(axis=-1, keepdims=True)
        found: F64 = np.tensordot(tokens, rates, axes=1)
        return found

    def first(self, unit: int) -> I32 | None:
        """See `ServingPolicy`: planned from the traffic's own mixture if the placement looks at loads."""
        if self.pool is None:
            return None
        slots, placement = self._slots(unit), self.policy.placement
        observed = Observed.nothing(len(self.pool.layers), slots.n_routed_experts)
        if placement.needs and self.rebalance.history_steps:
            expected = self.loads(_SEEN_TOKENS * self.scenario.traffic.topic_weights)
            observed = self._observed(expected[None], None)
        return placement.place(slots, observed, self._stream(unit))

    def _stream(self, unit: int) -> np.random.Generator:
        self._plans += 1
        return stream(self.scenario.seed, "placement", self.replica, "serving", unit, self._plans)

    def _observed(self, loads: F64, maps: I32 | None) -> Observed:
        needs = self.policy.placement.needs
        pool = self._pool()
        pairs = None
        if "coactivation" in needs:
            ids = pool.decode.ids
            pairs = np.stack([coactivation(layer, pool.n_routed_experts) for layer in ids])
        times = partial(expert_times_s, self.scenario, self.policy) if "rank_times_s" in needs else None
        return Observed(loads, pairs, maps, times)

    def times(self, unit: int, maps: I32 | None, state: State) -> IterationTimes:
        """See `ServingPolicy`; the clock of one state is made once."""
        key = (unit, b"" if maps is None else maps.tobytes(), state)
        if key not in self._times:
            ranks = self.units[unit].parallel.ep_size
            compute, ports, alive = np.ones(ranks), np.ones(ranks), np.ones(ranks, dtype=bool)
            for factors, pairs in ((compute, state.slow_devices), (ports, state.slow_links)):
                for rank, factor in pairs:
                    factors[rank] = factor
            alive[list(state.dead)] = False
            self._times[key] = Served(
                self.scenario,
                self.policy if maps is None else self._widened(maps.shape[1]),
                self.units[unit],
                self.pool,
                maps,
                compute=compute,
                ports=ports,
                alive=alive,
            )
        return self._times[key]

    def _widened(self, n_slots: int) -> Policy:
        """The policy with as many slots as a repaired map has."""
        redundant = n_slots - self.model.n_routed_experts
        if redundant == self.policy.placement.num_redundant_experts:
            return self.policy
        placement = self.policy.placement.model_copy(update={"num_redundant_experts": redundant})
        return self.policy.model_copy(update={"placement": placement})

    def plan(self, unit: int, topic_tokens: F64, ages_s: F64, maps: I32) -> I32 | None:
        """See `ServingPolicy`: a layer whose window is balanced enough keeps its map."""
        rule, slots = self.rebalance, self._slots(unit)
        assert rule.interval_s is not None
        window = rule.window_s or rule.interval_s
        history = self.loads(topic_tokens)
        keep = balancedness(history[ages_s < window].sum(axis=0), maps, slots) >= rule.threshold
        if keep.all():
            return None
        weights = forecast(ages_s, rule, interval=rule.interval_s, window=window, period=rule.period_s)
        expected = history[weights > 0] * weights[weights > 0, None, None]
        planned = self.policy.placement.place(slots, self._observed(expected, maps), self._stream(unit))
        return np.where(keep[:, None], maps, planned).astype(np.int32)

    def move(self, unit: int, before: I32, after: I32) -> Move:
        """See `ServingPolicy`: ``layers_per_chunk`` layers at a time, each chunk as one exchange under the scenario's
        communication cost."""
        key = unit, before.tobytes(), after.tobytes()
        if key not in self._moves:
            self._moves[key] = self._move(unit, before, after)
        return self._moves[key]

    def _move(self, unit: int, before: I32, after: I32) -> Move:
        slots = self._slots(unit)
        held = np.where(before < 0, -2, before)  # an empty slot is nothing that could be sent to fill another
        sent = np.stack([moves(old, new, slots) for old, new in zip(held, after, strict=True)])
        size = expert_bytes(self.scenario, self.policy)
        n = self.per_layer * int(sent.sum())
        if not n:
            return Move(0, 0.0, ())
        network = build_network(self.scenario.cluster, slots.ep_size)
        together = min(self.rebalance.layers_per_chunk, self.model.n_moe_layers)
        times = [int(to_ps(chunk_s(self.scenario, self.policy, network, layer * together))) for layer in sent]
        chunks = -(-self.model.n_moe_layers // together)
        return Move(round(n), n * size, tuple(times[i * len(times) // chunks] for i in range(chunks)))

    def repair(self, unit: int, maps: I32 | None, dead: tuple[int, ...], held: I32 | None) -> Repair:
        """See `ServingPolicy`."""
        if maps is None or held is None:
            return Repair(maps)
        ranks, experts = self.units[unit].parallel.ep_size, self.model.n_routed_experts
        found = without(maps, dead, ranks, experts) if dead else maps
        there = holders(held, ranks, experts)
        there[:, list(dead)] = False
        lost = int((~there.any(axis=1)).sum())
        n = round(int((holders(found, ranks, experts) & ~there).sum()) * self.per_layer)
        return Repair(found, 1.0 - lost / (len(maps) * experts), n, n * expert_bytes(self.scenario, self.policy))


def holders(maps: I32, n_ranks: int, n_experts: int) -> Bool:
    """Return [L, P, E] whether a rank holds an expert in one of its slots of ``maps`` [L, S]."""
    slots = maps.reshape(len(maps), n_ranks, -1)
    found = np.zeros((len(maps), n_ranks, n_experts + 1), dtype=bool)
    layers, ranks, _ = np.indices(slots.shape)
    found[layers, ranks, slots] = True
    return found[:, :, :n_experts]  # what is -1 has gone to the end


def without(maps: I32, dead: tuple[int, ...], n_ranks: int, n_experts: int) -> I32:
    """Return ``maps`` [L, S] with -1 in all slots of the ranks ``dead``. Experts that are left without a copy are put in
    empty slots of the other ranks, then in place of the copies of whichever expert has most, then in a slot more on every
    rank. Raises ValueError if nobody is left.

    >>> without(np.array([[0, 1, 2, 0]], np.int32), (1,), 2, 3)
    array([[ 0,  1,  2, -1, -1, -1]], dtype=int32)
    """
    n_layers = len(maps)
    held = maps.reshape(n_layers, n_ranks, -1).copy()
    gone = np.isin(np.arange(n_ranks), dead)
    if gone.all():
        raise ValueError("no rank is left")
    held[:, gone] = -1
    homeless: list[list[int]] = []
    for layer in held:
        copies = np.bincount(layer[layer >= 0], minlength=n_experts)
        missing = np.flatnonzero(copies == 0).tolist()
        places = np.argwhere((layer < 0) & ~gone[:, None]).tolist()
        while missing and (places or copies.max() > 1):
            if places:
                rank, slot = places.pop(0)
            else:
                most = int(copies.argmax())
                rank, slot = np.argwhere(layer == most)[-1].tolist()
                copies[most] -= 1
            layer[rank, slot] = missing.pop(0)
            copies[layer[rank, slot]] += 1
        homeless.append(missing)
    left = np.flatnonzero(~gone)
    more = -(-max(map(len, homeless)) // len(left))
    wide = np.full((n_layers, n_ranks, held.shape[2] + more), -1, dtype=np.int32)
    wide[:, :, : held.shape[2]] = held
    for layer, missing in zip(wide, homeless, strict=True):
        for i, expert in enumerate(missing):
            layer[left[i % len(left)], held.shape[2] + i // len(left)] = expert
    return wide.reshape(n_layers, -1)
