"""Counts of experts shared by tokens and of tokens shared by experts, compiled: a fit asks thousands of times."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sim.tokens import F64, I16, I64, Bool


def incidence(topk_ids: I16, n_experts: int) -> Bool:
    """Return [N, E], True where the token chose the expert."""
    chosen = np.zeros((len(topk_ids), n_experts), dtype=np.bool_)
    np.put_along_axis(chosen, topk_ids.astype(np.int64), True, axis=1)
    return chosen


def repeats(topk_ids: I16, chosen: Bool, start_of: I64, lags: tuple[int, ...]) -> tuple[F64, I64]:
    """Return how often each expert was chosen at t and at t - lag of the same sequence [lags, E], and the pairs [lags].

    start_of: [N] first token of the token's sequence; chosen: `incidence` of ``topk_ids``.

    >>> ids = np.array([[0, 1], [0, 2], [1, 2]], dtype=np.int16)
    >>> both, pairs = repeats(ids, incidence(ids, 3), np.zeros(3, dtype=np.int64), (1, 2))
    >>> both.tolist(), pairs.tolist()
    ([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [2, 1])
    """
    both = np.zeros((len(lags), chosen.shape[1]))
    pairs = np.zeros(len(lags), dtype=np.int64)
    _compiled(_repeats)(topk_ids, chosen, start_of, np.array(lags, dtype=np.int64), both, pairs)
    return both, pairs


def shared(topk_ids: I16, chosen: Bool, partner: I64) -> int:
    """Return the number of experts that tokens share with their ``partner`` [N], over all tokens that have another one.

    >>> ids = np.array([[0, 1], [0, 2], [1, 2]], dtype=np.int16)
    >>> shared(ids, incidence(ids, 3), np.array([1, 0, 2]))
    2
    """
    return int(_compiled(_shared)(topk_ids, chosen, partner))


def together(topk_ids: I16, n_experts: int) -> I64:
    """Return [E, E], how many tokens chose both experts of a pair (above the diagonal only).

    >>> together(np.array([[0, 2], [2, 1]], dtype=np.int16), 3).tolist()
    [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    """
    pairs = np.zeros((n_experts, n_experts), dtype=np.int64)
    _compiled(_together)(topk_ids, pairs)
    return pairs


def _together(ids: I16, pairs: I64) -> None:
    n_tokens, k = ids.shape
    for t in range(n_tokens):
        for i in range(k):
            for j in range(k):
                if ids[t, i] < ids[t, j]:
                    pairs[ids[t, i], ids[t, j]] += 1


def _repeats(ids: I16, chosen: Bool, start_of: I64, lags: I64, both: F64, pairs: I64) -> None:
    n_tokens, k = ids.shape
    for t in range(n_tokens):
        for i in range(len(lags)):
            before = t - lags[i]
            if before >= start_of[t]:
                pairs[i] += 1
                for j in range(k):
                    if chosen[before, ids[t, j]]:
                        both[i, ids[t, j]] += 1.0


def _shared(ids: I16, chosen: Bool, partner: I64) -> int:
    n_tokens, k = ids.shape
    total = 0
    for t in range(n_tokens):
        if partner[t] != t:
            for j in range(k):
                if chosen[partner[t], ids[t, j]]:
                    total += 1
    return total


@functools.cache
def _compiled(loops: Callable[..., Any]) -> Callable[..., Any]:
    from numba import njit

    compiled: Callable[..., Any] = njit(cache=True, nogil=True)(loops)
    return compiled
