"""What happened, as columns: one row per iteration, and the gaps between tokens with their weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sim.tokens import F64, I64

COLUMNS = (
    "group", "start_ps", "end_ps", "decoding", "waiting", "used_blocks", "fullest", "prompt_tokens", "cached_tokens",
    "output_tokens", "attention_ps", "experts_ps", "communication_ps", "other_ps",
)  # fmt: skip
"""Integers of an iteration. group: over all units. decoding, waiting: requests. used_blocks: sum over ranks; fullest: the
most of one rank. prompt_tokens, cached_tokens, output_tokens: computed, found in the cache, and given to users."""


@dataclass
class Log:
    """rows: tuples in the order of `COLUMNS`. imbalance: of each row. gaps: [2, n] arrays of gaps between tokens, ps, and
    how many requests had them."""

    rows: list[tuple[int, ...]] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    gaps: list[I64] = field(default_factory=list)
    single_gaps: list[tuple[int, int]] = field(default_factory=list)

    def columns(self) -> dict[str, I64]:
        """Return {column: [iterations] int64}."""
        table = np.array(self.rows, dtype=np.int64).reshape(-1, len(COLUMNS))
        return {name: table[:, i] for i, name in enumerate(COLUMNS)}

    def imbalances(self) -> F64:
        return np.array(self.imbalance, dtype=np.float64)

    def token_gaps(self) -> tuple[I64, I64]:
        """Return gaps [n] in ps and their weights [n]."""
        single = np.array(self.single_gaps, dtype=np.int64).reshape(-1, 2).T
        every = np.concatenate([single, *self.gaps], axis=1)
        return every[0], every[1]
