"""Numba kernels: the same arithmetic as ``plain``, one pass per token, without temporaries. Import loads Numba."""

from __future__ import annotations

import numpy as np
from numba import njit

from sim.tokens import F32, I16, I32, I64

_W = 8  # lanes per group: each holds the maximum of every eighth expert of the group
_TAKEN = np.int64(-(2**62))


@njit(cache=True, nogil=True)
def _largest(keys):  # type: ignore[no-untyped-def]
    best = keys[0]
    for i in range(1, len(keys)):
        best = keys[i] if keys[i] > best else best
    return best


@njit(cache=True, nogil=True)
def _select(scores, scale, shift, k, n_group, topk_group, n_best, limited, out):  # type: ignore[no-untyped-def]
    """Repeat k times: take the largest key, refill its lane. No data-dependent branch, so no mispredictions.

    A key is the order-preserving integer image of the float32 score, then the reversed expert index, in one int64:
    the largest key is the best score with ties to the lowest expert. Slices instead of computed indices tell Numba that
    an index is not negative, without which nothing vectorises.
    """
    n_tokens, n_experts = scores.shape
    size = n_experts // n_group
    depth = (size + _W - 1) // _W
    row = np.empty(n_experts, dtype=np.float32)
    bits = row.view(np.int32)
    reversed_id = np.arange(65535, 65535 - n_experts, -1)
    plain_keys = np.empty(n_experts, dtype=np.int64)
    keys = np.full((n_group, depth, _W), _TAKEN, dtype=np.int64)
    flat = keys.reshape(n_group, depth * _W)
    lane = np.empty((n_group, _W), dtype=np.int64)
    group_score = np.empty(n_group, dtype=np.float32)
    kept = np.arange(n_group)
    pool = np.empty((n_group, _W), dtype=np.int64)  # lane maxima of the kept groups, side by side
    pool_flat = pool.reshape(n_group * _W)
    slot = np.arange(n_group)
    removed = np.empty(n_best, dtype=np.int64)
    for t in range(n_tokens):
        s = scores[t]
        for e in range(n_experts):
            row[e] = (s[e] * scale[e] + shift[e]) + np.float32(0.0)  # + 0 turns -0.0 into 0.0: they must tie
        for e in range(n_experts):
            v = np.int64(bits[e])
            v = v ^ ((v >> 63) & 0x7FFFFFFF)
            plain_keys[e] = (v << 16) | reversed_id[e]
        for g in range(n_group):
            fg, a = flat[g], g * size
            source = plain_keys[a : a + size]
            for i in range(size):
                fg[i] = source[i]
            kg, lg = keys[g], lane[g]
            for j in range(_W):
                lg[j] = kg[0, j]
            for d in range(1, depth):
                kd = kg[d]
                for j in range(_W):
                    lg[j] = kd[j] if kd[j] > lg[j] else lg[j]
        n_kept = n_group
        if limited:
            for g in range(n_group):
                kg, lg = keys[g], lane[g]
                total = np.float32(0.0)
                for i in range(n_best):
                    key = _largest(lg)
                    e = 65535 - (key & 65535)
                    total = row[e] if i == 0 else np.float32(total + row[e])
                    if i < n_best - 1:
                        p = e - g * size
                        removed[i] = key
                        kg[p // _W, p % _W] = _TAKEN
                        m = kg[0, p % _W]
                        for d in range(1, depth):
                            m = kg[d, p % _W] if kg[d, p % _W] > m else m
                        lg[p % _W] = m
                group_score[g] = total
                for i in range(n_best - 1):
                    p = 65535 - (removed[i] & 65535) - g * size
                    kg[p // _W, p % _W] = removed[i]
                    lg[p % _W] = max(lg[p % _W], removed[i])
            n_kept = 0
            for g in range(n_group):
                mine = group_score[g]
                rank = 0
                for h in range(n_group):
                    rank += (group_score[h] > mine) | ((group_score[h] == mine) & (h < g))
                if rank < topk_group:
                    kept[n_kept] = g
                    slot[g] = n_kept
                    n_kept += 1
        for i in range(n_kept):
            lg, pg = lane[kept[i]], pool[i]
            for j in range(_W):
                pg[j] = lg[j]
        candidates = pool_flat[: n_kept * _W]
        for i in range(k):
            key = _largest(candidates)
            e = 65535 - (key & 65535)
            out[t, i] = e
            g = e // size
            p = e - g * size
            j = p % _W
            kg = keys[g]
            kg[p // _W, j] = _TAKEN
            m = kg[0, j]
            for d in range(1, depth):
                m = kg[d, j] if kg[d, j] > m else m
            pool[slot[g], j] = m


def _virtual_groups(n_experts: int) -> int:
    """Split a plain top-k into strips of about 32 experts, so that lane maxima give a tight bound."""
    for size in (32, 16, 64, 40, 24, 20, 48, 8):
        if n_experts % size == 0:
            return n_experts // size
    return 1


def topk(scores: F32, scale: F32, shift: F32, k: int) -> I16:
    """As `sim.kernels.plain.topk`."""
    out = np.empty((len(scores), k), dtype=np.int16)
    n_group = _virtual_groups(scores.shape[1])
    _select(scores, scale, shift, k, n_group, n_group, 1, False, out)
    return out


def group_limited_topk(
    scores: F32, scale: F32, shift: F32, k: int, n_group: int, topk_group: int, n_best: int
) -> I16:
    """As `sim.kernels.plain.group_limited_topk`."""
    out = np.empty((len(scores), k), dtype=np.int16)
    n_best = min(n_best, scores.shape[1] // n_group)
    _select(scores, scale, shift, k, n_group, topk_group, n_best, topk_group < n_group, out)
    return out


_LOG2E = np.float32(1.4426950408889634)
_BLOCK = 1024
_ROUND = np.float32(1.5 * 2**23)  # adding and subtracting it rounds to the nearest integer, halves to even
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (
    np.float32(0.6931471805599453**i / d) for i, d in enumerate((1.0, 1.0, 2.0, 6.0, 24.0, 120.0, 720.0))
)


@njit(cache=True, nogil=True)
def _exp(x, sign, logistic, out):  # type: ignore[no-untyped-def]
    # Two loops over a cached block: writing exponent bits and reading them as floats in one loop would alias.
    power_bits = np.empty(_BLOCK, dtype=np.int32)
    power = power_bits.view(np.float32)
    one = np.float32(1.0)
    for start in range(0, x.size, _BLOCK):
        xs, os = x[start : start + _BLOCK], out[start : start + _BLOCK]
        n = len(xs)
        for i in range(n):
            scaled = (sign * xs[i]) * _LOG2E
            scaled = np.float32(127.0) if scaled > np.float32(127.0) else scaled
            scaled = np.float32(-126.0) if scaled < np.float32(-126.0) else scaled
            whole = (scaled + _ROUND) - _ROUND
            f = scaled - whole
            p = _C6 * f + _C5
            p = p * f + _C4
            p = p * f + _C3
            p = p * f + _C2
            p = p * f + _C1
            p = p * f + _C0
            os[i] = p
            power_bits[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        if logistic:
            for i in range(n):
                os[i] = one / (one + os[i] * power[i])
        else:
            for i in range(n):
                os[i] = os[i] * power[i]


def exp(x: F32) -> F32:
    """As `sim.kernels.plain.exp`."""
    x = np.ascontiguousarray(x)
    out = np.empty_like(x)
    _exp(x.ravel(), np.float32(1.0), False, out.ravel())
    return out


def sigmoid(logits: F32) -> F32:
    """As `sim.kernels.plain.sigmoid`."""
    logits = np.ascontiguousarray(logits)
    out = np.empty_like(logits)
    _exp(logits.ravel(), np.float32(-1.0), True, out.ravel())
    return out


@njit(cache=True, nogil=True)
def _normalise(e, out):  # type: ignore[no-untyped-def]
    for t in range(e.shape[0]):
        total = 0.0
        for j in range(e.shape[1]):
            total += e[t, j]
        divisor = np.float32(total)
        for j in range(e.shape[1]):
            out[t, j] = e[t, j] / divisor


def softmax(logits: F32) -> F32:
    """As `sim.kernels.plain.softmax`."""
    e = exp(logits - logits.max(axis=1, keepdims=True))
    out = np.empty_like(e)
    _normalise(e, out)
    return out


@njit(cache=True, nogil=True)
def _group_tokens(topk_ids, expert_to_group, n_groups):  # type: ignore[no-untyped-def]
    counts = np.zeros(n_groups, dtype=np.int64)
    seen = np.full(n_groups, -1, dtype=np.int64)
    for t in range(topk_ids.shape[0]):
        for i in range(topk_ids.shape[1]):
            e = topk_ids[t, i]
            if e >= 0:
                g = expert_to_group[e]
                if seen[g] != t:
                    seen[g] = t
                    counts[g] += 1
    return counts


def group_tokens(topk_ids: I16, expert_to_group: I32, n_groups: int) -> I64:
    """As `sim.kernels.plain.group_tokens`."""
    counts: I64 = _group_tokens(topk_ids, expert_to_group, n_groups)
    return counts


@njit(cache=True, nogil=True)
def _expert_tokens(topk_ids, n_experts):  # type: ignore[no-untyped-def]
    counts = np.zeros(n_experts, dtype=np.int64)
    for t in range(topk_ids.shape[0]):
        for i in range(topk_ids.shape[1]):
            if topk_ids[t, i] >= 0:
                counts[topk_ids[t, i]] += 1
    return counts


def expert_tokens(topk_ids: I16, n_experts: int) -> I64:
    """As `sim.kernels.plain.expert_tokens`."""
    counts: I64 = _expert_tokens(topk_ids, n_experts)
    return counts


@njit(cache=True, nogil=True)
def _picked(values, topk_ids, out):  # type: ignore[no-untyped-def]
    for t in range(topk_ids.shape[0]):
        for i in range(topk_ids.shape[1]):
            e = topk_ids[t, i]
            out[t, i] = values[t, e] if e >= 0 else np.float32(0.0)


def picked(values: F32, topk_ids: I16) -> F32:
    """As `sim.kernels.plain.picked`."""
    out = np.empty(topk_ids.shape, dtype=np.float32)
    _picked(values, topk_ids, out)
    return out
