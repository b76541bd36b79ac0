"""Iteration times of one group of a serving unit, from its policy's routed tokens and the scenario's cost laws."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from sim.cluster import Cluster, build_network
from sim.cost.collectives import all_reduce_s
from sim.deployment import Serving, Unit
from sim.engine.iteration import Timed, Work
from sim.engine.routed import Group, RoutedTimes, Timing
from sim.engine.serving_durations import TrunkTimes
from sim.engine.serving_program import EVEN, Layer, Program, makespan_plain, program
from sim.network import Network
from sim.pool import Kind, Pool
from sim.scenario import Scenario
from sim.settings import Policy
from sim.tokens import F64, I32, I64, Bool
from sim.units import to_ps

Makespan = Callable[[Bool, I64, I64], int]

_WORTH_COMPILING = 1000
"""Iterations after which Numba is loaded for the rest; the times do not differ."""


_trunk_times = lru_cache(maxsize=32)(TrunkTimes)


@lru_cache(maxsize=16)
def _network(cluster: Cluster, ep_size: int) -> Network:
    return build_network(cluster, ep_size)


def _compiled() -> Makespan | None:
    forced = os.environ.get("GATESIM_KERNELS", "")
    if forced == "numpy" or importlib.util.find_spec("numba") is None:
        return None
    from sim.kernels.streams import makespan

    return makespan


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """How a batch is run: whole, or as two halves that overlap."""

    program: Program
    trunk: TrunkTimes
    routed: RoutedTimes | None
    halves: int


class Served:
    """Times iterations of one group (P ranks, D = P / tp_size attention ranks) in one state.

    pool: of the policy. maps: [L, S] int32 ``physical_to_logical_map`` of the pool's layers, -1 where nothing is held. Both
    None in a model without experts. compute, ports: [P] factors on the
    ranks' compute times and on what their network ports take. alive: [P]; dead ranks bring no tokens and their slots
    must be empty.
    """

    def __init__(
        self,
        scenario: Scenario,
        policy: Policy,
        unit: Unit,
        pool: Pool | None,
        maps: I32 | None,
        *,
        compute: F64 | None = None,
        ports: F64 | None = None,
        alive: Bool | None = None,
    ) -> None:
        self.scenario, self.policy, self.unit, self.pool = scenario, policy, unit, pool
        self.model, self.cluster = scenario.model_of(policy), scenario.cluster
        ranks = unit.parallel.ep_size
        self.n_ranks, self.tp = ranks, unit.parallel.tp_size
        self.compute = np.ones(ranks) if compute is None else compute
        self.ports = np.ones(ranks) if ports is None else ports
        self.alive = np.ones(ranks, dtype=bool) if alive is None else alive
        self.maps = maps
        self.mode = unit.mode or ("low_latency" if unit.role == "decode" else scenario.cost.mode)
        self.slow = self.compute.reshape(-1, self.tp).max(axis=1)
        self._even_slow = bool((self.slow == 1).all())
        draws = Serving.model_fields["draws"].default if scenario.serving is None else scenario.serving.draws
        self.draws = 1 if pool is None or pool.balanced else int(draws)
        self.host_ps = int(to_ps(unit.host_overhead_s))
        self._makespan: Makespan = makespan_plain
        self._calls = 0

    def time(self, work: Work, number: int) -> Timed:
        """See `sim.engine.iteration.IterationTimes`."""
        tokens = work.decode_tokens + work.prefill_tokens
        most = int(tokens.max())
        # Of one token on the busiest rank nothing would be left for the other half.
        way = self.overlapping if self.unit.micro_batches == 2 and most >= 2 else self.whole
        even = self._trunk(way, work, tokens, most)
        seconds, imbalance = [], 1.0
        for timing in self._routed(way, work, tokens, most, number):
            seconds += [even, timing.seconds.ravel()]
            imbalance = max(imbalance, timing.imbalance)
        duration_ps = to_ps(np.concatenate(seconds))
        self._count()
        ordered = way.program
        makespan = int(self._makespan(ordered.communicates, ordered.after, duration_ps[ordered.value]))
        attention, experts, other = (ordered.parts @ duration_ps).tolist()
        communication = makespan - attention - experts - other
        return Timed(makespan + self.host_ps, imbalance, attention, experts, communication, other + self.host_ps)

    def _count(self) -> None:
        self._calls += 1
        if self._calls == _WORTH_COMPILING:
            self._makespan = _compiled() or makespan_plain

    def _trunk(self, way: Way, work: Work, tokens: I64, most: int) -> F64:
        """Return seconds of `EVEN` on the slowest attention rank; of two halves, those of the larger one."""
        trunk, halves = way.trunk, way.halves
        prompts = work.prefill_tokens > 0 if work.prefill_tokens.any() else None
        tokens, most = -(-tokens // halves), -(-most // halves)
        total = trunk.layer.upto(most)[tokens]
        if work.decode_tokens.any():
            total = total + trunk.absorbed.upto(most)[-(-work.decode_tokens // halves)]
            total = total + trunk.decode_core(
                -(-work.decode_requests // halves),
                1 + self.unit.speculative_tokens,  # further tokens are padding, which attends to nothing
                -(-work.decode_kv_tokens // halves),
                prompts,
            )
        if prompts is not None:
            parts = -(-work.prefill_requests // halves), -(-work.prefill_tokens // halves), work.prefill_pairs / halves
            total = total + trunk.prefill_core(*parts)
        if not self._even_slow:
            total = total * self.slow
        rank = int(total.argmax())
        n, factor = int(tokens[rank]), float(self.slow[rank])
        before, gate, shared = (factor * part.at(n) for part in (trunk.before, trunk.gate, trunk.shared))
        reduce = self._reduce_s(most)
        named = {
            "before": before,
            "core": float(total[rank]) - before - gate - shared,
            "all_reduce": reduce,
            "gate": gate,
            "shared": shared,
            "dense": factor * trunk.dense.at(n),
            "ffn_reduce": reduce,
            "head": factor * trunk.head.at(-(-int(work.sampled[rank]) // halves)),
            "merge": factor * trunk.merge.at(n),
        }
        return np.array([named[phase] for phase in EVEN])

    def _reduce_s(self, tokens: int) -> float:
        """Seconds of one all-reduce of hidden states (bf16) over the tensor-parallel ranks of a node."""
        if self.tp == 1:
            return 0.0
        return float(all_reduce_s(self.cluster, self.tp, tokens * self.model.hidden_size * 2.0, self.tp))

    def _routed(self, way: Way, work: Work, tokens: I64, most: int, number: int) -> list[Timing]:
        """Return the routed times of each half: two draws that follow each other."""
        routed, halves = way.routed, range(way.halves)
        if routed is None:
            return [Timing(np.zeros((3, 1)), 1.0) for _ in halves]
        total, n = int(tokens.sum()), way.halves
        kind: Kind = "decode" if 2 * int(work.decode_tokens.sum()) >= total else "prefill"
        mixture = routed.mixture(work.topic_tokens)
        mean, largest = max(1.0, total / (n * len(routed.sources))), most / (n * self.tp)
        return routed.each(kind, mixture, [(number + half) % self.draws for half in halves], mean, largest)

    @cached_property
    def whole(self) -> Way:
        """One batch at a time: nothing runs beside the exchange but shared experts."""
        return self._way(1)

    @cached_property
    def overlapping(self) -> Way:
        """Two halves at a time."""
        return self._way(2)

    def _way(self, halves: int) -> Way:
        scenario, cost, model, device = self.scenario, self.scenario.cost, self.model, self.cluster.device
        exchanges = model.is_moe and self.n_ranks > 1
        overlapped = halves == 2 and exchanges
        lent = cost.communication.sms(self.mode) if overlapped else 0
        lent = lent if lent < device.n_sm else 0
        sm_fraction = (device.n_sm - lent) / device.n_sm
        routed, sampled, slots = None, 1, None
        if self.pool is not None and self.maps is not None:
            slots, sampled = scenario.slots(self.policy, self.unit.parallel), len(self.pool.layers)
            routed = RoutedTimes(
                self.pool,
                Group(slots, self.maps, self.compute, self.ports, self.alive),
                _network(self.cluster, self.n_ranks) if exchanges else None,
                model=model,
                device=device,
                cost=cost,
                mode=self.mode,
                replicas=self.policy.replicas,
                overlapped=overlapped,
                sm_fraction=sm_fraction,
                usual=scenario.traffic.topic_weights,
            )
        trunk = _trunk_times(
            model,
            device,
            cost.compute,
            dtype=cost.gemm_dtype,
            tp_size=self.tp,
            sm_fraction=sm_fraction,
            cache_bytes_per_element=self.unit.kv_cache_bytes_per_element,
            choice_s=0.0 if slots is None else self.policy.replicas.seconds(slots),
        )
        steps = program(
            self._layers(),
            sampled,
            halves=halves,
            staged=self.mode == "low_latency",
            exchanges=exchanges,
            shared=model.shared_expert_parameters > 0,
            reduces=self.tp > 1,
        )
        return Way(steps, trunk, routed, halves)

    def _layers(self) -> tuple[Layer, ...]:
        """Layers and head, then an MTP module (merge, a layer like the last, head) for every token that is proposed."""
        model, experts = self.model, set(self.model.moe_layers)
        layers: list[Layer] = ["moe" if i in experts else "dense" for i in range(model.num_hidden_layers)]
        again: list[Layer] = ["merge", layers[-1], "head"]
        return (*layers, "head", *(again * self.unit.speculative_tokens))
