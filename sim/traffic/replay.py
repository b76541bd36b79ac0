"""Recorded routing given back token by token: expert choices as they were, or router logits for any gate to judge.

A file is anything that `sim.traces.read` reads. Three ways to use it:

* ids (the default): the recorded choices. A different gate cannot be asked what it would have chosen; placements,
  capacities and rebalancing can be compared.
* ``scores: true``: the file has every expert's ``logits`` or softmax ``scores`` [L, N, E]; any gate can be judged.
* ``impute: true``: the file has the k largest softmax weights; the rest is made up (`impute`), and reports say so.

The file's sequences and their domains become `Tokens.sequence` and the topics. Files are not trusted.
"""

from __future__ import annotations

import functools
import os
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from sim.digest import digest
from sim.kernels.elementary import log
from sim.rng import stream
from sim.tokens import F32, I32, I64, Tokens
from sim.traces import RecordedTrace, read
from sim.traffic import Batch, Source, Traffic, TrafficShape
from sim.traffic.impute import CAVEAT, Imputed

_NO_DOMAINS = ("replay",)
_LEAST_SCORE = 2.0**-25  # half of the smallest float16: what a score recorded as 0 may have been


class Replay(Traffic):
    """Replays a trace, each token once: after the tokens kept for the warm-up, rank r of train step s takes the tokens
    [(s P + r) T, (s P + r + 1) T) of P ranks with T tokens each."""

    kind: Literal["replay"] = "replay"
    path: str = Field(min_length=1)
    """The trace: npz, JSON, JSON lines, text, or an ESFT folder."""
    scores: bool = False
    """Give gates the file's ``logits`` or ``scores`` of all experts instead of the recorded choices."""
    impute: bool = False
    """Give gates logits made of the recorded ``topk_weights`` (softmax, not renormalised) and an imputed tail."""
    order: Literal["consecutive", "mixed"] = "consecutive"
    """``consecutive``: as recorded, prefill-like; ``mixed``: one permutation of all tokens per seed and replica,
    decode-like."""
    offset: Literal["none", "replica"] = "none"
    """Where consecutive order begins. ``none``: at the first token, so that all seeds and replicas see the same tokens
    and intervals over replicas mean nothing; ``replica``: at another sequence for each seed and replica, going around
    at the end."""
    layers: tuple[int, ...] | None = None
    """Which recorded layers serve MoE layers 0, 1, ...: values of the file's ``layers`` array, or positions if it has
    none. Null = the first ones."""
    warmup_steps: int = Field(default=0, ge=0)
    """Tokens kept for what comes before the train steps, as a number of these: batches of the warm-up, and of the history
    that a first placement is planned from, both take theirs from the start of the order; train steps follow behind, so
    that none of their tokens was seen before."""

    @model_validator(mode="after")
    def _one_use(self) -> Self:
        if self.scores and self.impute:
            raise ValueError("scores and impute exclude each other: recorded scores need no imputing")
        if self.offset == "replica" and self.order == "mixed":
            raise ValueError("offset is for consecutive order; mixed order already differs between replicas")
        return self

    @property
    def provides(self) -> Literal["logits", "ids"]:
        return "logits" if self.scores or self.impute else "ids"

    @property
    def topics(self) -> tuple[str, ...]:
        """The domains of the file in order of appearance; ``("replay",)`` without any, or while it cannot be read
        (`start` says why)."""
        try:
            stat = os.stat(self.path)
            return _domains(self.path, stat.st_mtime_ns, stat.st_size)
        except (OSError, ValueError):
            return _NO_DOMAINS

    @property
    def caveats(self) -> tuple[str, ...]:
        found: tuple[str, ...] = (CAVEAT,) if self.impute else ()
        if self.offset == "replica":
            found += ("replicas replay one trace from different starts: intervals over them do not cover other text",)
        return found

    def fingerprint(self) -> str:
        return digest(self.path)

    def start(self, shape: TrafficShape, seed: int, replica: int) -> Source:
        asked = None if self.provides == "logits" else shape.num_experts_per_tok
        trace = read_trace(self.path, shape.n_routed_experts, asked)
        source = ReplaySource(self, trace, self._positions(trace, shape), shape, seed, replica)
        source.batch("train", 0, n_ranks=shape.ep_size, tokens_per_rank=self.tokens_per_rank)  # refuse early
        return source

    def _positions(self, trace: RecordedTrace, shape: TrafficShape) -> list[int]:
        known = list(trace.layers)
        wanted = list(self.layers) if self.layers is not None else known[: shape.n_moe_layers]
        unknown = [layer for layer in wanted if layer not in known]
        if unknown:
            raise ValueError(f"{self.path}: layers: expected some of {known}, found {unknown}")
        if len(wanted) != shape.n_moe_layers:
            raise ValueError(f"{self.path}: layers: expected {shape.n_moe_layers} (the model's), found {len(wanted)}")
        return [known.index(layer) for layer in wanted]


@functools.lru_cache(maxsize=8)
def _domains(path: str, mtime_ns: int, size: int) -> tuple[str, ...]:
    """Return the topics of the file as it was when written at ``mtime_ns``."""
    return tuple(dict.fromkeys(read(path).domain_of_sequence or _NO_DOMAINS))


def read_trace(path: str, n_routed_experts: int, num_experts_per_tok: int | None) -> RecordedTrace:
    """Read and check a trace for a model with E = ``n_routed_experts`` and k = ``num_experts_per_tok`` (None: any k).

    Raises ValueError naming file, array, what was expected and what was found.
    """
    trace = read(path, n_routed_experts)
    k = trace.topk_ids.shape[2]
    if num_experts_per_tok is not None and k != num_experts_per_tok:
        raise ValueError(f"{path}: topk_ids: expected {num_experts_per_tok} experts per token (the model's), found {k}")
    return trace


def recorded_logits(path: str, trace: RecordedTrace, position: int, tokens: slice | I64) -> F32:
    """Return logits [T, E] float32 whose softmax are the recorded scores, or the recorded logits themselves.

    Raises ValueError if the trace has neither, or scores that do not sum to 1 (sigmoid scores: record the logits).
    """
    if trace.scores is None:
        raise ValueError(
            f"{path}: logits: expected every expert's logits or scores (scores: true), found none; with ids only "
            "no other gate can be judged, only placements (leave scores out)"
        )
    values: F32 = trace.scores[position][tokens]
    if trace.score_kind == "logits":
        return values
    total = values.sum(axis=1, dtype=np.float64)
    worst = float(total[np.abs(total - 1.0).argmax()])
    if float(values.min()) < 0 or abs(worst - 1.0) > 0.02:
        raise ValueError(
            f"{path}: scores: expected softmax scores that are at least 0 and sum to 1 over experts (record logits for "
            f"other score functions), found a sum of {worst:.4g}, a least score of {float(values.min()):.4g}"
        )
    logits: F32 = log(np.maximum(values.astype(np.float64), _LEAST_SCORE)).astype(np.float32)
    return logits


class ReplaySource(Source):
    """A trace with its order of tokens."""

    def __init__(
        self, config: Replay, trace: RecordedTrace, positions: list[int], shape: TrafficShape, seed: int, replica: int
    ) -> None:
        self.config, self.trace, self.positions = config, trace, positions
        self.kept = config.warmup_steps * shape.ep_size * config.tokens_per_rank
        self.order = self._order(seed, replica)
        self.sequence = trace.sequence
        domains = trace.domain_of_sequence or _NO_DOMAINS * len(trace.seqlens)
        names = list(dict.fromkeys(domains))
        self.topic_of_sequence = np.array([names.index(name) for name in domains], dtype=np.int32)
        self.imputed = Imputed(config.path, trace, seed, replica) if config.impute else None
        if config.scores:
            for position in positions:
                recorded_logits(config.path, trace, position, slice(None))  # refuse early

    def _order(self, seed: int, replica: int) -> I64 | None:
        n_tokens = self.trace.n_tokens
        if self.config.order == "mixed":
            return stream(seed, "traffic", "replay", replica).permutation(n_tokens)
        if self.config.offset == "none":
            return None
        # Starts of sequences, so that only the last one before the end is followed by a stranger; each replica its own.
        starts = np.unique(np.cumsum(self.trace.seqlens) % n_tokens)
        if len(starts) == 1:
            starts = np.arange(n_tokens)
        mixed = stream(seed, "traffic", "replay", "offset").permutation(starts)
        rotated: I64 = (np.arange(n_tokens) + mixed[replica % len(mixed)]) % n_tokens
        return rotated

    def batch(self, phase: str, step: int, *, n_ranks: int, tokens_per_rank: int) -> Batch:
        n_tokens, per_step = self.trace.n_tokens, n_ranks * tokens_per_rank
        config, start = self.config, step * per_step
        if phase != "train":
            called = "warm-up" if phase == "warmup" else phase
            if start + per_step > self.kept:
                raise ValueError(
                    f"{config.path}: {called} step {step} asked for, but traffic.warmup_steps keeps "
                    f"{config.warmup_steps} train steps for it ({self.kept} tokens, {per_step} per {called} step)"
                )
        else:
            start += self.kept
        if start + per_step > n_tokens:
            left = max(0, n_tokens - (start - step * per_step))
            raise ValueError(
                f"{config.path}: topk_ids: holds {left // per_step} steps of {n_ranks} ranks x {tokens_per_rank} tokens "
                f"({n_tokens} tokens; warm-up keeps {self.kept}), {phase} step {step} asked for"
            )
        return ReplayBatch(self, start, n_ranks, tokens_per_rank)

    def logits(self, position: int, tokens: I64) -> F32 | None:
        """Return logits [T, E] of ``tokens`` in the layer at ``position``, or None if only choices are given."""
        if self.imputed is not None:
            return self.imputed.logits(position, tokens)
        if self.config.scores:
            return recorded_logits(self.config.path, self.trace, position, tokens)
        return None


class ReplayBatch(Batch):
    """One step of a trace, starting at token ``start`` of the source's order."""

    def __init__(self, source: ReplaySource, start: int, n_ranks: int, tokens_per_rank: int) -> None:
        self.source, self.start, self.n_ranks, self.tokens_per_rank = source, start, n_ranks, tokens_per_rank

    def tokens(self, layer: int, rank: int) -> Tokens:
        source, n = self.source, self.tokens_per_rank
        if not 0 <= layer < len(source.positions) or not 0 <= rank < self.n_ranks:
            raise ValueError(
                f"layer {layer}, rank {rank}: this batch has {len(source.positions)} layers, {self.n_ranks} ranks"
            )
        chosen = slice(self.start + rank * n, self.start + (rank + 1) * n)
        rows = np.arange(chosen.start, chosen.stop) if source.order is None else source.order[chosen]
        position = source.positions[layer]
        weights = source.trace.topk_weights
        sequence = source.sequence[rows]
        return Tokens(
            rank=rank,
            logits=source.logits(position, rows),
            topic=source.topic_of_sequence[sequence],
            sequence=_renumbered(sequence),
            topk_ids=source.trace.topk_ids[position, rows],
            topk_weights=None if weights is None else weights[position, rows],
        )


def _renumbered(sequence: I32) -> I32:
    """Return ``sequence`` [T] with its distinct numbers replaced by 0, 1, ... in order of appearance."""
    _, first, inverse = np.unique(sequence, return_index=True, return_inverse=True)
    place = np.argsort(np.argsort(first, kind="stable"), kind="stable")
    numbers: I32 = place[inverse].astype(np.int32)
    return numbers
