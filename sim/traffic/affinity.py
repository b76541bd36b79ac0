"""Synthetic router logits that share the measured statistics of real ones: low rank, heavy tails, memory, topics.

    logit[t, e] = logit_mean + scale(layer) * ( mu[layer, topic(t), e]
                    + sum_c sqrt(v_c(layer)) (z_c[t] . W[layer])[e] + sqrt(iid_variance) eps[layer, t, e] )

after routing_statistics.md section 8 (parameters set there on three layers of DeepSeek-V2-Lite; checked in
tests/test_traffic.py). The parts c are: ``sequence`` (constant within a sequence), ``slow`` and ``fast`` (AR(1) along
it), and ``token`` (white or, with a vocabulary, read off the token's id; where temporal memory is weak it takes over that
variance, so that first layers route by identity). The latents z_c [T, latent_rank] are shared by all layers, so that one layer's choice predicts the next one's; W [latent_rank, E]
has random unit columns and is shared by the parts, which makes experts co-activate. Reproduces loads, their temporal
correlation, co-activation and topic distances; says nothing about model quality.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from sim.kernels import affinity as kernel
from sim.kernels import compiled_enabled
from sim.kernels.elementary import exp
from sim.rng import stream
from sim.tokens import F32, F64, I32, I64, Tokens
from sim.traffic import Batch, Source, Traffic, TrafficShape
from sim.traffic.layers import MOST_SPREAD, LayerProfile, LayerValues
from sim.traffic.mixture import Drift, Mixture, Oscillation, Shift, check_names
from sim.traffic.topics import Leaf, TokenTopic, Topic, check_tree, cumulative, leaves
from sim.traffic.vocabulary import Vocabulary, Words

# eps is read from one table of normals at a hashed offset per (token, layer): some 50 times cheaper than drawing. Good
# enough because a gate compares the E distinct entries of one window; every expert meets every entry equally often, so
# no expert is favoured; and two tokens share a window with probability 2^-18.
NOISE_BITS = 18
_LATENT_CACHE_BYTES = 256 * 2**20
_MOST_SURE = 4.0
_MOST_TILT = 30.0  # exp of it squared is far from overflow
_Preference = Annotated[float, Field(ge=-100, le=100)]


class Affinity(Traffic):
    """Generated router logits. Variances are relative to one token's spread (they sum to 1 by default)."""

    kind: Literal["affinity"] = "affinity"
    topic_tree: tuple[Topic, ...] = Field(default=(Topic(name="general", popularity_sd=0.0),), min_length=1)
    """Tree of topics; each sequence draws one leaf by weight."""
    shifts: tuple[Shift, ...] = ()
    """Changes of the topic mixture during the train phase; ``mixture`` says in which order changes apply."""
    drift: Drift | None = None
    """Random walk of the mixture during the train phase; null = none."""
    oscillation: tuple[Oscillation, ...] = Field(default=(), max_length=32)
    """Day and night: topics whose share rises and falls with the train step."""
    vocabulary: Vocabulary | None = None
    """Words: the token part becomes a function of the token's id; null = white, and tokens have no ids."""
    sequence_length: int = Field(default=1024, gt=0)
    """Tokens per sequence; a rank's tokens are consecutive sequences, the last one cut. 1 = decode-like, every token
    of another request. Chat turns have about 100, DeepSeek-V3 packed pre-training sequences 4096."""
    popularity_sd: float = Field(default=0.12, ge=0, le=10)
    """Standard deviation over experts of the layer's own popularity vector (log-normal loads)."""
    popularity: tuple[tuple[_Preference, ...], ...] | None = None
    """One row of n_routed_experts numbers per MoE layer, in units of a token's spread: a given model's own popularity
    instead of a random one. Null = drawn with ``popularity_sd``."""
    prefix_length: int = Field(default=0, ge=0)
    """Tokens at the start of every sequence that are the same in all (a system prompt, a task's template)."""
    latent_rank: int = Field(default=10, ge=0, le=1024)
    """R, the number of latent factors; 0 = independent experts."""
    latent_dof: float | None = Field(default=5.0, ge=3, le=1e6)
    """Degrees of freedom of the Student-t-like latents; null = Gaussian. Heavy tails and low rank are both needed for
    the measured co-activation and MaxVio."""
    sequence_variance: float = Field(default=0.12, ge=0, le=100)
    """Variance of the part that is constant within a sequence."""
    slow_variance: float = Field(default=0.10, ge=0, le=100)
    """Variance of the slow part."""
    slow_correlation: float = Field(default=0.93, ge=0, lt=1)
    """Correlation of the slow part at neighbouring tokens."""
    fast_variance: float = Field(default=0.68, ge=0, le=100)
    """Variance of the fast part."""
    fast_correlation: float = Field(default=0.42, ge=0, lt=1)
    """Correlation of the fast part at neighbouring tokens."""
    correlation_spread: float = Field(default=0.0, ge=0, le=MOST_SPREAD)
    """How the factors' fast parts differ in memory: the log-odds of a factor's correlation are those of
    ``fast_correlation`` plus up to this much, or less by as much. 0 = all alike."""
    token_variance: float = Field(default=0.0, ge=0, le=100)
    """Variance of the part without memory, or read off the token's id."""
    basis_tail: float = Field(default=0.0, ge=0, le=100)
    """How experts gather on few factors: their normal loadings x become x + basis_tail x^3 (then unit columns again).
    Raises the co-activation of the closest pairs."""
    memory_spread: float = Field(default=0.0, ge=0, le=MOST_SPREAD)
    """How experts differ in memory: factors have unequal shares of it (`_memory_shares`) and an expert leans to the
    lasting or to the fleeting ones. 0 = all alike, and so with no token part to take what a factor loses. On real traces
    the correlation of one expert's choice at neighbouring tokens runs from 0 to .7 over experts (`sim.fit`)."""
    iid_variance: float = Field(default=0.10, ge=0, le=100)
    """Full-rank noise, independent over experts, tokens and layers."""
    logit_mean: float = Field(default=0.0, ge=-1000, le=1000)
    """Mean of all logits; moves sigmoid scores, not softmax ones."""
    logit_scale: float = Field(default=1.1, gt=0, le=100)
    """Standard deviation of a token's logits before topics; 1.05-1.11 matches V2-Lite's and R1's gate weights."""
    scale_spread: float = Field(default=0.0, ge=0, le=1)
    """Standard deviation over tokens of the log of a token's own logit scale: the router is surer of some tokens than of
    others. Changes gate weights, not the choice of a plain top-k."""
    layer_profile: LayerProfile | None = LayerProfile()
    """How layers differ; null = all layers alike."""

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        check_tree(self.topic_tree)
        found = leaves(self.topic_tree)
        check_names("shifts", tuple(name for shift in self.shifts for name in shift.weights), found)
        check_names("oscillation", tuple(name for wave in self.oscillation for name in wave.topics), found)
        if self.vocabulary is not None:
            self.vocabulary.check(self.latent_rank)
        return self

    @property
    def provides(self) -> Literal["logits", "ids"]:
        return "logits"

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(topic.name for leaf in leaves(self.topic_tree) for topic in leaf.topics)

    @property
    def topic_weights(self) -> F64:
        phases = [(leaf.probability, np.diff(leaf.ends, prepend=0.0)) for leaf in leaves(self.topic_tree)]
        return np.concatenate([probability * shares for probability, shares in phases])

    @property
    def stationary(self) -> bool:
        return not (self.shifts or self.oscillation) and self.drift is None

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(topic.modality for leaf in leaves(self.topic_tree) for topic in leaf.topics)

    @property
    def token_frequency(self) -> F64 | None:
        return None if self.vocabulary is None else self.vocabulary.frequency()

    @property
    def longest_sequence(self) -> int | None:
        return self.sequence_length

    def start(self, shape: TrafficShape, seed: int, replica: int) -> Source:
        return AffinitySource(self, shape, seed, replica)


class _Part(NamedTuple):
    """One latent part: its share of variance and its memory by factor [R] (None = constant within a sequence)."""

    name: str
    variance: float
    correlation: F64 | None


class _Prefix(NamedTuple):
    """The P tokens that all sequences begin with."""

    latents: F32  # [P, parts, R]
    noise_keys: npt.NDArray[np.uint32]  # [P]
    token_ids: I32 | None  # [P]
    sureness: F64 | None  # [P]


class _LayerTables(NamedTuple):
    base: F32  # [topics, E], logit_mean and scale included
    basis: F32  # [R, E], unit columns
    gains: F32  # [parts, R], scale included
    noise_gain: float
    noise_key: int
    scale_spread: float


def rescale(logits: F32, sureness: F64, spread: float, mean: float) -> None:
    """Multiply each token's logits [T, E], counted from ``mean``, by exp(spread sureness[t]), in place."""
    factor = exp(spread * np.clip(sureness, -_MOST_SURE, _MOST_SURE)).astype(np.float32)[:, None]
    if mean:
        logits -= np.float32(mean)
    logits *= factor
    if mean:
        logits += np.float32(mean)


def _places(rank: int) -> F64:
    """Return ``rank`` numbers between -1 and 1, spread evenly whatever the rank: van der Corput's sequence in base 2.

    >>> _places(7).tolist()
    [0.0, -0.5, 0.5, -0.75, 0.25, -0.25, 0.75]
    """
    return np.array(
        [sum(2.0**-i for i, bit in enumerate(f"{n:b}"[::-1]) if bit == "1") - 1 for n in range(1, rank + 1)]
    )


def fast_correlations(middle: float, spread: float, rank: int) -> F64:
    """Return the correlation of each of ``rank`` factors' fast part: log-odds spread evenly about those of ``middle``.

    >>> fast_correlations(0.4, 2.0, 3).round(3).tolist()
    [0.4, 0.197, 0.644]
    """
    if not spread:
        return np.full(rank, middle)
    odds = exp(spread * _places(rank))
    return middle * odds / (middle * odds + 1 - middle)


class AffinitySource(Source):
    """`Affinity` for one model: popularity and basis depend on (seed, replica, layer) and are made on first use."""

    def __init__(self, config: Affinity, shape: TrafficShape, seed: int, replica: int) -> None:
        self.config, self.shape, self.seed, self.replica = config, shape, seed, replica
        self.leaves: list[Leaf] = leaves(config.topic_tree)
        self.topics: list[TokenTopic] = [topic for leaf in self.leaves for topic in leaf.topics]
        self.mixture = Mixture(self.leaves, config.shifts, config.drift, config.oscillation, seed, replica)
        self.words = None
        if config.vocabulary is not None:
            tail = kernel.heavy_tail(config.latent_dof)
            self.words = Words(config.vocabulary, config.latent_rank, tail, seed, replica)
        self._factors = [
            config.layer_profile.at(layer, shape.n_moe_layers) if config.layer_profile else (1.0, 1.0, 1.0)
            for layer in range(shape.n_moe_layers)
        ]
        # A part that no layer uses is not drawn; streams are named by part, so the other parts do not move.
        parts = (
            _Part("sequence", config.sequence_variance, None),
            _Part("slow", config.slow_variance, np.full(config.latent_rank, config.slow_correlation)),
            _Part(
                "fast",
                config.fast_variance,
                fast_correlations(config.fast_correlation, config.correlation_spread, config.latent_rank),
            ),
            _Part("token", config.token_variance, np.zeros(config.latent_rank)),
        )
        self.parts = [
            part
            for i, part in enumerate(parts)
            if config.latent_rank
            and any(self._variances(self.values(layer))[i] > 0 for layer in range(shape.n_moe_layers))
        ]
        rows = config.popularity
        if rows is not None and (len(rows), {len(row) for row in rows}) != (
            shape.n_moe_layers,
            {shape.n_routed_experts},
        ):
            raise ValueError(
                f"popularity: expected {shape.n_moe_layers} rows of {shape.n_routed_experts} numbers (the model's MoE "
                f"layers and experts), found {len(rows)} rows of {sorted({len(row) for row in rows})}; set model.num_hidden_layers "
                "to the traced layers, or fit with --portable"
            )
        self._part_index = [parts.index(part) for part in self.parts]
        self.noise: F32 = stream(seed, "traffic", "noise", replica).standard_normal(
            2**NOISE_BITS + shape.n_routed_experts - 1, dtype=np.float32
        )
        self._layers: dict[int, _LayerTables] = {}
        self.scaled = any(self.values(layer).scale_spread > 0 for layer in range(shape.n_moe_layers))
        self._prefix: _Prefix | None = None
        self._work = 0

    def prefix(self, n_tokens: int) -> _Prefix | None:
        """Return the tokens that all sequences begin with, at least as many as ``n_tokens`` can hold; None without any."""
        length = min(self.config.prefix_length, self.config.sequence_length, n_tokens)
        if self._prefix is None or len(self._prefix.noise_keys) < length:
            self._prefix = self._draw_prefix(length) if length else None
        return self._prefix

    def _draw_prefix(self, length: int) -> _Prefix:
        """Draw ``length`` tokens; a longer prefix begins with a shorter one."""
        config = self.config
        ids = None
        if self.words is not None:
            ids = self.words.ids(length, stream(self.seed, "traffic", "prefix", "token_ids", self.replica))
        latents = np.empty((length, len(self.parts), config.latent_rank), dtype=np.float32)
        for i, part in enumerate(self.parts):
            rows = 1 if part.correlation is None else length
            x = stream(self.seed, "traffic", "prefix", part.name, self.replica).standard_normal(
                (rows, config.latent_rank), dtype=np.float32
            )
            if part.correlation is not None and part.correlation.any():
                kernel.autoregress(x, part.correlation, length, compiled=False)
            if config.latent_dof is not None:
                kernel.stretch(x, kernel.heavy_tail(config.latent_dof), compiled=False)
            if part.name == "token" and self.words is not None and ids is not None:
                self.words.blend(ids, x)
            latents[:, i] = x
        keys = stream(self.seed, "traffic", "prefix", self.replica).integers(2**32, size=length, dtype=np.uint32)
        sureness = stream(self.seed, "traffic", "prefix", "scale", self.replica).standard_normal(length)
        return _Prefix(latents, keys, ids, sureness)

    def values(self, layer: int) -> LayerValues:
        """Return the parameters of ``layer``: the config's own, what the profile replaces, and its factors."""
        config, profile = self.config, self.config.layer_profile
        own = {name: getattr(config, name) for name in LayerValues._fields if hasattr(config, name)}
        own |= profile.replaced(layer, self.shape.n_moe_layers) if profile else {}
        scale, temporal, topic = self._factors[layer]
        memory = (own["sequence_variance"], own["slow_variance"], own["fast_variance"])
        return LayerValues(
            **own
            | {
                "logit_scale": config.logit_scale * scale,
                "popularity": None if config.popularity is None else config.popularity[layer],
                "topic_factor": topic,
                "sequence_variance": memory[0] * temporal,
                "slow_variance": memory[1] * temporal,
                "fast_variance": memory[2] * temporal,
                "token_variance": own["token_variance"] + (1 - temporal) * sum(memory),
            }
        )

    def _variances(self, values: LayerValues) -> tuple[float, ...]:
        """Variances of the sequence, slow, fast and token parts."""
        return (
            values.sequence_variance,
            values.slow_variance,
            values.fast_variance,
            values.token_variance,
        )

    def layer(self, layer: int) -> _LayerTables:
        """Return the tables of ``layer``, drawn from streams of (seed, replica, layer)."""
        if layer not in self._layers:
            self._layers[layer] = self.draw_layer(layer, self.values(layer))
        return self._layers[layer]

    def draw_layer(self, layer: int, values: LayerValues) -> _LayerTables:
        """Return the tables of ``layer`` as they would be with ``values``; the same streams whatever they are."""
        config, n_experts = self.config, self.shape.n_routed_experts
        scale = values.logit_scale

        def draw(*names: str | int) -> np.random.Generator:
            return stream(self.seed, "traffic", *names, self.replica, layer)

        if values.popularity is not None:
            shared = np.array(values.popularity)
        else:
            shared = draw("popularity").standard_normal(n_experts) * values.popularity_sd
        vectors = {
            name: draw("topic", name).standard_normal(n_experts) * (sd * values.topic_factor)
            for topic in self.topics
            for name, sd in topic.path
        }
        base = np.empty((len(self.topics), n_experts))
        for row, topic in zip(base, self.topics, strict=True):
            row[:] = shared
            for name, _ in topic.path:
                row += vectors[name]
        basis = draw("basis").standard_normal((config.latent_rank, n_experts))
        if values.basis_tail:
            basis *= 1.0 + values.basis_tail * (basis * basis)
        if values.latent_rank < config.latent_rank:
            basis *= np.clip(values.latent_rank - np.arange(config.latent_rank), 0.0, 1.0)[:, None]
        if values.memory_spread:
            # Tilted before the columns are made unit ones: an expert keeps its variance and changes what it listens to.
            tilt = values.memory_spread * draw("memory").standard_normal(n_experts)
            basis *= exp(np.clip(tilt * _places(config.latent_rank)[:, None], -_MOST_TILT, _MOST_TILT))
        square = np.zeros(n_experts)
        for factor in basis:  # a written order of additions: np.sum's depends on the CPU
            square += factor * factor
        basis /= np.sqrt(np.maximum(square, np.finfo(np.float64).tiny))
        variances = self._memory_variances(values, config.latent_rank)
        gains = np.array([scale * variances[i] ** 0.5 for i in self._part_index]).reshape(
            len(self._part_index), config.latent_rank
        )
        return _LayerTables(
            base=(config.logit_mean + scale * base).astype(np.float32),
            basis=basis.astype(np.float32),
            gains=gains.astype(np.float32),
            noise_gain=scale * values.iid_variance**0.5,
            noise_key=int(draw("noise").integers(2**32)),
            scale_spread=values.scale_spread,
        )

    def _memory_variances(self, values: LayerValues, rank: int) -> F64:
        """Return the variances [4, R] of the sequence, slow, fast and token parts by factor."""
        variances = np.repeat(np.array(self._variances(values))[:, None], rank, axis=1)
        memory, token = sum(self._variances(values)[:3]), values.token_variance
        if values.memory_spread and memory > 0 and token > 0:
            share = memory / (memory + token)
            odds = exp(values.memory_spread * _places(rank))
            shares = share * odds / (share * odds + 1 - share)
            variances[:3] *= shares / share
            variances[3] = (memory + token) * (1 - shares)
        return variances

    def batch(self, phase: str, step: int, *, n_ranks: int, tokens_per_rank: int) -> Batch:
        # Compiling pays once enough tokens have been asked for; both forms give the same bits.
        self._work += n_ranks * tokens_per_rank * self.shape.n_moe_layers
        return AffinityBatch(self, phase, step, n_ranks, tokens_per_rank, compiled_enabled(self._work))


class _RankLatents(NamedTuple):
    topic: I32  # [T]
    sequence: I32  # [T]
    token_ids: I32 | None  # [T]
    latents: F32  # [T, parts, R]
    noise_keys: npt.NDArray[np.uint32]  # [T]
    sureness: F64 | None  # [T] normals whose exponential scales a token's logits; None where no layer uses them


class AffinityBatch(Batch):
    """One step: each rank's latents are drawn once and serve all layers."""

    def __init__(
        self, source: AffinitySource, phase: str, step: int, n_ranks: int, tokens_per_rank: int, compiled: bool
    ) -> None:
        self.source, self.phase, self.step = source, phase, step
        self.n_ranks, self.tokens_per_rank, self.compiled = n_ranks, tokens_per_rank, compiled
        self._shares = cumulative(source.mixture.at(step if phase == "train" else None))
        self._ranks: dict[int, _RankLatents] = {}
        self._lock = threading.Lock()

    def tokens(self, layer: int, rank: int) -> Tokens:
        source = self.source
        if not 0 <= layer < source.shape.n_moe_layers or not 0 <= rank < self.n_ranks:
            raise ValueError(
                f"layer {layer}, rank {rank}: this batch has {source.shape.n_moe_layers} layers, {self.n_ranks} ranks"
            )
        drawn, tables = self.drawn(rank), source.layer(layer)
        logits = kernel.combine(
            tables.base,
            drawn.topic,
            source.noise,
            kernel.windows_of(drawn.noise_keys, tables.noise_key, NOISE_BITS),
            tables.noise_gain,
            drawn.latents,
            tables.gains,
            tables.basis,
            compiled=self.compiled,
        )
        if tables.scale_spread and drawn.sureness is not None:
            rescale(logits, drawn.sureness, tables.scale_spread, source.config.logit_mean)
        return Tokens(rank=rank, logits=logits, topic=drawn.topic, sequence=drawn.sequence, token_ids=drawn.token_ids)

    def drawn(self, rank: int) -> _RankLatents:
        """Return what all layers of ``rank`` share."""
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

        length = min(config.sequence_length, n_tokens)
        n_sequences = -(-n_tokens // length)
        # Inverse transform of uniforms that do not know the mixture: a change moves only the sequences it must.
        leaf = np.searchsorted(np.array(self._shares), draw("topics").random(n_sequences), side="right")
        sequence = np.repeat(np.arange(n_sequences, dtype=np.int32), length)[:n_tokens]
        token_ids = None if source.words is None else source.words.ids(n_tokens, draw("token_ids"))
        latents = np.empty((n_tokens, len(source.parts), config.latent_rank), dtype=np.float32)
        tail = kernel.heavy_tail(config.latent_dof)
        for i, part in enumerate(source.parts):
            rows = n_sequences if part.correlation is None else n_tokens
            x = draw(part.name).standard_normal((rows, config.latent_rank), dtype=np.float32)
            if part.correlation is not None and part.correlation.any():
                kernel.autoregress(x, part.correlation, length, compiled=self.compiled)
            if config.latent_dof is not None:
                kernel.stretch(x, tail, compiled=self.compiled)
            if part.name == "token" and source.words is not None and token_ids is not None:
                source.words.blend(token_ids, x)
            latents[:, i] = np.repeat(x, length, axis=0)[:n_tokens] if part.correlation is None else x
        topic = self._topics(leaf, sequence, draw)
        noise_keys = draw("noise").integers(2**32, size=n_tokens, dtype=np.uint32)
        sureness = draw("scale").standard_normal(n_tokens) if source.scaled else None
        prefix = source.prefix(n_tokens)
        if prefix is not None:
            position = np.arange(n_tokens) % length
            head = np.flatnonzero(position < source.config.prefix_length)
            latents[head] = prefix.latents[position[head]]
            noise_keys[head] = prefix.noise_keys[position[head]]
            if token_ids is not None and prefix.token_ids is not None:
                token_ids[head] = prefix.token_ids[position[head]]
            if sureness is not None and prefix.sureness is not None:
                sureness[head] = prefix.sureness[position[head]]
        for array in (topic, sequence, token_ids):
            if array is not None:
                array.setflags(write=False)  # every layer hands out the same array
        return _RankLatents(topic, sequence, token_ids, latents, noise_keys, sureness)

    def _topics(self, leaf: I64, sequence: I32, draw: Callable[[str], np.random.Generator]) -> I32:
        """Return the topic of each token [T] from each sequence's ``leaf``: the phase at its place in the sequence."""
        found = self.source.leaves
        first = np.cumsum([0, *(len(leaf.topics) for leaf in found)])[:-1]
        topic: I32 = first[leaf].astype(np.int32)[sequence]
        if len(self.source.topics) > len(found):
            length = self.source.config.sequence_length
            # A shift of up to one token per sequence keeps the shares of phases right in short ones, of one token even.
            start = draw("phases").random(len(leaf))
            place = (np.arange(len(sequence)) % length + start[sequence]) / length
            for i, one in enumerate(found):
                chosen = np.flatnonzero(leaf[sequence] == i) if len(one.topics) > 1 else ()
                if len(chosen):
                    topic[chosen] += np.searchsorted(np.array(one.ends), place[chosen], side="right").astype(np.int32)
        return topic
