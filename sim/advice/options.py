"""The placements that compete, and what each expects of the traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.placement import Observed, Placement
from sim.placement.biased import Biased
from sim.placement.eplb import Eplb
from sim.placement.linear import Linear
from sim.replicas import ReplicaChoice
from sim.replicas.least_loaded import LeastLoaded
from sim.replicas.nearest import Nearest
from sim.replicas.round_robin import RoundRobin
from sim.replicas.static import Static
from sim.rng import stream
from sim.slots import Slots
from sim.tokens import F64, I32, I64


@dataclass(frozen=True, slots=True)
class Option:
    """A placement with its replica choice, under the name that tables give it."""

    name: str
    placement: Placement
    replicas: ReplicaChoice

    @property
    def redundant(self) -> int:
        return self.placement.num_redundant_experts

    def slots(self, like: Slots) -> Slots:
        """Return ``like`` with the option's redundant experts."""
        return Slots(like.n_routed_experts, like.ep_size, self.redundant, like.ranks_per_node, like.n_group)

    def plan(self, like: Slots, loads: F64, seed: int) -> I32:
        """Return maps [L, S] for traffic with ``loads`` [W, L, E] in past windows."""
        return self.placement.place(self.slots(like), Observed(loads), stream(seed, "advice", "plan"))

    @property
    def policy(self) -> dict[str, object]:
        """The keys of a scenario's policy that run it."""
        placement = {"kind": self.placement.kind, "num_redundant_experts": self.redundant}
        return {"placement": placement, "replicas": self.replicas.kind}


def baseline(redundant: int) -> Option:
    """Return consecutive experts on consecutive ranks, which is what engines do by default."""
    return Option("no balancer", Linear(num_redundant_experts=redundant), Static())


BASELINE = baseline(0)


def options(redundant: Sequence[int]) -> list[Option]:
    """Return the options for these numbers of redundant experts, the baseline not included."""
    found = []
    for count in redundant:
        plan = Eplb(num_redundant_experts=count)
        if not count:
            found.append(Option("eplb, rearranged only", plan, Static()))
            continue
        found += [
            Option(f"eplb + {count}", plan, RoundRobin()),
            Option(f"eplb + {count}, least loaded", plan, LeastLoaded()),
            Option(f"biased + {count}, nearest", Biased(num_redundant_experts=count), Nearest()),
        ]
    return found


def fitting_redundant(n_routed_experts: int, ep_size: int) -> list[int]:
    """Return the fewest redundant experts that fill the ranks evenly, and one, two and four more per rank, as far as there
    are that many experts.

    >>> fitting_redundant(256, 32), fitting_redundant(8, 8), fitting_redundant(256, 144)
    ([0, 32, 64, 128], [0, 8], [32, 176])
    """
    least = least_redundant(n_routed_experts, ep_size)
    return [least] + [least + more * ep_size for more in (1, 2, 4) if least + more * ep_size <= n_routed_experts]


def least_redundant(n_routed_experts: int, ep_size: int) -> int:
    """Return the fewest redundant experts that fill the ranks evenly: 0 where their number divides the experts."""
    return -n_routed_experts % ep_size


def check_redundant(redundant: Sequence[int], n_routed_experts: int, ep_size: int) -> None:
    """Raise ValueError unless every number fills the ranks evenly."""
    least = least_redundant(n_routed_experts, ep_size)
    if least > 4 * n_routed_experts:
        raise ValueError(
            f"--ep-size must be at most {5 * n_routed_experts} for {n_routed_experts} experts [got {ep_size}]"
        )
    wrong = [count for count in redundant if count < 0 or (count - least) % ep_size or count > 4 * n_routed_experts]
    if wrong or len(set(redundant)) < len(redundant) or not redundant:
        fills = f"{least} plus " if least else ""
        raise ValueError(
            f"--redundant must be different numbers, {fills}multiples of the EP size {ep_size}, from {least} to "
            f"{4 * n_routed_experts} [got {','.join(map(str, redundant))}]"
        )


def rank_imbalance(pairs: I64) -> float:
    """Return the mean over [...] of (max - mean) / mean over ranks [..., P]; 0 where nothing came."""
    mean = pairs.mean(axis=-1)
    return float((np.where(mean > 0, pairs.max(axis=-1) / np.where(mean > 0, mean, 1.0), 1.0) - 1.0).mean())
