"""Router logits from recorded weights: the k recorded ones as they are, the unseen tail drawn below them.

ESFT-like traces hold a token's k largest softmax weights over all E experts, not renormalised. The other E - k weights
are each below the k-th and sum to what is missing to 1. Here w_e = w_k r_e / (1 + r_e) with
r_e = c popularity_e exp(tail_sd x_e), x normal, and the one c that makes the sum right: log-normal far below w_k, always
below it. Popularity is the expert's load in the layer.

What it does not know: which unchosen experts were close in this token, in its sequence or given the chosen ones. Gates
judged on imputed logits are judged on the recorded ranks 1..k and on a plausible, not a real, remainder.
"""

from __future__ import annotations

import numpy as np

from sim.kernels import affinity as kernel
from sim.kernels.elementary import exp, log, power
from sim.rng import stream
from sim.tokens import F32, F64, I16, I64
from sim.traces import RecordedTrace

CAVEAT = (
    "the scores of experts outside the recorded top-k are imputed (popularity and independent noise below the k-th "
    "recorded weight), not measured: gates are compared on a plausible remainder, not on the real one"
)

_NOISE_BITS = 16
_BISECTIONS = 48  # of an interval of 2^120 on a log scale: c to 1e-12
# Logits of sd 1.08 (V2-Lite) that are lifted by x choose an expert exp(1.65 x) times as often at k / E = 6/64.
_POPULARITY_POWER = 0.6
# Set on generated logits (sequence_length 400, one topic, three layers), whose ranks 7-12 it gives to 7 %, 21 and 41 to 6 %.
_TAIL_SD = 1.4
_SURE = 0.998  # a sum of float16 weights above it is 1 for all one can tell


def check_weights(path: str, trace: RecordedTrace) -> F32:
    """Return the weights of ``trace``; raises ValueError unless they can be the largest of a softmax over all experts."""

    def refuse(expected: str, found: object) -> ValueError:
        return ValueError(f"{path}: topk_weights: impute expects {expected}, found {found}")

    weights = trace.topk_weights
    if weights is None:
        raise refuse("recorded gate weights", "none: with ids alone no other gate can be judged")
    smallest = float(weights.min())
    if smallest <= 0:
        raise refuse("positive weights", smallest)
    total = weights.sum(axis=2, dtype=np.float64)
    if float(np.median(total)) > _SURE or float(total.max()) > 1.01:
        raise refuse(
            "softmax weights over all experts that were not renormalised over the chosen ones (their sum is below 1)",
            f"a median sum of {float(np.median(total)):.4g}, at most {float(total.max()):.4g}: the unseen part is lost",
        )
    room = (trace.n_routed_experts - weights.shape[2]) * weights.min(axis=2)
    short = (1.0 - total) > room * 1.02
    if short.any():
        layer, token = np.unravel_index(int(short.argmax()), short.shape)
        raise refuse(
            "the k largest weights of a softmax",
            f"a token whose other experts cannot make up the sum to 1 (row {layer}, token {token})",
        )
    return weights


class Imputed:
    """The logits of one trace for one (seed, replica); equal for every policy and in any order of questions."""

    def __init__(self, path: str, trace: RecordedTrace, seed: int, replica: int) -> None:
        self._trace, self._weights = trace, check_weights(path, trace)
        self._seed, self._replica = seed, replica
        draw = stream(seed, "traffic", "impute", replica)
        self._noise = draw.standard_normal(2**_NOISE_BITS + trace.n_routed_experts - 1)
        self._keys = draw.integers(2**32, size=trace.n_tokens, dtype=np.uint32)
        self._popularity: dict[int, F64] = {}

    def popularity(self, position: int) -> F64:
        """Return the weight of every expert in the tail of the layer at ``position``, [E] float64."""
        if position not in self._popularity:
            load = np.bincount(self._trace.topk_ids[position].ravel(), minlength=self._trace.n_routed_experts)
            self._popularity[position] = power((load + 0.5) / (load.mean() + 0.5), _POPULARITY_POWER)
        return self._popularity[position]

    def logits(self, position: int, tokens: I64) -> F32:
        """Return logits [T, E] float32 of some ``tokens`` in the layer at ``position``; their softmax has the weights."""
        n_experts = self._trace.n_routed_experts
        layer_key = int(stream(self._seed, "traffic", "impute", "layer", self._replica, position).integers(2**32))
        window = kernel.windows_of(self._keys[tokens], layer_key, _NOISE_BITS)
        noise = np.lib.stride_tricks.sliding_window_view(self._noise, n_experts)[window]
        return complete(
            self._trace.topk_ids[position][tokens],
            self._weights[position][tokens],
            self.popularity(position) * exp(_TAIL_SD * noise),
        )


def complete(topk_ids: I16, topk_weights: F32, tail: F64) -> F32:
    """Return logits [T, E] float32 from k recorded weights and the unscaled ``tail`` [T, E] > 0 of the other experts."""
    n_tokens, k = topk_ids.shape
    at = topk_ids.astype(np.int64)
    recorded = topk_weights.astype(np.float64)
    threshold = recorded.min(axis=1)
    total = np.zeros(n_tokens)
    for column in recorded.T:  # a written order of additions
        total += column
    rest = tail.copy()
    np.put_along_axis(rest, at, 0.0, axis=1)
    n_rest = tail.shape[1] - k
    # In units of the threshold; rounded weights may leave nothing to the rest, or more than it can hold.
    wanted = np.clip((1.0 - total) / threshold, 1e-6, 0.999 * n_rest)
    low, high = np.full(n_tokens, 2.0**-60), np.full(n_tokens, 2.0**60)
    for _ in range(_BISECTIONS):
        middle = np.sqrt(low * high)
        below = _held(middle, rest) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    ratio = low[:, None] * rest
    np.put_along_axis(ratio, at, 1.0, axis=1)
    logits: F32 = log(threshold[:, None] * (ratio / (1.0 + ratio))).astype(np.float32)
    # Rounding must not lift one of the rest to the k-th recorded weight.
    chosen = log(recorded).astype(np.float32)
    ceiling = np.nextafter(chosen.min(axis=1, keepdims=True), np.float32(-np.inf))
    logits = np.minimum(logits, ceiling)
    np.put_along_axis(logits, at, chosen, axis=1)
    return logits


def _held(c: F64, rest: F64) -> F64:
    """Return the sum over experts of c r / (1 + c r), [T]."""
    ratio = c[:, None] * rest
    # Added expert by expert in their order, the same on every machine; np.sum's order depends on the CPU.
    held: F64 = np.add.accumulate(ratio / (1.0 + ratio), axis=1)[:, -1]
    return held
