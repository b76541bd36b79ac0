"""What happened, as columns: one row per iteration, and the gaps between tokens with their weights."""

from __future__ import annotations

import numpy as np

from sim.tokens import F64, I64

COLUMNS = (
    "group", "start_ps", "end_ps", "decoding", "running", "waiting", "used_blocks", "fullest", "prompt_tokens", "cached_tokens",
    "output_tokens", "attention_ps", "experts_ps", "communication_ps", "other_ps",
)  # fmt: skip
"""Integers of an iteration. group: over all units. decoding, running, waiting: requests, those that run being decodes, in
this iteration or resting, and the prompts being computed. used_blocks: sum over ranks; fullest: the
most of one rank. prompt_tokens, cached_tokens, output_tokens: computed, found in the cache, and given to users."""

_PACK = 4096
"""Rows that wait as Python tuples, which take five times the room, before they become arrays."""


class Log:
    """Iterations in the order of their ends, and gaps in ps with how many requests had them (a weight may be negative)."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._imbalance: list[float] = []
        self._gaps: list[tuple[int, int]] = []
        self._packed: list[I64] = []
        self._packed_imbalance: list[F64] = []
        self._packed_gaps: list[I64] = []

    def iteration(self, row: tuple[int, ...], imbalance: float) -> None:
        """Add an iteration, in the order of `COLUMNS`."""
        self._rows.append(row)
        self._imbalance.append(imbalance)
        if len(self._rows) >= _PACK:
            self._pack()

    def gap(self, gap_ps: int, weight: int = 1) -> None:
        self._gaps.append((gap_ps, weight))

    def gaps(self, gaps_ps: I64, weights: I64) -> None:
        """Add many, [n] each."""
        self._packed_gaps.append(np.stack([gaps_ps, weights]))

    def _pack(self) -> None:
        self._packed.append(np.array(self._rows, dtype=np.int64).reshape(-1, len(COLUMNS)))
        self._packed_imbalance.append(np.array(self._imbalance, dtype=np.float64))
        self._packed_gaps.append(np.array(self._gaps, dtype=np.int64).reshape(-1, 2).T)
        self._rows, self._imbalance, self._gaps = [], [], []

    def columns(self) -> dict[str, I64]:
        """Return {column: [iterations] int64}."""
        self._pack()
        table = np.concatenate(self._packed)
        return {name: table[:, i] for i, name in enumerate(COLUMNS)}

    def imbalances(self) -> F64:
        """Return [iterations] max over mean tokens of the ranks' experts."""
        self._pack()
        return np.concatenate(self._packed_imbalance)

    def token_gaps(self) -> tuple[I64, I64]:
        """Return gaps [n] in ps and their weights [n]."""
        self._pack()
        every = np.concatenate(self._packed_gaps, axis=1)
        return every[0], every[1]
