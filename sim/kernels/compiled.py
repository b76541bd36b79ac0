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
def _keys(scores, scale, shift, row, bits, keys):  # type: ignore[no-untyped-def]
    """Fill ``keys`` with one token's sortable int64: the float32 score as an ordered integer, then the reversed index.

    The largest key is the best score, ties to the lowest expert. ``bits`` is ``row`` seen as integers.
    """
    n = len(scores)
    for e in range(n):
        row[e] = (scores[e] * scale[e] + shift[e]) + np.float32(0.0)  # + 0 turns -0.0 into 0.0: they must tie
    for e in range(n):
        v = np.int64(bits[e])
        v = v ^ ((v >> 63) & 0x7FFFFFFF)
        keys[e] = (v << 16) | (65535 - e)


@njit(cache=True, nogil=True)
def _topk(scores, scale, shift, k, lanes, out):  # type: ignore[no-untyped-def]
    """k times: take the largest of the lane maxima, refill its lane. No data-dependent branch to mispredict."""
    n_tokens, n_experts = scores.shape
    depth = (n_experts + lanes - 1) // lanes
    row = np.empty(n_experts, dtype=np.float32)
    bits = row.view(np.int32)
    keys = np.full((depth, lanes), _TAKEN, dtype=np.int64)
    flat = keys.reshape(depth * lanes)
    lane = np.empty(lanes, dtype=np.int64)
    lane_of = np.arange(n_experts) % lanes  # a table instead of divisions in the loop
    for t in range(n_tokens):
        _keys(scores[t], scale, shift, row, bits, flat)
        for j in range(lanes):
            lane[j] = keys[0, j]
        for d in range(1, depth):
            for j in range(lanes):
                lane[j] = keys[d, j] if keys[d, j] > lane[j] else lane[j]
        for i in range(k):
            e = 65535 - (_largest(lane) & 65535)
            out[t, i] = e
            j = lane_of[e]
            flat[e] = _TAKEN
            m = keys[0, j]
            for d in range(1, depth):
                m = keys[d, j] if keys[d, j] > m else m
            lane[j] = m


@njit(cache=True, nogil=True)
def _group_limited(scores, scale, shift, k, n_group, topk_group, n_best, out):  # type: ignore[no-untyped-def]
    """As `_topk` with eight lanes per group, over the lanes of the groups that stay."""
    n_tokens, n_experts = scores.shape
    size = n_experts // n_group
    depth = (size + _W - 1) // _W
    aligned = size == depth * _W
    row = np.empty(n_experts, dtype=np.float32)
    bits = row.view(np.int32)
    plain = np.empty(n_experts, dtype=np.int64)
    keys = np.full((n_group, depth, _W), _TAKEN, dtype=np.int64)
    flat = keys.reshape(n_group * depth * _W)
    grouped = keys.reshape(n_group, depth * _W)
    lane = np.empty((n_group, _W), dtype=np.int64)
    group_score = np.empty(n_group, dtype=np.float32)
    group_bits = group_score.view(np.int32)
    group_key = np.empty(n_group, dtype=np.int64)
    pool = np.empty((topk_group, _W), dtype=np.int64)  # lane maxima of the groups that stay, side by side
    candidates = pool.reshape(topk_group * _W)
    slot = np.arange(n_group)
    removed = np.empty(n_best, dtype=np.int64)
    group_of = np.arange(n_experts) // size
    for t in range(n_tokens):
        if aligned:
            _keys(scores[t], scale, shift, row, bits, flat)
        else:
            _keys(scores[t], scale, shift, row, bits, plain)
            for g in range(n_group):
                for i in range(size):
                    grouped[g, i] = plain[g * size + i]
        for g in range(n_group):
            for j in range(_W):
                lane[g, j] = keys[g, 0, j]
            for d in range(1, depth):
                for j in range(_W):
                    lane[g, j] = keys[g, d, j] if keys[g, d, j] > lane[g, j] else lane[g, j]
        for g in range(n_group):
            total = np.float32(0.0)
            for i in range(n_best):
                key = lane[g, 0]
                for j in range(1, _W):
                    key = lane[g, j] if lane[g, j] > key else key
                e = 65535 - (key & 65535)
                total = row[e] if i == 0 else np.float32(total + row[e])
                if i < n_best - 1:
                    p = e - g * size
                    j = p & (_W - 1)
                    removed[i] = key
                    keys[g, p >> 3, j] = _TAKEN
                    m = keys[g, 0, j]
                    for d in range(1, depth):
                        m = keys[g, d, j] if keys[g, d, j] > m else m
                    lane[g, j] = m
            group_score[g] = total + np.float32(0.0)
            for i in range(n_best - 1):
                p = 65535 - (removed[i] & 65535) - g * size
                j = p & (_W - 1)
                keys[g, p >> 3, j] = removed[i]
                lane[g, j] = max(lane[g, j], removed[i])
        for g in range(n_group):
            v = np.int64(group_bits[g])
            v = v ^ ((v >> 63) & 0x7FFFFFFF)
            group_key[g] = (v << 16) | (65535 - g)
        for i in range(topk_group):
            g = 65535 - (_largest(group_key) & 65535)
            group_key[g] = _TAKEN
            slot[g] = i
            for j in range(_W):
                pool[i, j] = lane[g, j]
        for i in range(k):
            e = 65535 - (_largest(candidates) & 65535)
            out[t, i] = e
            g = group_of[e]
            p = e - g * size
            j = p & (_W - 1)
            keys[g, p >> 3, j] = _TAKEN
            m = keys[g, 0, j]
            for d in range(1, depth):
                m = keys[g, d, j] if keys[g, d, j] > m else m
            pool[slot[g], j] = m


def topk(scores: F32, scale: F32, shift: F32, k: int) -> I16:
    """As `sim.kernels.plain.topk`."""
    out = np.empty((len(scores), k), dtype=np.int16)
    _topk(scores, scale, shift, k, 32 if scores.shape[1] >= 96 else 16 if scores.shape[1] >= 32 else 4, out)
    return out


def group_limited_topk(scores: F32, scale: F32, shift: F32, k: int, n_group: int, topk_group: int, n_best: int) -> I16:
    """As `sim.kernels.plain.group_limited_topk`."""
    if topk_group >= n_group:
        return topk(scores, scale, shift, k)
    out = np.empty((len(scores), k), dtype=np.int16)
    n_best = min(n_best, scores.shape[1] // n_group)
    _group_limited(scores, scale, shift, k, n_group, topk_group, n_best, out)
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
def _distinct_groups(topk_ids, expert_to_group, n_groups):  # type: ignore[no-untyped-def]
    words = np.empty((n_groups + 63) >> 6, dtype=np.int64)
    total = 0
    for t in range(topk_ids.shape[0]):
        words[:] = 0
        for i in range(topk_ids.shape[1]):
            e = topk_ids[t, i]
            if e >= 0:
                g = expert_to_group[e]
                total += 1 - ((words[g >> 6] >> (g & 63)) & 1)
                words[g >> 6] |= 1 << (g & 63)
    return total


def distinct_groups(topk_ids: I16, expert_to_group: I32, n_groups: int) -> int:
    """As `sim.kernels.plain.distinct_groups`."""
    return int(_distinct_groups(topk_ids, expert_to_group, n_groups))


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
