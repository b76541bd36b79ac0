"""Whether to enable a load balancer: plan on one window of traffic, judge on a later one, and weigh what it costs.

The protocol of vllm-ascend RFC 16795: what a plan is worth is never measured on the traffic that made it. Knows recorded
choices, a cluster and a model's sizes; `sim.advise` is its front door.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sim.cluster import Cluster
from sim.model import Model
from sim.settings import Cost

Serving = Literal["prefill", "decode"]
Verdict = Literal["worth it", "not worth it", "not enough evidence"]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is served on what.

    other_s: seconds of a step outside dispatch, experts and combine, None: what the cost laws say. solver_s: of making a plan. stall: whether serving
    waits for plan and moves, or both happen beside it. context: mean tokens of cache per request, in decode. interval:
    steps between two plans, None: what the traffic suggests. least_gain: share of a step below which a saving is not worth
    the trouble.
    """

    model: Model
    cluster: Cluster
    cost: Cost
    ep_size: int
    other_s: float | None = None
    solver_s: float = 1.0
    stall: bool = True
    context: int = 4096
    interval: int | None = None
    least_gain: float = 0.01
    seed: int = 0
