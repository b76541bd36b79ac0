"""The ``serving`` block of a scenario: who asks, which units serve, what they may hold, and what goes wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sim.plugin import Choice
from sim.requests import RequestSource
from sim.settings import Block, Parallel
from sim.units import BytesPerSecond, Seconds, Span


class Unit(Block):
    """Identical groups of devices that serve together: one expert-parallel group each, its attention data-parallel over
    ep_size / tp_size ranks. All ranks of a unit run their iterations in step, since every MoE layer joins them."""

    name: str = Field(min_length=1, max_length=40)
    """Names its rows in tables."""
    role: Literal["mixed", "prefill", "decode"] = "mixed"
    """``mixed`` units do both (colocated); ``prefill`` units hand a request's cache over to a ``decode`` unit. With decode
    units alone, prompts come with their cache, all but the last token."""
    count: int = Field(default=1, gt=0, le=10_000)
    """Groups of this kind."""
    parallel: Parallel = Parallel()
    mode: Literal["normal", "low_latency"] | None = None
    """DeepEP's kernels; None: low_latency for decode units, cost.mode for others."""
    micro_batches: Literal[1, 2] = 1
    """2: two halves of a batch interleaved, one communicating while the other computes (two-batch overlap)."""
    max_num_seqs: int = Field(default=256, gt=0)
    """Requests of one data-parallel rank that run at a time (vLLM)."""
    max_num_batched_tokens: int = Field(default=8192, gt=0)
    """Tokens of one data-parallel rank in one iteration (vLLM)."""
    chunked_prefill: bool = True
    """Whether a prompt may be cut at max_num_batched_tokens; without, prompts are taken whole, before any decode."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of device memory for weights, activations and cache (vLLM)."""
    kv_cache_tokens: int | None = Field(default=None, gt=0)
    """Tokens of cache on one data-parallel rank; None: what memory leaves."""
    kv_cache_bytes_per_element: float = Field(default=2.0, gt=0)
    """2 is bf16, 1 is fp8."""
    block_size: int = Field(default=16, gt=0)
    """Tokens of a cache block."""
    long_prefill_token_threshold: int | None = Field(default=None, gt=0)
    """Tokens of one prompt in one iteration, so that a long one's attention, which grows with what lies before, does not
    hold up all ranks; other prompts take what is left of the budget (vLLM). None: as many as fit."""
    prefix_cache: Literal["none", "rank", "shared"] = "none"
    """Where prefixes of computed prompts stay for later ones. ``rank``: in the cache of the rank that computed them, least
    recently used out first, while there is room. ``shared``: in a store beside the unit that all of its ranks read, as
    DeepSeek's cache on disk (56.3 % of input tokens hit it: open-infra-index, day 6) or Mooncake's pool; a hit takes
    blocks of the rank that serves it, as if it had been computed there."""
    cache_store_tokens: int | None = Field(default=None, gt=0)
    """Tokens that a shared cache holds, least recently used out first; None: no limit."""
    cache_load_bytes_per_s: BytesPerSecond | None = None
    """At which one data-parallel rank loads hits of a shared cache; the iteration in which a prompt starts then waits for
    the slowest rank's loads. None: loading is hidden behind the queue and the compute."""
    cuda_graph_sizes: tuple[Annotated[int, Field(gt=0, le=65_536)], ...] = ()
    """Decode batches of a rank are padded to the next of these sizes; above the last one, and if empty, not at all."""
    load_balance_method: Literal["round_robin", "shortest_queue", "fewest_tokens"] = "fewest_tokens"
    """How requests are spread over units and data-parallel ranks (SGLang ``load_balance_method``)."""
    speculative_tokens: int = Field(default=0, ge=0, le=8)
    """Tokens that an MTP module proposes per iteration."""
    acceptance: float = Field(default=0.85, ge=0, le=1)
    """Probability that a proposed token is accepted, given that those before it were (DeepSeek-V3 report: 0.85-0.9)."""
    host_overhead_s: Annotated[Seconds, Field(le=60)] = 0.0
    """Scheduler and launch time of an iteration that the device waits for."""
    max_queue: int | None = Field(default=None, ge=0)
    """Requests of a unit that wait for seats, cache blocks or token budget, beyond which new ones are refused; what can start
    with the next iteration does not count. None: no limit."""


class Slo(Block):
    """A request counts towards goodput if it meets all that is set."""

    ttft_s: Span | None = None
    """Longest time to first token."""
    tpot_s: Span | None = None
    """Longest mean time per output token."""
    e2e_s: Span | None = None
    """Longest time from arrival to the last token."""


class Fault(Block):
    """Something that goes wrong in one group of a unit."""

    at_s: Span
    """When it begins."""
    until_s: Span | None = None
    """When it ends; None: never. A dead rank then loads its experts at load_bytes_per_s before it serves; the others go on
    without it."""
    unit: str
    """Which unit, by name."""
    index: int = Field(default=0, ge=0)
    """Which of the unit's groups."""
    rank: int = Field(ge=0)
    """Which rank of the group."""
    kind: Literal["slow_device", "slow_link", "dead_rank"]
    """A device that computes slowly, a rank whose network ports are slow, or a rank that is gone."""
    factor: float = Field(default=2.0, ge=1, le=1e3)
    """How many times slower: the rank's compute, or the bytes that its network ports move per second."""
    recovery_s: Span = 25.0
    """Time after a death in which the group serves nothing while it regroups (vLLM issue 38862: about 25 s). Experts with
    a replica elsewhere stay; lost ones are then loaded on the ranks that are left, one after the other."""
    load_bytes_per_s: BytesPerSecond = 5e9
    """At which lost experts are loaded. An assumption: one NVMe drive; storage that all ranks read at once is faster."""


class Serving(Block):
    """Requests in, tokens out."""

    requests: Annotated[RequestSource, Choice(RequestSource)]
    duration_s: Annotated[float, Field(gt=0, le=9e6)]
    """Arrivals stop here; the run ends when the last request does."""
    warmup_s: Span = 0.0
    """Requests that arrive before this count in no mean, nor does this time in rates; those end at duration_s, or with the
    last request if that comes first."""
    units: Annotated[tuple[Unit, ...], Field(min_length=1, max_length=16)]
    slo: Slo = Slo()
    faults: tuple[Fault, ...] = ()
    """What goes wrong, and when."""
    sampled_layers: int = Field(default=8, gt=0, le=1024)
    """MoE layers whose routing is simulated, evenly spread; the others are taken to behave like them on average."""
    pool_tokens: int = Field(default=8192, gt=0, le=2**24)
    """Tokens per topic that are routed once, from which batches are drawn."""
    draws: int = Field(default=4, gt=0, le=1024)
    """Batches drawn for every size that is timed; iterations take one of them in turn."""
