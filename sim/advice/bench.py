"""Every option on every window, each timed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from sim.advice import Serving, Setup, costs
from sim.advice.batches import Batches
from sim.advice.clock import Clock
from sim.advice.options import Option, baseline, least_redundant, rank_imbalance
from sim.advice.rest import rest_s
from sim.slots import Slots
from sim.tokens import F64, I32

_NOISE = 1e-6
"""Share of a step below which a saving is the rounding of sums in another order."""


class Times(NamedTuple):
    """Judged batches of some windows: seconds [n] of a step, rank imbalance [n] (mean over layers of (max - mean) / mean),
    share [n] of the step that is communication."""

    step_s: F64
    imbalance: F64
    communication: F64


class Bench:
    """Batches of one phase under a clock."""

    def __init__(self, setup: Setup, batches: Batches, phase: Serving) -> None:
        self.setup, self.batches, self.phase = setup, batches, phase
        self.clock = Clock(setup, phase, 8 * batches.ids.shape[0] * batches.ids.shape[1])
        least = least_redundant(batches.n_routed_experts, setup.ep_size)
        self.baseline = baseline(least)
        self.like = Slots(
            batches.n_routed_experts, setup.ep_size, least, self.clock.network.ranks_per_node, setup.model.n_group or 1
        )
        self.other_s = rest_s(setup, phase, batches.tokens_per_rank) if setup.other_s is None else setup.other_s
        self._timed: dict[tuple[str, bytes, int], Times] = {}
        self.without = self.cache(self.baseline)

    def plan(self, option: Option, windows: Sequence[int]) -> I32:
        """Return the option's maps [L, S] after these windows."""
        return option.plan(self.like, self.batches.loads[list(windows)], self.setup.seed)

    def times(self, option: Option, maps: I32, windows: Iterable[int]) -> Times:
        """Return the times of all judged batches in these windows."""
        found = [self._window(option, maps, window) for window in windows]
        return Times(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def _window(self, option: Option, maps: I32, window: int) -> Times:
        key = (option.name, maps.tobytes(), window)
        if key not in self._timed:
            slots, layers = option.slots(self.like), self.setup.model.n_moe_layers
            each = [
                self.clock.step(self.batches.batch(number), maps, slots, option.replicas)
                for number in self.batches.judged(window)
            ]
            step_s = np.array([one.layer_s.mean() for one in each]) * layers + self.other_s
            busy_s = np.array([one.experts_s.mean() for one in each]) * layers + self.other_s
            self._timed[key] = Times(step_s, np.array([rank_imbalance(one.pairs) for one in each]), 1 - busy_s / step_s)
        return self._timed[key]

    def cache(self, option: Option) -> costs.Cache:
        """Return what the option leaves for the cache of the phase's batch. Prefill batches are not short of cache."""
        sequences = self.batches.tokens_per_rank if self.phase == "decode" else 0
        return costs.cache(self.setup, option.redundant, sequences)

    def fits(self, option: Option) -> bool:
        """Say whether the option's weights leave room for a cache; where not even the baseline's do, sizes are not asked."""
        return self.without.tokens <= 0 or self.cache(option).tokens > 0

    def saved_s(self, option: Option, step_s: F64, base_s: F64) -> F64:
        """Return seconds saved per step [n], for as many tokens as the baseline serves in one.

        Sequences that the replicas displace from the cache leave a smaller batch; its step is taken to last as long.
        """
        with_it, without = self.cache(option).batch_share, self.without.batch_share
        saved = base_s - step_s * (without / with_it if self.without.tokens > 0 else 1.0)
        return np.where(np.abs(saved) < _NOISE * base_s, 0.0, saved)
