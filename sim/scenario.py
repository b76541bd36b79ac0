"""The whole scenario as one frozen model, and the rules that hold between its parts.

Every key of a scenario file is a field here or in a plug-in. `sim.loading` reads one, `sim.checks` says what is wrong
between the parts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError

from sim import settings
from sim.cluster import Cluster
from sim.cost.memory import serving_memory_bytes, training_memory_bytes
from sim.deployment import Serving
from sim.designs.block import SweepBlock
from sim.gating.balance import Balance
from sim.hardware import BYTES_PER_ELEMENT
from sim.model import Model
from sim.pipeline import alive
from sim.pipeline.blocks import Block, block_parameters, stage_blocks
from sim.plugin import Choice
from sim.settings import Cost, Parallel, Policy, Schedule, Steps, Straggler
from sim.slots import Slots
from sim.traffic import Traffic


class Arena(NamedTuple):
    """Policies of a scenario, by number, and the scenario of these alone."""

    indices: tuple[int, ...]
    scenario: Scenario


class Scenario(settings.Block):
    """Everything a run needs; two equal scenarios give the same bytes."""

    name: str = Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the folder of the results."""
    description: str = ""
    """The question, for people; reports print it."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of all random streams: same scenario and seed, same bytes."""
    replicas: int = Field(default=1, gt=0, le=10_000)
    """Independent repetitions, each with traffic of its own that all policies share; two or more give intervals."""
    model: Model
    cluster: Cluster
    parallel: Parallel = Parallel()
    traffic: Annotated[Traffic, Choice(Traffic)]
    router_dynamics: tuple[Annotated[Balance, Choice(Balance)], ...] = ()
    """Assumptions about what training does to the router itself, under every policy; none by default."""
    steps: Steps = Steps()
    schedule: Schedule = Schedule()
    cost: Cost = Cost()
    stragglers: tuple[Straggler, ...] = ()
    """Devices that compute slowly, of a run of steps."""
    serving: Serving | None = None
    """Requests to serve and the units that do; None: the run is one of ``steps``."""
    policies: Annotated[tuple[Policy, ...], Field(min_length=1, max_length=100)]
    """The competitors; differences are against the first."""
    sweep: SweepBlock | None = Field(default=None, exclude=True)
    """What `sim.sweep` varies; no part of a run, nor of what is stored of one."""

    def model_of(self, policy: Policy) -> Model:
        """The model that ``policy`` gates, with the policy's own number of experts per token if it has one."""
        model, k = policy.model or self.model, policy.num_experts_per_tok
        if k is None or k == model.num_experts_per_tok or not model.is_moe:
            return model
        try:
            return with_k(model, k)
        except ValidationError:  # `problems` says why
            return model

    def parallel_of(self, policy: Policy) -> Parallel:
        return policy.parallel or self.parallel

    def arenas(self) -> tuple[Arena, ...]:
        """Policies by cluster and expert-parallel group, in the order of their first ones: who meets the same tokens."""
        found: dict[tuple[Cluster | None, Parallel | None], list[int]] = {}
        for i, policy in enumerate(self.policies):
            own = policy.parallel if self.serving or self.model_of(policy).is_moe else None
            found.setdefault((policy.cluster, own), []).append(i)
        return tuple(
            Arena(tuple(indices), self._alone(indices, cluster, parallel))
            for (cluster, parallel), indices in found.items()
        )

    def _alone(self, indices: Sequence[int], cluster: Cluster | None, parallel: Parallel | None) -> Scenario:
        """The scenario of some policies that share ``cluster`` and ``parallel``, where these are not its own."""
        if cluster is None and parallel is None and len(indices) == len(self.policies):
            return self
        changes: dict[str, Any] = {"cluster": cluster or self.cluster}
        dropped: dict[str, Any] = {"cluster": None} | ({} if parallel is None else {"parallel": None})
        changes["policies"] = tuple(self.policies[i].model_copy(update=dropped) for i in indices)
        if parallel is not None and self.serving is not None:
            units = self.serving.units[:1]  # `checks` refuses more
            count = max(1, units[0].count * units[0].parallel.ep_size // parallel.ep_size)
            unit = units[0].model_copy(update={"parallel": parallel, "count": count})
            changes["serving"] = self.serving.model_copy(update={"units": (unit,)})
        elif parallel is not None:
            warmup = self.steps.warmup
            fewer = warmup.model_copy(update={"ranks": min(warmup.ranks, parallel.ep_size)})
            changes |= {"parallel": parallel, "steps": self.steps.model_copy(update={"warmup": fewer})}
        return self.model_copy(update=changes)

    def slots(self, policy: Policy, parallel: Parallel | None = None) -> Slots:
        """Slots of ``policy``'s experts in every MoE layer of one EP group. Raises ValueError where they do not divide."""
        model, split = self.model_of(policy), parallel or self.parallel_of(policy)
        return Slots(
            n_routed_experts=model.n_routed_experts,
            ep_size=split.ep_size,
            num_redundant_experts=policy.placement.num_redundant_experts,
            ranks_per_node=self.cluster.topology.domain(self.cluster),
            n_group=model.n_group,
        )

    def pilots_once(self, policy: Policy) -> bool:
        """Whether one count-level pilot serves all steps: nothing moves the gate, nor the traffic."""
        still = not policy.learns and not self.router_dynamics
        return self.traffic.stationary and (still or self.steps.count == 1)

    @property
    def tokens_per_rank(self) -> int:
        return self.traffic.tokens_per_rank

    @property
    def parts(self) -> int:
        """Micro-batches of all EP groups of a stage: the group's m-th is number group x micro_batches + m."""
        return self.schedule.micro_batches * self.parallel.ep_groups

    @property
    def group_tokens(self) -> int:
        """Tokens per step of one rank's place in all EP groups of a stage together."""
        return self.tokens_per_rank * self.parallel.ep_groups

    @property
    def pilot_tokens(self) -> int:
        """Tokens of each rank of a pilot for all steps: one micro-batch, or all where a sequence spans several."""
        micro = self.tokens_per_rank // self.schedule.micro_batches
        length = self.traffic.longest_sequence
        return self.tokens_per_rank if length is None or micro % length else micro

    @property
    def warmup_parts(self) -> int:
        """Micro-batches of a warm-up batch; at count level, where a step may have hundreds, one."""
        return 1 if self.steps.resolution == "count" else self.schedule.micro_batches

    @property
    def pipelined(self) -> bool:
        return self.schedule.pipeline.kind != "none"

    def stages(self, policy: Policy) -> tuple[tuple[Block, ...], ...]:
        """What each pipeline stage holds of ``policy``'s model."""
        schedule, peak = self.schedule, self.cluster.device.peak
        weight = peak(self.cost.gemm_dtype) / peak("bf16")
        return stage_blocks(
            self.model_of(policy), self.parallel_of(policy).pp_size, schedule.mtp, schedule.sequence_length, weight
        )

    def timed_steps(self) -> range:
        """Steps whose time is simulated."""
        last = self.steps.count
        return {"last": range(last - 1, last), "all": range(last), "none": range(0)}[self.steps.timed]

    def resolved(self) -> Scenario:
        """Return a copy in which every policy states the values it takes from its model."""
        policies = []
        for policy in self.policies:
            model = self.model_of(policy)
            pieces = {
                "select": policy.select.for_model(model),
                "balance": tuple(rule.for_model(model) for rule in policy.balance),
                "capacity": policy.capacity.for_model(model),
            }
            policies.append(policy.model_copy(update=pieces))
        return self.model_copy(update={"policies": tuple(policies)})

    def memory(self, policy: Policy) -> dict[str, float]:
        """Return the bytes per device by item, ``total`` last (see `sim.cost.memory`)."""
        model, parallel, schedule = self.model_of(policy), self.parallel_of(policy), self.schedule
        experts = model.parameters.routed_experts
        dense = (model.total_parameters - experts) / (parallel.pp_size * parallel.tp_size)
        copies = 1 + policy.placement.num_redundant_experts / max(1, model.n_routed_experts)
        held = experts * copies / (parallel.ep_size * parallel.pp_size)
        micro_tokens = self.tokens_per_rank / schedule.micro_batches
        pairs = model.num_experts_per_tok + model.n_shared_experts if model.is_moe else 1.0
        width = (model.moe_intermediate_size if model.is_moe else model.intermediate_size) or 0
        bytes_per_weight = BYTES_PER_ELEMENT[self.cost.gemm_dtype]
        if schedule.phase == "forward":
            return serving_memory_bytes(
                dense_parameters=dense,
                expert_parameters=held,
                dense_weight_bytes=bytes_per_weight,
                expert_weight_bytes=bytes_per_weight,
                kv_tokens=float(self.tokens_per_rank),
                kv_bytes_per_token=model.kv_cache_bytes_per_token() / parallel.pp_size,
                batch_tokens=micro_tokens,
                hidden_size=model.hidden_size,
                expert_pairs_per_token=pairs,
                moe_intermediate_size=width,
            )
        kept, element = {"none": (15.0, 2.0), "selective": (4.0, 1.0), "full": (2.0, 0.0)}[schedule.recompute]
        shards = parallel.dense_ranks * schedule.pipeline.copies

        def bytes_of(dense: float, experts: float, layers: float, logits: float) -> dict[str, float]:
            """layers: alive micro-batches times layers. logits: tokens whose logits are held."""
            return training_memory_bytes(
                dense_parameters=dense,
                expert_parameters=experts,
                dense_optimizer_shards=shards,
                expert_optimizer_shards=parallel.ep_groups * schedule.pipeline.copies,
                tokens_in_flight=micro_tokens,  # of each tensor-parallel rank, with sequence parallelism
                layers=layers,
                hidden_size=model.hidden_size,
                kept_bytes_per_hidden=kept,
                expert_pairs_per_token=pairs,
                moe_intermediate_size=width,
                pair_element_bytes=element,
                logit_bytes=logits * model.vocab_size * 4.0,
            )

        if not self.pipelined:
            in_flight = parallel.pp_size + 1 if parallel.pp_size > 1 else schedule.micro_batches
            return bytes_of(dense, held, in_flight * -(-model.num_hidden_layers // parallel.pp_size), 0.0)
        stages, found = self.stages(policy), []
        layers_of = [float(sum(not block.is_head for block in stage)) for stage in stages]
        for rank in range(parallel.pp_size):
            blocks = [block for stage in schedule.pipeline.stages(rank, parallel.pp_size) for block in stages[stage]]
            sizes = [block_parameters(model, block) for block in blocks]
            program = schedule.pipeline.program(rank, parallel.pp_size, schedule.micro_batches)
            heads = any(block.is_head for block in blocks)
            found.append(
                bytes_of(
                    sum(dense for dense, _ in sizes) / parallel.tp_size,
                    sum(experts for _, experts in sizes) / parallel.ep_size,
                    alive(program, layers_of),
                    micro_tokens * heads,
                )
            )
        return max(found, key=lambda items: items["total"])


@functools.lru_cache(maxsize=256)
def with_k(model: Model, k: int) -> Model:
    return Model.model_validate(model.model_dump() | {"num_experts_per_tok": k})
