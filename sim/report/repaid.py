"""What moving experts cost and gained in a run of steps: the break-even interval of every policy that moves them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sim.results import Result
from sim.settings import Policy


@dataclass(frozen=True, slots=True)
class Repaid:
    """Of one policy against one with the same gate and slots that moves nothing.

    cost_s: time that one new placement adds, mean over those made. gain_s: time that a step is shorter, mean over steps
    after the first new placement. steps: cost over gain, the interval below which moving does not pay; inf without a
    gain.
    """

    policy: str
    against: str
    moves: int
    cost_s: float
    gain_s: float

    @property
    def steps(self) -> float:
        return self.cost_s / self.gain_s if self.gain_s > 0 else math.inf


def repaid(result: Result) -> list[Repaid]:
    """Return one row per policy with ``rebalance.interval_steps`` that has timed steps and a counterpart that stays."""
    policies, table, found = result.scenario.policies, result.tables["steps"], []
    if "step_and_moves_s" not in table:
        return []
    name, step = np.array(table["policy"]), np.array(table["step"])
    time_s, whole_s, moved = (
        np.array([math.nan if value is None else value for value in table[column]], dtype=np.float64)
        for column in ("step_time_s", "step_and_moves_s", "moved_bytes")
    )
    for policy in policies:
        still = next((p for p in policies if p.rebalance.interval_steps is None and _alike(p, policy)), None)
        if policy.rebalance.interval_steps is None or still is None:
            continue
        mine = (name == policy.name) & ~np.isnan(time_s)
        made = mine & (moved > 0)
        if not made.any():
            continue
        after = step >= step[made].min()
        gain = time_s[(name == still.name) & ~np.isnan(time_s) & after].mean() - time_s[mine & after].mean()
        cost = float((whole_s - time_s)[made].mean())
        found.append(Repaid(policy.name, still.name, int(made.sum()), cost, float(gain)))
    return found


def _alike(one: Policy, other: Policy) -> bool:
    """Whether two policies differ in nothing but when, and by which rule, experts move."""
    own = {"name": "x", "rebalance": one.rebalance}
    same_rule = {"placement": other.placement}
    slots = one.placement.num_redundant_experts == other.placement.num_redundant_experts
    return (
        slots and one.model_copy(update=own | same_rule) == other.model_copy(update=own) and bool(one.placement.needs)
    )
