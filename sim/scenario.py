"""The whole scenario as one frozen model, and the rules that hold between its parts.

Every key of a scenario file is a field here or in a plug-in. `load` reads a file with its references and overrides and
reports all problems at once, each at its line.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError

from sim import settings, yamlfile
from sim.cluster import Cluster
from sim.cost.memory import refusal, serving_memory_bytes, training_memory_bytes
from sim.deployment import Serving
from sim.gating.balance import Balance
from sim.hardware import BYTES_PER_ELEMENT
from sim.model import Model
from sim.pipeline import alive
from sim.pipeline.blocks import Block, block_parameters, stage_blocks
from sim.placement import Observed
from sim.plugin import Choice
from sim.rng import stream
from sim.settings import Cost, Parallel, Policy, Schedule, Steps, Straggler
from sim.slots import Slots
from sim.traffic import Traffic, TrafficShape
from sim.yamlfile import Document, Problem, ScenarioError

Rule = tuple[tuple[str | int, ...], str]
REFERENCES = frozenset({"model", "cluster"})


class Scenario(settings.Block):
    """Everything a run needs; two equal scenarios give the same bytes."""

    name: str = Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    replicas: int = Field(default=1, gt=0, le=10_000)
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
    serving: Serving | None = None
    """Requests to serve and the units that do; None: the run is one of ``steps``."""
    policies: Annotated[tuple[Policy, ...], Field(min_length=1, max_length=100)]

    def model_of(self, policy: Policy) -> Model:
        """The model that ``policy`` gates, with the policy's own number of experts per token if it has one."""
        model, k = policy.model or self.model, policy.num_experts_per_tok
        if k is None or k == model.num_experts_per_tok or not model.is_moe:
            return model
        try:
            return _with_k(model, k)
        except ValidationError:  # `problems` says why
            return model

    def parallel_of(self, policy: Policy) -> Parallel:
        return policy.parallel or self.parallel

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

    def problems(self) -> Iterator[Rule]:
        """Yield ``(path, rule)`` for everything that is wrong between the parts."""
        names = [policy.name for policy in self.policies]
        for i, policy in enumerate(self.policies):
            if policy.name in names[:i]:
                yield ("policies", i, "name"), f"another policy is called {policy.name!r}"
            yield from self._policy_problems(i, policy)
        for i, assumed in enumerate(self.router_dynamics):
            if not assumed.assumes:
                yield ("router_dynamics", i), f"{assumed.kind} balances a gate: put it into a policy's balance"
        yield from self._traffic_problems()
        cluster = self.cluster
        if cluster.inter_node is None and cluster.topology.domain(cluster) < cluster.n_devices:
            yield ("cluster", "inter_node"), f"{cluster.nodes} nodes need a link between them"
        if self.tokens_per_rank % self.schedule.micro_batches:
            yield ("schedule", "micro_batches"), f"must divide traffic.tokens_per_rank = {self.tokens_per_rank}"
        pilot_of_all = self.steps.resolution == "count" and self.steps.pilot_ranks >= self.parallel.ep_size
        if pilot_of_all and not any(self.pilots_once(policy) for policy in self.policies):
            yield (
                ("steps", "pilot_ranks"),
                f"must be < parallel.ep_size = {self.parallel.ep_size}: no gate stands still under stationary traffic, "
                "and a pilot of every rank of every step leaves nothing to draw",
            )
        if self.schedule.overlap == "forward_backward" and self.schedule.phase == "forward":
            yield ("schedule", "overlap"), "forward_backward needs phase: training"
        if self.pipelined and self.schedule.phase == "forward":
            yield ("schedule", "pipeline"), f"{self.schedule.pipeline.kind} needs phase: training"
        micro, length = self.tokens_per_rank // self.schedule.micro_batches, self.traffic.longest_sequence
        routed = any(self.model_of(policy).is_moe for policy in self.policies)
        if self.pipelined and self.steps.resolution == "count" and routed and length and micro % length:
            yield (
                ("schedule", "micro_batches"),
                f"a micro-batch of tokens_per_rank / micro_batches = {micro} tokens must hold whole sequences of {length} at "
                f"count level: set traffic.tokens_per_rank to a multiple of {self.schedule.micro_batches * length}",
            )
        if self.pipelined and self.cluster.faults:
            yield (
                ("cluster", "faults"),
                "a pipeline times the links of one EP group for all of them: set schedule.pipeline: none to study a fault",
            )
        if self.schedule.recompute == "full" and not self.pipelined:
            yield ("schedule", "recompute"), "full needs a schedule.pipeline, which times it"
        if self.pipelined and self.traffic.provides == "ids":
            yield ("traffic",), "a pipeline needs generated traffic: recorded choices have no batches to fill it"
        for i, slow in enumerate(self.stragglers):
            count = self.parallel.devices if self.pipelined else self.parallel.ep_size
            if slow.device >= count:
                yield ("stragglers", i, "device"), f"must be < {count}, the devices simulated"
        if self.steps.warmup.steps and self.steps.warmup.ranks > self.parallel.ep_size:
            yield ("steps", "warmup", "ranks"), f"must be <= parallel.ep_size = {self.parallel.ep_size}"
        if self.steps.warmup.steps and self.steps.warmup.tokens_per_rank < self.warmup_parts:
            yield (
                ("steps", "warmup", "tokens_per_rank"),
                f"must be at least schedule.micro_batches = {self.warmup_parts}",
            )
        try:
            self.cost.compute.gemm_s(
                self.cluster.device,
                tokens=1,
                in_features=1,
                out_features=1,
                dtype=self.cost.gemm_dtype,
            )
        except ValueError as error:
            key = "compute" if str(error).startswith(self.cost.compute.kind) else "gemm_dtype"
            yield ("cost", key), str(error)

    def _traffic_problems(self) -> Iterator[Rule]:
        """Start recorded traffic once, so that a trace that does not fit the model is refused before anything runs."""
        for policy in self.policies:
            model = self.model_of(policy)
            if self.traffic.provides == "ids" and model.is_moe:
                shape = TrafficShape(
                    model.n_moe_layers, model.n_routed_experts, model.num_experts_per_tok, self.parallel.ep_size
                )
                try:
                    source = self.traffic.start(shape, self.seed, 0)
                    ranks, tokens = self.parallel.ep_size, self.tokens_per_rank
                    source.batch("train", self.steps.count - 1, n_ranks=ranks, tokens_per_rank=tokens)
                except (ValueError, OSError) as error:
                    yield ("traffic",), str(error)
                return

    def _group_problems(self, where: tuple[str | int, ...], policy: Policy) -> Iterator[Rule]:
        """Data parallelism and pipelines: sizes that must divide or fit."""
        parallel, schedule, devices = self.parallel_of(policy), self.schedule, self.cluster.n_devices
        if parallel.dp_size is not None:
            if not self.pipelined:
                yield (*where, "dp_size"), "needs a schedule.pipeline; without one a single EP group is simulated"
            elif parallel.dp_size * parallel.tp_size % parallel.ep_size:
                yield (
                    (*where, "dp_size"),
                    f"x tp_size must be a multiple of ep_size = {parallel.ep_size}: whole EP groups",
                )
        if self.pipelined:
            needed = parallel.devices
            if needed > devices:
                yield (
                    (*where, "pp_size"),
                    f"{parallel.pp_size} stages x {parallel.ep_groups} groups of {parallel.ep_size} need {needed} devices; "
                    f"the cluster has {devices} (groups follow from dp_size)",
                )
            for field, rule in schedule.pipeline.problems(parallel.pp_size, schedule.micro_batches):
                yield ((*where, field) if field == "pp_size" else ("schedule", field)), rule

    def _hosting_problems(self, at: tuple[str | int, ...], where: tuple[str | int, ...], policy: Policy) -> Iterator[Rule]:
        """Slots that do not divide, placements that refuse them, and what only some runs can do with them."""
        model, placement, rule = self.model_of(policy), policy.placement, policy.rebalance
        redundant = placement.num_redundant_experts
        try:
            slots = self.slots(policy)
        except ValueError:
            if redundant:
                yield (
                    (*at, "placement", "num_redundant_experts"),
                    f"{model.n_routed_experts} + {redundant} slots must be a multiple of ep_size = "
                    f"{self.parallel_of(policy).ep_size}",
                )
            else:
                yield (
                    (*where, "ep_size"),
                    f"must divide n_routed_experts = {model.n_routed_experts} (or set placement.num_redundant_experts)",
                )
            return
        try:
            nothing = Observed.nothing(1, model.n_routed_experts)
            placement.place(slots, nothing, stream(self.seed, "placement", "checked"))
        except ValueError as error:
            yield (*at, "placement"), str(error)
        if slots.n_slots > np.iinfo(np.int16).max:
            yield (*at, "placement", "num_redundant_experts"), f"{slots.n_slots} slots, at most {np.iinfo(np.int16).max}"
        if redundant and self.schedule.phase == "training":
            yield (
                (*at, "placement", "num_redundant_experts"),
                "replicas are for phase: forward; in training they would have to share gradients",
            )
        if rule.interval_steps is not None and self.schedule.phase == "training":
            yield (*at, "rebalance", "interval_steps"), "moving experts needs phase: forward"
        if self.steps.resolution == "count" and (redundant or placement.needs or rule.interval_steps):
            yield (*at, "placement"), f"{placement.kind} looks at every token: set steps.resolution: token"
        if rule.forecast == "periodic" and rule.interval_steps and rule.period_steps is None:
            yield (*at, "rebalance", "period_steps"), "is what forecast: periodic needs"

    def _policy_problems(self, i: int, policy: Policy) -> Iterator[Rule]:
        at: tuple[str | int, ...] = ("policies", i)
        base, k = policy.model or self.model, policy.num_experts_per_tok
        if k is not None and base.is_moe:
            try:
                _with_k(base, k)
            except ValidationError as error:
                found = error.errors()[0]
                yield (*at, "num_experts_per_tok"), f"{'.'.join(map(str, found['loc']))} {found['msg']}"
        model, parallel = self.model_of(policy), self.parallel_of(policy)
        where = (*at, "parallel") if policy.parallel else ("parallel",)
        devices, per_node = self.cluster.n_devices, self.cluster.devices_per_node
        domain = self.cluster.topology.domain(self.cluster)
        if parallel.ep_size > devices:
            yield (
                (*where, "ep_size"),
                f"{parallel.ep_size} ranks need as many devices; the cluster has {self.cluster.nodes} nodes x "
                f"{per_node} = {devices}",
            )
        elif parallel.ep_size > domain and parallel.ep_size % domain:
            yield (*where, "ep_size"), f"must fill whole nodes of {domain} devices"
        if per_node % parallel.tp_size:
            yield (*where, "tp_size"), f"must divide devices_per_node = {per_node}"
        elif parallel.ep_size % parallel.tp_size:
            yield (*where, "tp_size"), f"must divide ep_size = {parallel.ep_size}"
        if parallel.pp_size > model.num_hidden_layers:
            yield (*where, "pp_size"), f"must be <= num_hidden_layers = {model.num_hidden_layers}"
        grouping = list(self._group_problems(where, policy))
        yield from grouping
        if model.is_moe:
            yield from self._hosting_problems(at, where, policy)
            if policy.parallel and parallel.ep_size != self.parallel.ep_size:
                yield (
                    (*where, "ep_size"),
                    f"policies with experts share one group: parallel.ep_size = {self.parallel.ep_size}",
                )
            if policy.parallel and parallel.ep_groups != self.parallel.ep_groups:
                yield (
                    (*where, "dp_size"),
                    f"policies with experts share their groups: {self.parallel.ep_groups} on each stage",
                )
            for j, own in enumerate(policy.balance):
                others = [
                    other.kind for other in policy.balance if other is not own and other.kind in ("bias", own.kind)
                ]
                if own.ranks_alone and others:
                    yield (*at, "balance", j), f"{own.kind} ranks by its own thresholds alone: not beside {others[0]}"
            for path, piece in policy.pieces():
                for field, rule in piece.for_model(model).problems(model):
                    yield (*at, *path, field), rule
            has, wants = self.traffic.provides, policy.select.needs
            if wants == "token_ids" and self.traffic.token_frequency is None:
                yield (
                    (*at, "select"),
                    f"select {policy.select.kind} routes by vocabulary index; traffic {self.traffic.kind} has no vocabulary",
                )
            elif wants != has and not (wants == "token_ids" and has == "logits"):
                yield (
                    (*at, "select"),
                    f"select {policy.select.kind} needs {wants}, traffic {self.traffic.kind} provides {has}"
                    + (
                        ": with recorded ids no other gate can be judged, only placements (use select: recorded)"
                        if has == "ids"
                        else ""
                    ),
                )
            if has == "ids" and policy.learns:
                yield (*at, "balance"), "recorded choices cannot be balanced after the fact; only placements can differ"
            if self.steps.resolution == "count":
                if has == "ids" or not policy.select.per_token or policy.select.varies:
                    yield (*at, "select"), f"select {policy.select.kind} cannot be drawn: set steps.resolution: token"
                if policy.capacity.kind != "none":
                    yield (*at, "capacity"), "what capacity drops cannot be drawn: set steps.resolution: token"
        elif policy.select.kind != "dense":
            yield (*at, "select"), "a model without routed experts takes select: dense"
        twin = any(self.model_of(p) == model and self.parallel_of(p) == parallel for p in self.policies[:i])
        if parallel.ep_size <= devices and parallel.pp_size <= model.num_hidden_layers and not grouping and not twin:
            # Memory comes last: it is only worth saying when the split itself makes sense, and once for all alike.
            text = refusal(self.memory(policy), self.cluster.device.memory_bytes)
            if text:
                less = {"none": "schedule.recompute: selective, ", "selective": "schedule.recompute: full, "}
                ways = less.get(self.schedule.recompute, "") if self.schedule.phase == "training" else ""
                yield (
                    where,
                    f"policy {policy.name!r} {text} of {self.cluster.device.name} (per device, {self.schedule.phase}); "
                    f"what helps: {ways}larger pp_size or ep_size, more micro_batches",
                )


@functools.lru_cache(maxsize=256)
def _with_k(model: Model, k: int) -> Model:
    return Model.model_validate(model.model_dump() | {"num_experts_per_tok": k})


def from_hf(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Make a model block of a JSON file: a Hugging Face config.json, or our own keys."""
    from sim.hf import is_hf_config

    if is_hf_config(data):
        return Model.from_hf(data, path.parent.name or path.stem).model_dump(mode="json", exclude_defaults=True)
    return data


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    allow_outside: bool = False,
) -> Scenario:
    """Read a scenario file (or take plain data), apply ``key=value`` overrides, and check everything.

    Raises `sim.yamlfile.ScenarioError` with every problem found: those of single fields first, and when there are none
    those between fields.
    """
    if isinstance(source, Mapping):
        document = yamlfile.document(dict(source), references=REFERENCES, convert=from_hf)
    else:
        document = yamlfile.read(source, references=REFERENCES, convert=from_hf, allow_outside=allow_outside)
    if overrides:
        document = yamlfile.apply_overrides(document, list(overrides))
    document = _trace_path(document, allow_outside)
    scenario = yamlfile.validate(Scenario, document)
    found = _located(document, scenario.problems())
    if found:
        raise ScenarioError(found)
    return scenario.resolved()


def _located(document: Document, found: Iterable[Rule]) -> list[Problem]:
    """Problems in the order of the files and of the lines in them."""
    files: dict[str, int] = {}
    for mark in document.marks.values():
        files.setdefault(mark.file, len(files))

    def place(rule: Rule) -> tuple[int, int, int]:
        path = rule[0]
        while path not in document.marks:
            path = path[:-1]
        mark = document.marks[path]
        return files[mark.file], mark.line, mark.column

    return [document.problem(path, rule) for path, rule in sorted(dict.fromkeys(found), key=place)]


def _trace_path(document: Document, allow_outside: bool) -> Document:
    """Resolve a trace: named in a file against that file, whose folder it may not leave; by the user, against here."""
    traffic = document.data.get("traffic")
    if not isinstance(traffic, dict) or not isinstance(traffic.get("path"), str):
        return document
    mark = document.marks.get(("traffic", "path"))
    named_in_file = mark is not None and mark.line > 0
    try:
        folder = os.path.realpath(os.path.dirname(mark.file) if mark is not None and named_in_file else ".")
        target = os.path.realpath(os.path.join(folder, traffic["path"]))
        inside = os.path.commonpath([folder, target]) == folder
    except (OSError, ValueError):
        raise ScenarioError([document.problem(("traffic", "path"), "is not a usable file name")]) from None
    if named_in_file and not allow_outside and not inside:
        raise ScenarioError([document.problem(("traffic", "path"), "a trace named in a file must lie in its folder")])
    document.data["traffic"] = traffic | {"path": target}
    return document
