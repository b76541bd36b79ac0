"""The blocks of a scenario file: how the model is split, what a step is, which laws cost what, who competes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sim.cluster import Cluster
from sim.cost import CommunicationCost, ComputeCost
from sim.cost.calibrated import Calibrated
from sim.cost.port import Port
from sim.gating import Gating
from sim.model import Model
from sim.pipeline import Pipeline
from sim.pipeline.none import NoPipeline
from sim.placement import Placement
from sim.placement.linear import Linear
from sim.plugin import Choice
from sim.replicas import ReplicaChoice
from sim.replicas.static import Static
from sim.units import Span


class Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Parallel(Block):
    """How the model is split. Without a ``schedule.pipeline`` the run simulates one expert-parallel group and passes all
    layers through it, and ``pp_size`` divides memory only; with one, all stages and groups are simulated."""

    ep_size: int = Field(default=1, gt=0)
    """Expert-parallel ranks: every rank hosts n_routed_experts / ep_size experts of each layer."""
    pp_size: int = Field(default=1, gt=0)
    """Pipeline stages."""
    tp_size: int = Field(default=1, gt=0)
    """Tensor-parallel ranks of the non-expert layers, inside a node; costs two all-reduces per layer and direction."""
    dp_size: int | None = Field(default=None, gt=0)
    """Data-parallel ranks of the non-expert layers of a stage; None: those of one EP group, ep_size / tp_size. A stage
    then has ``dp_size x tp_size / ep_size`` EP groups, which share ZeRO-1's optimiser state."""

    @property
    def dense_ranks(self) -> int:
        """Data-parallel ranks of the non-expert layers of a stage."""
        return self.dp_size or max(1, self.ep_size // self.tp_size)

    @property
    def devices(self) -> int:
        """Devices of all stages and groups."""
        return self.pp_size * self.ep_groups * self.ep_size

    @property
    def ep_groups(self) -> int:
        """Expert-parallel groups that work on each stage."""
        return max(1, (self.dp_size or 0) * self.tp_size // self.ep_size)


class Warmup(Block):
    """Before step 0, settle the balancing rules on smaller batches, their rate falling from ``gain`` times to once."""

    steps: int = Field(default=0, ge=0, le=100_000)
    """Warm-up batches; 0: rules start from nothing at step 0."""
    ranks: int = Field(default=8, gt=0)
    """Ranks of a warm-up batch."""
    tokens_per_rank: int = Field(default=512, gt=0)
    """Tokens of each of them."""
    gain: float = Field(default=20.0, ge=1, le=1e6)
    """What the update rate is multiplied by at first; it falls geometrically to 1."""


class Steps(Block):
    """Optimisation steps: each routes a fresh batch through every layer, then the balancing rules learn from it."""

    count: int = Field(default=1, gt=0, le=1_000_000)
    """Steps to simulate."""
    timed: Literal["last", "all", "none"] = "last"
    """Steps whose time is simulated."""
    warmup: Warmup = Warmup()
    resolution: Literal["token", "count"] = "token"
    """``token``: every token is routed. ``count``: those of a pilot are, and ranks are drawn from its blocks of tokens. A
    gate that stands still under stationary traffic has one pilot for all steps, any other one per step (see
    `sim.countlevel`)."""
    pilot_ranks: int = Field(default=64, ge=2, le=65_536)
    """Ranks' worth of tokens in a count-level pilot; in one per step at most parallel.ep_size. The pilot's mean errs by
    sqrt(ep_size / pilot_ranks) times the sampling noise of one step."""
    record_topic_experts: bool = False
    """Whether the topics table lists the tokens of every expert (large: one number per topic and expert)."""
    record_traffic: bool = False
    """Whether to write the bytes of the last step by pair of ranks, pair of nodes and link."""


class Schedule(Block):
    """What happens within a step, and in which order."""

    phase: Literal["training", "forward"] = "training"
    """``training``: forward, backward and weight gradients; ``forward``: inference of one batch."""
    pipeline: Annotated[Pipeline, Choice(Pipeline)] = NoPipeline()
    """How micro-batches pass ``parallel.pp_size`` stages. With one, a step ends with the optimiser, the output head is
    timed, and ``overlap`` is the schedule's own."""
    mtp: bool = True
    """Whether a pipeline also runs the model's MTP modules, if it has any."""
    micro_batches: int = Field(default=1, gt=0, le=4096)
    """Equal parts of a device's tokens."""
    overlap: Literal["none", "micro_batches", "forward_backward"] = "micro_batches"
    """``micro_batches``: two neighbours interleaved; ``forward_backward``: the forward of one with the backward of
    another, DualPipe's steady state (DeepSeek-V3 report, section 3.2.1)."""
    sequence_length: int = Field(default=4096, gt=0)
    """Context length of the attention cost."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations kept for the backward: all; as in the DeepSeek-V3 report, section 3.2.3 and 3.3.3 (norms, MLA
    up-projections and SwiGLU recomputed, expert inputs in fp8); or a layer's input alone, its forward run again before its backward (with a pipeline)."""
    engine: Literal["simpy", "max_plus"] = "simpy"
    """The discrete-event engine, or the array recurrence that gives the same times."""


class Cost(Block):
    """Which laws turn work into seconds, and the number formats."""

    compute: Annotated[ComputeCost, Choice(ComputeCost)] = Calibrated()
    communication: Annotated[CommunicationCost, Choice(CommunicationCost)] = Port()
    mode: Literal["normal", "low_latency"] = "normal"
    """DeepEP's kernels: one copy per node, then NVLink; or one copy per expert, directly."""
    dispatch_dtype: Literal["fp8", "bf16"] = "fp8"
    """Format of hidden states on the way to experts (fp8 with a scale per 128 elements)."""
    combine_dtype: Literal["fp8", "bf16"] = "bf16"
    """Format of results on the way back."""
    gemm_dtype: Literal["fp8", "bf16"] = "fp8"
    """Format of the matrix products."""


class Straggler(Block):
    """A device that computes slowly.

    device: counted over the simulated devices, first the ranks of an EP group, then the groups of a stage, then the
    stages. slowdown: factor on all its compute times.
    """

    device: int = Field(ge=0)
    slowdown: float = Field(ge=1, le=1e3)


class Rebalance(Block):
    """When experts move, and from what the next placement is planned. Steps count in a run of steps, seconds in one that
    serves requests; without an interval the first plan stays."""

    interval_steps: int | None = Field(default=None, gt=0)
    """Steps between two plans."""
    interval_s: Annotated[float, Field(ge=1e-3, le=9e6)] | None = None
    """Seconds between two plans."""
    window_steps: int | None = Field(default=None, gt=0, le=10_000)
    """Steps that a plan looks back on; None: one interval."""
    window_s: Annotated[float, Field(ge=1e-3, le=9e6)] | None = None
    """Seconds that a plan looks back on; None: one interval."""
    history_steps: int = Field(default=1, ge=0, le=1000)
    """Steps of the same traffic before the first one, from which the first plan is made; 0: experts start in order."""
    threshold: float = Field(default=1.0, ge=0, le=1)
    """A layer keeps its map while the balancedness (mean over largest rank load) of its window is at least this (SGLang
    ``eplb_min_rebalancing_utilization_threshold``); 1: unless the balance is perfect."""
    forecast: Literal["last_window", "ema", "periodic"] = "last_window"
    """``last_window``: the next loads are those of the window. ``ema``: older steps of all that was seen count less, by
    ``ema_decay`` per interval. ``periodic``: they are those of the same phase, one period ago, where that was seen."""
    ema_decay: float = Field(default=0.5, ge=0, lt=1)
    """Weight that an interval's age takes off, with ``forecast: ema``."""
    period_steps: int | None = Field(default=None, gt=0)
    """Period with ``forecast: periodic``, in steps."""
    period_s: Annotated[float, Field(ge=1e-3, le=9e6)] = 86_400.0
    """Period with ``forecast: periodic``, in seconds; a day."""
    layers_per_chunk: int = Field(default=1, gt=0)
    """Layers whose experts move together (SGLang ``eplb_rebalance_layers_per_chunk``)."""
    transfer: Literal["stall", "background"] = "stall"
    """Whether the devices wait while experts move, or only the messages of the exchange do, which share the links."""
    solver_s: Span = 0.0
    """Time of making one plan on the host: stalls as ``transfer`` says."""


class Policy(Gating):
    """One competitor: a gate, a placement, and optionally another model, cluster or split for it."""

    name: str = Field(min_length=1, max_length=40)
    """Names its rows in tables and figures."""
    placement: Annotated[Placement, Choice(Placement)] = Linear()
    replicas: Annotated[ReplicaChoice, Choice(ReplicaChoice)] = Static()
    """Which copy of a replicated expert a token goes to."""
    rebalance: Rebalance = Rebalance()
    model: Model | None = None
    """A model of its own (another architecture to compare with)."""
    cluster: Cluster | None = None
    """A cluster of its own."""
    parallel: Parallel | None = None
    """In a run that serves requests, of its only unit, whose ``count`` then follows from the devices it had."""
