"""Whether to enable a load balancer: plan on one window of traffic, judge on a later one, and weigh what it costs.

The protocol of vllm-ascend RFC 16795: what a plan is worth is never measured on the traffic that made it. Knows recorded
choices, a cluster and a model's sizes; `sim.advise` is its front door.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sim.cluster import Cluster
from sim.cost import Mode
from sim.model import Model
from sim.settings import Cost

Serving = Literal["prefill", "decode"]
Verdict = Literal["worth it", "worth it if plans keep", "not worth it", "not enough evidence"]
"""``worth it if plans keep``: it pays only after more steps than were seen, in which plans showed no sign of ageing."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is served on what.

    other_s: seconds of a step outside dispatch, experts and combine, None: what the cost laws say. solver_s: of making a plan. stall: whether serving
    waits for plan and moves, or both happen beside it. context: mean tokens of cache per request, in decode. interval:
    steps between two plans, None: what the traffic suggests. least_gain: share of a step below which a saving is not worth
    the trouble. mode: DeepEP's kernels, None: low-latency ones in decode, normal ones in prefill. cache_tokens: from redundant
    experts to tokens of cache that they leave to a rank, None: what memory leaves. simulated: the traffic is a scenario's,
    which can be asked for more of it.
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
    mode: Mode | None = None
    cache_tokens: Callable[[int], float] | None = None
    simulated: bool = False
