"""Recorded expert choices from an npz file, given back token by token.

A file holds ``topk_ids`` [layer, token, k] (any integer type) and may hold ``topk_weights`` of the same shape (floats),
``seqlens`` [sequences] (integers that sum to the tokens), ``layers`` [layer] (the model's own layer numbers) and the
scalar ``n_routed_experts``. With ids only, a different gate cannot be asked what it would have chosen; placements and
capacities can be compared. Files are not trusted: see ``tracefile``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from sim.rng import stream
from sim.tokens import F32, I16, I64, Tokens
from sim.traffic import Batch, Source, Traffic, TrafficShape
from sim.traffic.tracefile import Array, read_npz


class Replay(Traffic):
    """Replays a trace: rank r of train step s takes the tokens [(s P + r) T, (s P + r + 1) T) after the warm-up's.

    Consecutive order has no randomness: all replicas and seeds see the same tokens.
    """

    kind: Literal["replay"] = "replay"
    path: str = Field(min_length=1)
    """The npz file."""
    order: Literal["consecutive", "mixed"] = "consecutive"
    """``consecutive``: as recorded, prefill-like; ``mixed``: one seeded permutation of all tokens, decode-like."""
    layers: tuple[int, ...] | None = None
    """Which recorded layers serve MoE layers 0, 1, ...: values of the file's ``layers`` array, or positions if it has
    none. Null = the first ones."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps at the start of the trace kept for the warm-up phase; train steps follow, so no token is used twice."""

    @property
    def provides(self) -> Literal["logits", "ids"]:
        return "ids"

    @property
    def topics(self) -> tuple[str, ...]:
        return ("replay",)

    def start(self, shape: TrafficShape, seed: int, replica: int) -> Source:
        trace = read_trace(self.path, shape.n_routed_experts, shape.num_experts_per_tok)
        chosen = self._positions(trace, shape)
        order = None
        if self.order == "mixed":
            order = stream(seed, "traffic", "replay", replica).permutation(trace.topk_ids.shape[1])
        source = ReplaySource(self, trace, chosen, order)
        source.batch("train", 0, n_ranks=shape.ep_size, tokens_per_rank=self.tokens_per_rank)  # refuse early
        return source

    def _positions(self, trace: Trace, shape: TrafficShape) -> list[int]:
        recorded = len(trace.topk_ids) if trace.layers is None else trace.layers
        known = list(range(recorded)) if isinstance(recorded, int) else recorded
        wanted = list(self.layers) if self.layers is not None else known[: shape.n_moe_layers]
        unknown = [layer for layer in wanted if layer not in known]
        if unknown:
            raise ValueError(f"{self.path}: layers: expected some of {known}, found {unknown}")
        if len(wanted) != shape.n_moe_layers:
            raise ValueError(f"{self.path}: layers: expected {shape.n_moe_layers} (the model's), found {len(wanted)}")
        return [known.index(layer) for layer in wanted]


class Trace(NamedTuple):
    """A validated trace: topk_ids [L, N, k] int16, distinct within a token; topk_weights [L, N, k] float32 or None."""

    topk_ids: I16
    topk_weights: F32 | None
    layers: list[int] | None


def read_trace(path: str, n_routed_experts: int, num_experts_per_tok: int) -> Trace:
    """Read and check a trace for a model with E = ``n_routed_experts`` and k = ``num_experts_per_tok``.

    Raises ValueError naming file, array, what was expected and what was found.
    """
    limits = {
        "topk_ids": Array(kinds="iu", ndim=3),
        "topk_weights": Array(kinds="f", ndim=3, optional=True),
        "seqlens": Array(kinds="iu", ndim=1, optional=True),
        "layers": Array(kinds="iu", ndim=1, optional=True),
        "n_routed_experts": Array(kinds="iu", ndim=0, optional=True),
    }

    def need(ok: bool, array: str, expected: str, found: object) -> None:
        if not ok:
            raise ValueError(f"{path}: {array}: expected {expected}, found {found}")

    def check_headers(shapes: dict[str, tuple[int, ...]]) -> None:
        ids_shape = shapes["topk_ids"]
        n_layers, n_tokens, k = ids_shape
        need(k == num_experts_per_tok, "topk_ids", f"{num_experts_per_tok} experts per token (the model's)", k)
        need(n_layers > 0 and n_tokens > 0, "topk_ids", "at least one layer and one token", ids_shape)
        if "topk_weights" in shapes:
            need(shapes["topk_weights"] == ids_shape, "topk_weights", f"shape {ids_shape}", shapes["topk_weights"])
        if "layers" in shapes:
            need(shapes["layers"] == (n_layers,), "layers", f"shape {(n_layers,)}", shapes["layers"])

    arrays = read_npz(path, limits, check_headers)
    if "n_routed_experts" in arrays:
        found = int(arrays["n_routed_experts"])
        need(found == n_routed_experts, "n_routed_experts", f"{n_routed_experts} (the model's)", found)
    raw = arrays["topk_ids"]
    low, high = int(raw.min()), int(raw.max())
    need(low >= 0, "topk_ids", f"ids in 0..{n_routed_experts - 1}", low)
    need(high < n_routed_experts, "topk_ids", f"ids in 0..{n_routed_experts - 1}", high)
    ids = np.array(raw, dtype=np.int16, order="C")
    for position, layer in enumerate(ids):
        ordered = np.sort(layer, axis=1)
        repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if repeated.any():
            token = int(repeated.argmax())
            need(False, "topk_ids", "distinct experts per token", f"{layer[token].tolist()} (row {position}, {token})")
    weights = arrays.get("topk_weights")
    if weights is not None:
        need(bool(np.isfinite(weights).all()), "topk_weights", "finite weights", "NaN or infinity")
        need(bool((weights >= 0).all()), "topk_weights", "weights of at least 0", float(weights.min()))
        largest, limit = float(weights.max()), float(np.finfo(np.float32).max)
        need(largest <= limit, "topk_weights", f"weights up to {limit:.2g} (float32)", largest)
        weights = np.array(weights, dtype=np.float32, order="C")
    if "seqlens" in arrays:
        lengths = [int(n) for n in arrays["seqlens"]]
        need(min(lengths, default=0) >= 0, "seqlens", "lengths of at least 0", min(lengths, default=0))
        need(sum(lengths) == ids.shape[1], "seqlens", f"a sum of {ids.shape[1]} (the tokens of topk_ids)", sum(lengths))
    layers = [int(n) for n in arrays["layers"]] if "layers" in arrays else None
    if layers is not None:
        need(len(set(layers)) == len(layers), "layers", "distinct layer numbers", layers)
    for array in (ids, weights):
        if array is not None:
            array.setflags(write=False)  # batches hand out views
    return Trace(ids, weights, layers)


class ReplaySource(Source):
    """A trace with its order of tokens; never wraps around."""

    def __init__(self, config: Replay, trace: Trace, positions: list[int], order: I64 | None) -> None:
        self.config, self.trace, self.positions, self.order = config, trace, positions, order

    def batch(self, phase: str, step: int, *, n_ranks: int, tokens_per_rank: int) -> Batch:
        n_tokens, per_step = self.trace.topk_ids.shape[1], n_ranks * tokens_per_rank
        warmup = self.config.warmup_steps
        if phase == "warmup" and step >= warmup:
            raise ValueError(
                f"{self.config.path}: warm-up step {step} asked for, but traffic.warmup_steps keeps {warmup} for it"
            )
        first = step if phase == "warmup" else warmup + step
        if (first + 1) * per_step > n_tokens:
            raise ValueError(
                f"{self.config.path}: topk_ids: holds {n_tokens // per_step} steps of {n_ranks} ranks x "
                f"{tokens_per_rank} tokens ({n_tokens} tokens; warm-up keeps {warmup}), {phase} step {step} asked for"
            )
        return ReplayBatch(self, first * per_step, n_ranks, tokens_per_rank)


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
        rows = chosen if source.order is None else source.order[chosen]
        position = source.positions[layer]
        weights = source.trace.topk_weights
        return Tokens(
            rank=rank,
            logits=None,
            topic=np.zeros(n, dtype=np.int32),
            topk_ids=source.trace.topk_ids[position, rows],
            topk_weights=None if weights is None else weights[position, rows],
        )
