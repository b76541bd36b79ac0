"""One recorded trace in memory, and the checks that every format shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sim.tokens import F32, I16, I32, I64

MAX_EXPERTS = int(np.iinfo(np.int16).max) + 1


@dataclass(frozen=True, slots=True)
class RecordedTrace:
    """Expert choices of N tokens in L layers; tokens are whole sequences, one after the other. Arrays are read-only.

    topk_ids: [L, N, k] int16, distinct within a token, in 0..n_routed_experts - 1.
    topk_weights: [L, N, k] float32 gate weights as recorded (renormalised or not), or None.
    seqlens: [S] int64 tokens of each sequence; they sum to N. One sequence if the file does not say.
    layers: the model's own numbers of the L layers.
    domain_of_sequence: S names (topic, category, data set), or None.
    scores: [L, N, E] float32 what the router gave every expert, or None. score_kind: whether they are ``logits`` or
    ``scores`` (after softmax or sigmoid).
    """

    topk_ids: I16
    topk_weights: F32 | None
    seqlens: I64
    layers: tuple[int, ...]
    n_routed_experts: int
    domain_of_sequence: tuple[str, ...] | None = None
    scores: F32 | None = None
    score_kind: Literal["logits", "scores"] | None = None

    @property
    def n_tokens(self) -> int:
        return int(self.topk_ids.shape[1])

    @property
    def sequence(self) -> I32:
        """[N] int32, the sequence that each token belongs to."""
        return np.repeat(np.arange(len(self.seqlens), dtype=np.int32), self.seqlens)

    def part(self, *, sequences: Sequence[int] | None = None, layers: Sequence[int] | None = None) -> RecordedTrace:
        """Return the trace of some ``sequences`` and some ``layers`` (positions, not numbers), in the order given."""
        kept = np.arange(len(self.seqlens)) if sequences is None else np.asarray(sequences, dtype=np.int64)
        ends = np.cumsum(self.seqlens)
        spans = [np.arange(ends[s] - self.seqlens[s], ends[s]) for s in kept]
        tokens = np.concatenate([np.empty(0, dtype=np.int64), *spans])
        rows = np.arange(len(self.layers)) if layers is None else np.asarray(layers, dtype=np.int64)
        domains = self.domain_of_sequence

        def cut(array: npt.NDArray[Any] | None) -> Any:
            return None if array is None else array[rows][:, tokens]

        return RecordedTrace(
            topk_ids=cut(self.topk_ids),
            topk_weights=cut(self.topk_weights),
            seqlens=self.seqlens[kept],
            layers=tuple(self.layers[row] for row in rows),
            n_routed_experts=self.n_routed_experts,
            domain_of_sequence=None if domains is None else tuple(domains[s] for s in kept),
            scores=cut(self.scores),
            score_kind=self.score_kind,
        )


def checked(
    path: str,
    topk_ids: npt.NDArray[Any],
    *,
    ids_name: str = "topk_ids",
    topk_weights: npt.NDArray[Any] | None = None,
    seqlens: npt.NDArray[Any] | Sequence[int] | None = None,
    layers: npt.NDArray[Any] | Sequence[int] | None = None,
    n_routed_experts: int | None = None,
    domains: Sequence[str] | None = None,
    scores: npt.NDArray[Any] | None = None,
    score_kind: Literal["logits", "scores"] | None = None,
) -> RecordedTrace:
    """Return the trace made of arrays whose shapes agree already; ``ids_name`` is what the file calls the ids.

    Raises ValueError ``path: array: expected ..., found ...``.
    """

    def need(ok: bool, array: str, expected: str, found: object) -> None:
        if not ok:
            raise ValueError(f"{path}: {array}: expected {expected}, found {found}")

    need(topk_ids.ndim == 3 and topk_ids.size > 0, ids_name, "at least one layer and one token", topk_ids.shape)
    low, high = int(topk_ids.min()), int(topk_ids.max())
    n_experts = n_routed_experts if n_routed_experts is not None else high + 1
    need(n_experts <= MAX_EXPERTS, "n_routed_experts", f"at most {MAX_EXPERTS}", n_experts)
    need(low >= 0, ids_name, f"ids in 0..{n_experts - 1}", low)
    need(high < n_experts, ids_name, f"ids in 0..{n_experts - 1}", high)
    ids = np.array(topk_ids, dtype=np.int16, order="C")
    for position, layer in enumerate(ids):
        ordered = np.sort(layer, axis=1)
        repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if repeated.any():
            token = int(repeated.argmax())
            need(False, ids_name, "distinct experts per token", f"{layer[token].tolist()} (row {position}, {token})")
    weights = None if topk_weights is None else _floats(path, "topk_weights", topk_weights, least=0.0)
    full = None if scores is None else _floats(path, score_kind or "scores", scores)
    n_tokens = ids.shape[1]
    lengths = [n_tokens] if seqlens is None else [int(n) for n in seqlens]
    need(min(lengths, default=0) >= 0, "seqlens", "lengths of at least 0", min(lengths, default=0))
    need(sum(lengths) == n_tokens, "seqlens", f"a sum of {n_tokens} (the tokens of {ids_name})", sum(lengths))
    numbers = tuple(range(len(ids)) if layers is None else (int(n) for n in layers))
    need(len(set(numbers)) == len(numbers), "layers", "distinct layer numbers", list(numbers))
    for array in (ids, weights, full):
        if array is not None:
            array.setflags(write=False)  # views of them are handed out
    return RecordedTrace(
        topk_ids=ids,
        topk_weights=weights,
        seqlens=np.array(lengths, dtype=np.int64),
        layers=numbers,
        n_routed_experts=n_experts,
        domain_of_sequence=None if domains is None else tuple(domains),
        scores=full,
        score_kind=None if full is None else score_kind,
    )


def _floats(path: str, name: str, raw: npt.NDArray[Any], least: float | None = None) -> F32:
    values = "weights" if least is not None else "values"
    if not np.isfinite(raw).all():
        raise ValueError(f"{path}: {name}: expected finite {values}, found NaN or infinity")
    if least is not None and not (raw >= least).all():
        raise ValueError(f"{path}: {name}: expected {values} of at least 0, found {float(raw.min())}")
    largest, limit = float(np.abs(raw).max()), float(np.finfo(np.float32).max)
    if largest > limit:
        raise ValueError(f"{path}: {name}: expected {values} up to {limit:.2g} (float32), found {largest}")
    return np.array(raw, dtype=np.float32, order="C")
