"""What flows between the wings: tokens with affinities in, chosen experts out. Arrays only, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I16 = npt.NDArray[np.int16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens that one expert-parallel rank brings to one MoE layer.

    rank: source rank in the EP group.
    logits: [T, E] float32 router logits, or None when only recorded choices exist (replay of ids).
    topic: [T] int32 index into the traffic's topics (leaf names), for per-domain statistics.
    sequence: [T] int32, which of the batch's sequences a token belongs to (0, 1, ...), or None: all of one sequence.
    token_ids: [T] int32 vocabulary index, 0 = the most frequent, or None if the traffic has no vocabulary.
    topk_ids, topk_weights: [T, k] int16 / float32 recorded choices, or None when the gate has to choose.
    lot: [T] float64 in 0..1, drawn once per sequence and equal in all layers, or None: for rules that treat whole sequences
    by chance.
    """

    rank: int
    logits: F32 | None
    topic: I32
    sequence: I32 | None = None
    token_ids: I32 | None = None
    topk_ids: I16 | None = None
    topk_weights: F32 | None = None
    lot: F64 | None = None

    @property
    def n_tokens(self) -> int:
        return len(self.topic)

    @property
    def sequences(self) -> I32:
        """``sequence``, or zeros."""
        return np.zeros(self.n_tokens, dtype=np.int32) if self.sequence is None else self.sequence


@dataclass(frozen=True, slots=True)
class Routing:
    """A gate's decision for one `Tokens`.

    topk_ids: [T, k] int16, distinct experts per token, -1 = no expert (dropped or not used), as in DeepEP.
    topk_weights: [T, k] float32 gate weights, 0 where the id is -1.
    """

    topk_ids: I16
    topk_weights: F32
