"""What happened, as columns: a row per iteration, a row per rest, and the gaps between tokens with their weights."""

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
REST_COLUMNS = ("group", "start_ps", "end_ps", "waiting", "used_blocks", "fullest")
"""Integers of a time without an iteration in which nothing changed; left out where nothing is held."""

_PACK = 4096
"""Rows that wait as Python tuples, which take five times the room, before they become arrays."""


class _Rows:
    """Rows of ``width`` integers."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._rows: list[tuple[int, ...]] = []
        self._packed: list[I64] = [np.zeros((0, width), dtype=np.int64)]

    def add(self, row: tuple[int, ...]) -> None:
        self._rows.append(row)
        if len(self._rows) >= _PACK:
            self._pack()

    def extend(self, rows: I64) -> None:
        self._packed.append(rows)

    def _pack(self) -> None:
        self._packed.append(np.array(self._rows, dtype=np.int64).reshape(-1, self.width))
        self._rows = []

    def table(self) -> I64:
        self._pack()
        return np.concatenate(self._packed)


class Extra:
    """What no table needs. contexts: tokens of the contexts of the decodes of every iteration, in the order of the log.
    handovers: (request, group that computed its prompt, group that decodes it, when the prompt was done, when its cache
    had arrived)."""

    def __init__(self) -> None:
        self.contexts: list[int] = []
        self.handovers: list[tuple[int, int, int, int, int]] = []


class Log:
    """Iterations in the order of their ends, rests, and gaps in ps with how many requests had them (a weight may be
    negative). since_ps: gaps that end before are left out. record: keep what only a timeline shows too."""

    def __init__(self, since_ps: int = 0, record: bool = False) -> None:
        self.since_ps = since_ps
        self._iterations, self._rests, self._gaps = _Rows(len(COLUMNS)), _Rows(len(REST_COLUMNS)), _Rows(2)
        self._imbalance: list[float] = []
        self.extra = Extra() if record else None

    def iteration(self, row: tuple[int, ...], imbalance: float) -> None:
        """Add an iteration, in the order of `COLUMNS`."""
        self._iterations.add(row)
        self._imbalance.append(imbalance)

    def rest(self, row: tuple[int, ...]) -> None:
        """Add a time without an iteration, in the order of `REST_COLUMNS`."""
        self._rests.add(row)

    def gap(self, now_ps: int, last_ps: int, weight: int = 1) -> None:
        """``weight`` tokens came now, and those before them at ``last_ps``."""
        if now_ps >= self.since_ps:
            self._gaps.add((now_ps - last_ps, weight))

    def gaps(self, now_ps: int, last_ps: I64, weights: I64) -> None:
        """Add many, [n] each."""
        if now_ps >= self.since_ps:
            self._gaps.extend(np.stack([now_ps - last_ps, weights], axis=1))

    def columns(self) -> dict[str, I64]:
        """Return {column: [iterations] int64}."""
        table = self._iterations.table()
        return {name: table[:, i] for i, name in enumerate(COLUMNS)}

    def rests(self) -> dict[str, I64]:
        """Return {column: [rests] int64}."""
        table = self._rests.table()
        return {name: table[:, i] for i, name in enumerate(REST_COLUMNS)}

    def imbalances(self) -> F64:
        """Return [iterations] max over mean tokens of the ranks' experts."""
        return np.array(self._imbalance, dtype=np.float64)

    def token_gaps(self) -> tuple[I64, I64]:
        """Return gaps [n] in ps and their weights [n]."""
        every = self._gaps.table()
        return every[:, 0], every[:, 1]
