"""Synthetic router logits that share the measured statistics of real ones: low rank, heavy tails, memory, topics.

    logit[t, e] = logit_mean + scale(layer) * ( mu[layer, topic(t), e]
                    + sum_c sqrt(v_c(layer)) (z_c[t] . W[layer])[e] + sqrt(iid_variance) eps[layer, t, e] )

after routing_statistics.md section 8 (parameters set there on three layers of DeepSeek-V2-Lite; checked in
tests/test_traffic.py). The parts c are: ``sequence`` (constant within a sequence), ``slow`` and ``fast`` (AR(1) along
it), and ``token`` (white: the token's identity; where temporal memory is weak it takes over that variance). The latents
z_c [T, latent_rank] are shared by all layers, so that one layer's choice predicts the next one's; W [latent_rank, E]
has random unit columns and is shared by the parts, which makes experts co-activate. Reproduces loads, their temporal
correlation, co-activation and topic distances; says nothing about model quality.
"""

from __future__ import annotations

import threading
from typing import Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sim.kernels import affinity as kernel
from sim.kernels import compiled_enabled
from sim.rng import stream
from sim.tokens import F32, I32, Tokens
from sim.traffic import Batch, Source, Traffic, TrafficShape
from sim.traffic.topics import Leaf, Shift, Topic, check_siblings, cumulative, leaves, mixture

# eps is read from one table of normals at a hashed offset per (token, layer): some 50 times cheaper than drawing. Good
# enough because a gate compares the E distinct entries of one window; every expert meets every entry equally often, so
# no expert is favoured; and two tokens share a window with probability 2^-18.
_NOISE_BITS = 18
_LATENT_CACHE_BYTES = 256 * 2**20


class LayerProfile(BaseModel):
    """How layers differ with depth: factors at knots, linear between them; depth 0 = first MoE layer, 1 = last.

    The defaults follow DeepSeek-R1's router entropy by layer for ``logit_scale`` (routing_statistics.md section 7:
    Gaussian-equivalent standard deviation 0.4 first, 1.1 middle, 1.55 last; R1's single sharp dips are left out), and
    DeepSeek-V2-Lite for ``temporal`` (latent lag-1 correlation .10 in the first layer, .42-.50 from a sixth to the
    middle of the depth, .36 at four fifths: sections 4, 8) and ``topic`` (spread of popularity on ESFT law by layer).
    A model with one MoE layer sits at depth 0.5. Known departure: DeepSeek-V3's own load skew on GPQA does not rise
    with depth (share of the 32 hottest experts .34-.50 in layers 3-9, .31 on average), V2-Lite's and OLMoE's do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    depth: tuple[float, ...] = (0.0, 0.12, 0.35, 0.8, 1.0)
    logit_scale: tuple[float, ...] = (0.37, 0.7, 1.0, 1.1, 1.4)
    """Multiplies ``logit_scale``."""
    temporal: tuple[float, ...] = (0.2, 0.7, 1.0, 0.8, 0.75)
    """Share of the sequence, slow and fast variances that stays; the rest moves to the token part (0..1)."""
    topic: tuple[float, ...] = (0.4, 0.6, 1.0, 1.0, 1.0)
    """Multiplies every topic's ``popularity_sd``."""

    @model_validator(mode="after")
    def _knots(self) -> Self:
        if len(self.depth) < 2 or self.depth[0] != 0 or self.depth[-1] != 1:
            raise ValueError("depth must run from 0 to 1")
        if any(b <= a for a, b in zip(self.depth, self.depth[1:], strict=False)):
            raise ValueError("depth must increase")
        for name in ("logit_scale", "temporal", "topic"):
            values = getattr(self, name)
            if len(values) != len(self.depth):
                raise ValueError(f"{name} needs one value per depth ({len(self.depth)}, found {len(values)})")
            if min(values) < 0 or (name == "temporal" and max(values) > 1):
                raise ValueError(f"{name} must be {'between 0 and 1' if name == 'temporal' else 'at least 0'}")
        return self

    def at(self, layer: int, n_layers: int) -> tuple[float, float, float]:
        """Return (logit_scale, temporal, topic) factors of MoE layer ``layer`` of ``n_layers``."""
        depth = layer / (n_layers - 1) if n_layers > 1 else 0.5
        upper = next(i for i in range(1, len(self.depth)) if depth <= self.depth[i])
        left, right = self.depth[upper - 1], self.depth[upper]
        share = (depth - left) / (right - left)

        def mix(values: tuple[float, ...]) -> float:
            return values[upper - 1] * (1 - share) + values[upper] * share

        return mix(self.logit_scale), mix(self.temporal), mix(self.topic)


class Affinity(Traffic):
    """Generated router logits. Variances are relative to one token's spread (they sum to 1 by default)."""

    kind: Literal["affinity"] = "affinity"
    topic_tree: tuple[Topic, ...] = Field(default=(Topic(name="general", popularity_sd=0.0),), min_length=1)
    """Tree of topics; each sequence draws one leaf by weight."""
    shifts: tuple[Shift, ...] = ()
    """Changes of the topic mixture during the train phase."""
    sequence_length: int = Field(default=1024, gt=0)
    """Tokens per sequence; a rank's tokens are consecutive sequences, the last one cut. 1 = decode-like, every token
    of another request. Chat turns have about 100, DeepSeek-V3 packed pre-training sequences 4096."""
    popularity_sd: float = Field(default=0.12, ge=0)
    """Standard deviation over experts of the layer's own popularity vector (log-normal loads)."""
    latent_rank: int = Field(default=10, ge=0, le=1024)
    """R, the number of latent factors; 0 = independent experts."""
    latent_dof: float | None = Field(default=5.0, ge=3)
    """Degrees of freedom of the Student-t-like latents; null = Gaussian. Heavy tails and low rank are both needed for
    the measured co-activation and MaxVio."""
    sequence_variance: float = Field(default=0.12, ge=0)
    slow_variance: float = Field(default=0.10, ge=0)
    slow_correlation: float = Field(default=0.93, ge=0, lt=1)
    fast_variance: float = Field(default=0.68, ge=0)
    fast_correlation: float = Field(default=0.42, ge=0, lt=1)
    token_variance: float = Field(default=0.0, ge=0)
    iid_variance: float = Field(default=0.10, ge=0)
    """Full-rank noise, independent over experts, tokens and layers."""
    logit_mean: float = 0.0
    logit_scale: float = Field(default=1.1, gt=0)
    """Standard deviation of a token's logits before topics; 1.05-1.11 matches V2-Lite's and R1's gate weights."""
    layer_profile: LayerProfile | None = LayerProfile()
    """How layers differ; null = all layers alike."""

    @model_validator(mode="after")
    def _leaf_names_differ(self) -> Self:
        check_siblings(self.topic_tree)
        names = self.topics
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"topic_tree: two leaves are called {twice!r}")
        unknown = next((name for shift in self.shifts for name in shift.weights if name not in names), None)
        if unknown is not None:
            raise ValueError(f"shifts: {unknown!r} is no leaf of topic_tree ({', '.join(names)})")
        return self

    @property
    def provides(self) -> Literal["logits", "ids"]:
        return "logits"

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(leaf.name for leaf in leaves(self.topic_tree))

    def start(self, shape: TrafficShape, seed: int, replica: int) -> Source:
        return AffinitySource(self, shape, seed, replica)


class _Part(NamedTuple):
    """One latent part: its share of variance and its memory (None = constant within a sequence)."""

    name: str
    variance: float
    correlation: float | None


class _LayerTables(NamedTuple):
    base: F32  # [topics, E], logit_mean and scale included
    basis: F32  # [R, E], unit columns
    gains: F32  # [parts], scale included
    noise_gain: float
    noise_key: int


class AffinitySource(Source):
    """`Affinity` for one model: popularity and basis depend on (seed, replica, layer) and are made on first use."""

    def __init__(self, config: Affinity, shape: TrafficShape, seed: int, replica: int) -> None:
        self.config, self.shape, self.seed, self.replica = config, shape, seed, replica
        self.leaves: list[Leaf] = leaves(config.topic_tree)
        self._factors = [
            config.layer_profile.at(layer, shape.n_moe_layers) if config.layer_profile else (1.0, 1.0, 1.0)
            for layer in range(shape.n_moe_layers)
        ]
        # A part that no layer uses is not drawn; streams are named by part, so the other parts do not move.
        parts = (
            _Part("sequence", config.sequence_variance, None),
            _Part("slow", config.slow_variance, config.slow_correlation),
            _Part("fast", config.fast_variance, config.fast_correlation),
            _Part("token", config.token_variance, 0.0),
        )
        self.parts = [
            part
            for i, part in enumerate(parts)
            if config.latent_rank and any(self._variances(layer)[i] > 0 for layer in range(shape.n_moe_layers))
        ]
        self._part_index = [parts.index(part) for part in self.parts]
        self.noise: F32 = stream(seed, "traffic", "noise", replica).standard_normal(
            2**_NOISE_BITS + shape.n_routed_experts - 1, dtype=np.float32
        )
        self._layers: dict[int, _LayerTables] = {}
        self._work = 0

    def _variances(self, layer: int) -> tuple[float, float, float, float]:
        """Variances of the sequence, slow, fast and token parts in ``layer``."""
        config = self.config
        temporal = self._factors[layer][1]
        memory = (config.sequence_variance, config.slow_variance, config.fast_variance)
        return (
            memory[0] * temporal,
            memory[1] * temporal,
            memory[2] * temporal,
            config.token_variance + (1 - temporal) * sum(memory),
        )

    def layer(self, layer: int) -> _LayerTables:
        """Return the tables of ``layer``, drawn from streams of (seed, replica, layer)."""
        if layer not in self._layers:
            self._layers[layer] = self._draw_layer(layer)
        return self._layers[layer]

    def _draw_layer(self, layer: int) -> _LayerTables:
        config, n_experts = self.config, self.shape.n_routed_experts
        scale_factor, _, topic_factor = self._factors[layer]
        scale = config.logit_scale * scale_factor

        def draw(*names: str | int) -> np.random.Generator:
            return stream(self.seed, "traffic", *names, self.replica, layer)

        shared = draw("popularity").standard_normal(n_experts) * config.popularity_sd
        vectors = {
            name: draw("topic", name).standard_normal(n_experts) * (sd * topic_factor)
            for leaf in self.leaves
            for name, sd in leaf.path
        }
        base = np.empty((len(self.leaves), n_experts))
        for row, leaf in zip(base, self.leaves, strict=True):
            row[:] = shared
            for name, _ in leaf.path:
                row += vectors[name]
        basis = draw("basis").standard_normal((config.latent_rank, n_experts))
        square = np.zeros(n_experts)
        for factor in basis:  # a written order of additions: np.sum's depends on the CPU
            square += factor * factor
        basis /= np.sqrt(np.maximum(square, np.finfo(np.float64).tiny))
        variances = self._variances(layer)
        gains = np.array([scale * variances[i] ** 0.5 for i in self._part_index])
        return _LayerTables(
            base=(config.logit_mean + scale * base).astype(np.float32),
            basis=basis.astype(np.float32),
            gains=gains.astype(np.float32),
            noise_gain=scale * config.iid_variance**0.5,
            noise_key=int(draw("noise").integers(2**32)),
        )

    def batch(self, phase: str, step: int, *, n_ranks: int, tokens_per_rank: int) -> Batch:
        # Compiling pays once enough tokens have been asked for; both forms give the same bits.
        self._work += n_ranks * tokens_per_rank * self.shape.n_moe_layers
        return AffinityBatch(self, phase, step, n_ranks, tokens_per_rank, compiled_enabled(self._work))


class _RankLatents(NamedTuple):
    topic: I32  # [T]
    latents: F32  # [T, parts, R]
    noise_keys: npt.NDArray[np.uint32]  # [T]


class AffinityBatch(Batch):
    """One step: each rank's latents are drawn once and serve all layers."""

    def __init__(
        self, source: AffinitySource, phase: str, step: int, n_ranks: int, tokens_per_rank: int, compiled: bool
    ) -> None:
        self.source, self.phase, self.step = source, phase, step
        self.n_ranks, self.tokens_per_rank, self.compiled = n_ranks, tokens_per_rank, compiled
        self._ranks: dict[int, _RankLatents] = {}
        self._lock = threading.Lock()

    def tokens(self, layer: int, rank: int) -> Tokens:
        source = self.source
        if not 0 <= layer < source.shape.n_moe_layers or not 0 <= rank < self.n_ranks:
            raise ValueError(
                f"layer {layer}, rank {rank}: this batch has {source.shape.n_moe_layers} layers, {self.n_ranks} ranks"
            )
        drawn, tables = self._rank(rank), source.layer(layer)
        logits = kernel.combine(
            tables.base,
            drawn.topic,
            source.noise,
            kernel.windows_of(drawn.noise_keys, tables.noise_key, _NOISE_BITS),
            tables.noise_gain,
            drawn.latents,
            tables.gains,
            tables.basis,
            compiled=self.compiled,
        )
        return Tokens(rank=rank, logits=logits, topic=drawn.topic)

    def _rank(self, rank: int) -> _RankLatents:
        with self._lock:
            found = self._ranks.get(rank)
        if found is None:
            found = self._draw_rank(rank)
            with self._lock:
                # Redrawing gives the same bits, so forgetting the oldest rank costs time only.
                while self._ranks and (len(self._ranks) + 1) * found.latents.nbytes > _LATENT_CACHE_BYTES:
                    self._ranks.pop(next(iter(self._ranks)))
                self._ranks[rank] = found
        return found

    def _draw_rank(self, rank: int) -> _RankLatents:
        source, n_tokens = self.source, self.tokens_per_rank
        config = source.config

        def draw(name: str) -> np.random.Generator:
            return stream(source.seed, "traffic", name, source.replica, self.phase, self.step, rank)

        length = config.sequence_length
        n_sequences = -(-n_tokens // length)
        # Inverse transform of uniforms that do not know the mixture: a shift changes only the sequences it must.
        shares = cumulative(mixture(source.leaves, config.shifts, self.step if self.phase == "train" else None))
        leaf = np.searchsorted(np.array(shares), draw("topics").random(n_sequences), side="right")
        latents = np.empty((n_tokens, len(source.parts), config.latent_rank), dtype=np.float32)
        tail = kernel.heavy_tail(config.latent_dof)
        for i, part in enumerate(source.parts):
            rows = n_sequences if part.correlation is None else n_tokens
            x = draw(part.name).standard_normal((rows, config.latent_rank), dtype=np.float32)
            if part.correlation:
                kernel.autoregress(x, part.correlation, length, compiled=self.compiled)
            if config.latent_dof is not None:
                kernel.stretch(x, tail, compiled=self.compiled)
            latents[:, i] = np.repeat(x, length, axis=0)[:n_tokens] if part.correlation is None else x
        topic = np.repeat(leaf.astype(np.int32), length)[:n_tokens]
        topic.setflags(write=False)  # every layer hands out the same array
        return _RankLatents(
            topic=topic,
            latents=latents,
            noise_keys=draw("noise").integers(2**32, size=n_tokens, dtype=np.uint32),
        )
