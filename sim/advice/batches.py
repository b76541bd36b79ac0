"""Recorded choices as batches in the order of time, and the windows they fall into."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sim.advice import Serving
from sim.rng import stream
from sim.tokens import F64, I16, I64
from sim.traces import RecordedTrace

WINDOWS = 9
"""Equal windows of a trace: the first third is window A, to plan on; the others are window B, to judge on."""
FEW_WINDOWS = 3
_MOST_JUDGED = 24
TYPICAL = {"decode": 128, "prefill": 8192}
"""Tokens of a rank in one step: DeepSeek-V3's decode unit; the default token budget of vLLM and of ATOM."""
_LEAST = {"decode": 8, "prefill": 256}
_WANTED = 120


@dataclass(frozen=True)
class Batches:
    """Batches of ``ep_size`` ranks with T tokens each, L layers, E experts.

    ids: [L, N, k] int16, tokens in the order in which batches take them; batch b has the ep_size T tokens from b ep_size T
    on, rank r the r-th T of those. n_windows: equal windows, the first ``n_planned`` of them A, the rest B; 0 if there are
    too few batches for any. per_window: batches of each.
    """

    ids: I16
    n_routed_experts: int
    ep_size: int
    tokens_per_rank: int
    n_windows: int
    per_window: int

    @property
    def size(self) -> int:
        """Tokens of a batch."""
        return self.ep_size * self.tokens_per_rank

    @property
    def n_planned(self) -> int:
        return self.n_windows // 3

    @property
    def n_batches(self) -> int:
        """Batches that the tokens fill, those after the last whole window included."""
        return int(self.ids.shape[1]) // self.size

    def batch(self, number: int) -> I16:
        """Return [L, P, T, k] ids."""
        cut = self.ids[:, number * self.size : (number + 1) * self.size]
        return cut.reshape(len(cut), self.ep_size, self.tokens_per_rank, -1)

    def judged(self, window: int) -> I64:
        """Return the batches of a window that are timed: all, or in long traces some, evenly spaced."""
        count = min(self.per_window, _MOST_JUDGED)
        return window * self.per_window + np.arange(count) * self.per_window // count

    @cached_property
    def loads(self) -> F64:
        """[W, L, E] tokens that each expert received in each window, all batches counted."""
        length = self.per_window * self.size
        found = np.zeros((self.n_windows, len(self.ids), self.n_routed_experts))
        for window in range(self.n_windows):
            for layer, ids in enumerate(self.ids[:, window * length : (window + 1) * length]):
                found[window, layer] = np.bincount(ids.ravel(), minlength=self.n_routed_experts)
        return found


def fitting_tokens(n_tokens: int, ep_size: int, phase: Serving) -> int:
    """Return the largest power of two of tokens per rank, at most a typical batch's, of which B holds 120 batches.

    >>> fitting_tokens(39_590, 8, "decode"), fitting_tokens(10**9, 8, "prefill"), fitting_tokens(100, 8, "decode")
    (16, 8192, 8)
    """
    tokens = TYPICAL[phase]
    while tokens > _LEAST[phase] and n_tokens * 2 // 3 < _WANTED * ep_size * tokens:
        tokens //= 2
    return tokens


def spread_layers(n_layers: int, wanted: int) -> list[int]:
    """Return ``wanted`` layers (all, if there are fewer), evenly spread, ends included.

    >>> spread_layers(24, 4), spread_layers(2, 8)
    ([0, 8, 15, 23], [0, 1])
    """
    return sorted({round(at) for at in np.linspace(0, n_layers - 1, min(wanted, n_layers))})


def cut(
    trace: RecordedTrace, *, ep_size: int, tokens_per_rank: int, phase: Serving, layers: int, shuffle: bool, seed: int
) -> Batches:
    """Cut a trace into batches.

    Prefill batches take tokens as they come, sequence after sequence. A decode batch takes the next token of as many
    requests as it has tokens: each window is cut into that many equal runs, dealt to the ranks in turn, so that what
    changes from window to window stays. shuffle: put whole sequences into random order first, so that windows differ by
    chance only.
    """
    chosen = trace.part(
        layers=spread_layers(len(trace.layers), layers),
        sequences=stream(seed, "advice", "order").permutation(len(trace.seqlens)).tolist() if shuffle else None,
    )
    size = ep_size * tokens_per_rank
    n_batches = chosen.n_tokens // size
    windows = WINDOWS if n_batches >= 2 * WINDOWS else FEW_WINDOWS if n_batches >= FEW_WINDOWS else 0
    per_window = n_batches // windows if windows else 0
    ids = chosen.topk_ids
    if phase == "decode" and windows:
        used = ids[:, : windows * per_window * size]
        runs = used.reshape(len(used), windows, tokens_per_rank, ep_size, per_window, -1)
        ids = runs.transpose(0, 1, 4, 3, 2, 5).reshape(used.shape)
    return Batches(ids, chosen.n_routed_experts, ep_size, tokens_per_rank, windows, per_window)
