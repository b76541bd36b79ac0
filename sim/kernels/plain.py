"""NumPy kernels: k rounds of argmax, exact and 2.5-4 times faster than partitioning for wide gates."""

from __future__ import annotations

import numpy as np

from sim.tokens import F32, I16, I32, I64

_BLOCK = 1024  # rows per pass: 1 MiB of 256 float32 scores stays in cache


def affine(scores: F32, scale: F32, shift: F32) -> F32:
    """Return ``scores * scale + shift`` (float32, [T, E] with [E] vectors): what selection sees under a bias."""
    biased: F32 = scores * scale
    biased += shift
    return biased


def _take_best(work: F32, k: int, out: I16) -> None:
    rows = np.arange(len(work))
    for i in range(k):
        best = work.argmax(axis=1)
        out[:, i] = best
        # NaN is below -inf for no comparison, so a taken entry can never be an argmax again only if marked lowest.
        work[rows, best] = -np.inf


def topk(scores: F32, scale: F32, shift: F32, k: int) -> I16:
    """Return [T, k] int16 ids of the k largest ``scores * scale + shift``, best first, ties to the lower index.

    scores: [T, E] float32 finite; scale, shift: [E] float32.
    """
    out = np.empty((len(scores), k), dtype=np.int16)
    for start in range(0, len(scores), _BLOCK):
        stop = start + _BLOCK
        _take_best(affine(scores[start:stop], scale, shift), k, out[start:stop])
    return out


def group_limited_topk(scores: F32, scale: F32, shift: F32, k: int, n_group: int, topk_group: int, n_best: int) -> I16:
    """As `topk`, restricted per token to the ``topk_group`` groups with the largest sum of their ``n_best`` best."""
    n_experts = scores.shape[1]
    size = n_experts // n_group
    out = np.empty((len(scores), k), dtype=np.int16)
    for start in range(0, len(scores), _BLOCK):
        work = affine(scores[start : start + _BLOCK], scale, shift)
        n = len(work)
        grouped = work.reshape(n * n_group, size).copy()
        rows = np.arange(len(grouped))
        best = grouped.argmax(axis=1)
        total = grouped[rows, best]
        for _ in range(1, min(n_best, size)):
            grouped[rows, best] = -np.inf
            best = grouped.argmax(axis=1)
            total = total + grouped[rows, best]
        group_score = total.reshape(n, n_group)
        dropped = np.ones((n, n_group), dtype=bool)
        rows = np.arange(n)
        for _ in range(topk_group):
            best = group_score.argmax(axis=1)
            dropped[rows, best] = False
            group_score[rows, best] = -np.inf
        work.reshape(n, n_group, size)[dropped] = -np.inf
        _take_best(work, k, out[start : start + _BLOCK])
    return out


def sigmoid(logits: F32) -> F32:
    """Logistic function in float32 by `exp2_fixed`; max absolute error about 1e-7."""
    scores: F32 = np.float32(1.0) / (np.float32(1.0) + exp(-logits))
    return scores


_LOG2E = np.float32(1.4426950408889634)
_EXP2 = tuple(  # Taylor coefficients of 2**f on |f| <= 1/2, degree 6: relative error below 2e-8 before rounding
    np.float32(0.6931471805599453**i / d) for i, d in enumerate((1.0, 1.0, 2.0, 6.0, 24.0, 120.0, 720.0))
)


def exp(x: F32) -> F32:
    """e**x in float32 from multiplications, additions and an exponent shift only.

    libm and NumPy's SIMD loops differ in the last bit between machines; this sequence does not.
    Saturates at 2**-126 and 2**127.
    """
    scaled: F32 = np.clip(x * _LOG2E, np.float32(-126.0), np.float32(127.0))
    whole = np.rint(scaled)
    f = scaled - whole
    p: F32 = np.full_like(f, _EXP2[6])
    for c in _EXP2[5::-1]:
        p *= f
        p += c
    bits = (whole.astype(np.int32) + np.int32(127)) << np.int32(23)
    p *= bits.view(np.float32)
    return p


def softmax(logits: F32) -> F32:
    """Row softmax in float32: `exp` of the shifted logits over their float64 sum (fixed order)."""
    e: F32 = exp(logits - logits.max(axis=1, keepdims=True))
    total = np.zeros(len(e), dtype=np.float64)
    for column in range(e.shape[1]):
        total += e[:, column]
    probabilities: F32 = e / total.astype(np.float32)[:, None]
    return probabilities


def expert_tokens(topk_ids: I16, n_experts: int) -> I64:
    """Count tokens per expert, [E] int64; ids of -1 count nowhere (DeepEP ``num_tokens_per_expert``)."""
    return np.bincount(topk_ids.ravel().astype(np.int64) + 1, minlength=n_experts + 1)[1:]


def group_tokens(topk_ids: I16, expert_to_group: I32, n_groups: int) -> I64:
    """Count tokens per group, [G] int64: a token with several experts in one group counts once there.

    With groups = ranks this is DeepEP's ``num_tokens_per_rank``, with groups = nodes ``num_tokens_per_rdma_rank``.
    """
    hit = np.zeros((len(topk_ids), n_groups + 1), dtype=bool)
    lookup = np.append(expert_to_group, n_groups)  # id -1 reads the last entry
    rows = np.arange(len(topk_ids))
    for i in range(topk_ids.shape[1]):
        hit[rows, lookup[topk_ids[:, i]]] = True
    counts: I64 = hit[:, :n_groups].sum(axis=0, dtype=np.int64)
    return counts


def distinct_groups(topk_ids: I16, expert_to_group: I32, n_groups: int) -> int:
    """Count (token, group) pairs with at least one expert: the sum of `group_tokens`, found from bit sets instead.

    The conservation checks hold the two against each other.
    """
    total = 0
    for low in range(0, n_groups, 64):
        inside = (expert_to_group >= low) & (expert_to_group < low + 64)
        bit = np.where(inside, np.uint64(1) << ((expert_to_group - low) & 63).astype(np.uint64), np.uint64(0))
        bits = np.append(bit, np.uint64(0))[topk_ids]  # id -1 reads the last entry
        total += int(np.bitwise_count(np.bitwise_or.reduce(bits, axis=1)).sum())
    return total


def picked(values: F32, topk_ids: I16) -> F32:
    """Gather [T, k] float32 of ``values`` [T, E] at the ids; 0 where the id is -1."""
    taken = np.take_along_axis(values, np.maximum(topk_ids, 0).astype(np.int64), axis=1)
    return np.where(topk_ids >= 0, taken, np.float32(0.0))
