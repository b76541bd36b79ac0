"""Numeric kernels of the affinity generator, each written twice with identical bits.

The NumPy forms are blocked so that temporaries stay in cache; the loop forms are plain Python that Numba compiles the
first time ``compiled=True`` is asked for (importing this module never loads Numba). Both use the same IEEE float32
multiplications and additions in the same order: no BLAS, no libm, no reassociation, no fused multiply-add.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from sim.tokens import F32, F64, I32, I64

_BLOCK = 128  # tokens per block of the NumPy form: 128 x 256 x 4 B x 2 buffers = 256 KiB, half of a usual L2

# E[x^2], E[x^4], ..., E[x^14] of a standard normal x.
_NORMAL_MOMENTS = (1.0, 3.0, 15.0, 105.0, 945.0, 10395.0, 135135.0)


def heavy_tail(dof: float | None) -> tuple[float, float, float, float]:
    """Return (c0, c1, c2, c3): c0 x + c1 x^3 + c2 x^5 + c3 x^7 has unit variance and Student-t tails for normal x.

    Cornish-Fisher expansion of the Student-t quantile at ``dof`` degrees of freedom (Abramowitz & Stegun 26.7.5, three
    correction terms), scaled to unit variance by the normal moments. Only multiplications and additions are needed to
    apply it, hence equal bits on every machine. None keeps the normal: (1, 0, 0, 0).
    """
    if dof is None:
        return 1.0, 0.0, 0.0, 0.0
    a, b, c = 1.0 / dof, 1.0 / dof**2, 1.0 / dof**3
    raw = (
        1.0 + a / 4 + 3 * b / 96 - 15 * c / 384,
        a / 4 + 16 * b / 96 + 17 * c / 384,
        5 * b / 96 + 19 * c / 384,
        3 * c / 384,
    )
    variance = sum(u * v * _NORMAL_MOMENTS[i + j] for i, u in enumerate(raw) for j, v in enumerate(raw))
    return raw[0] / variance**0.5, raw[1] / variance**0.5, raw[2] / variance**0.5, raw[3] / variance**0.5


def autoregress(x: F32, correlation: F64 | float, sequence_length: int, *, compiled: bool) -> None:
    """Turn standard normals ``x`` [T, R] into unit-variance AR(1) paths along T, in place.

    z[t] = rho z[t-1] + sqrt(1 - rho^2) x[t], restarted (z = x) at every multiple of ``sequence_length``.
    correlation: rho, of all columns or of each [R].
    """
    each = np.broadcast_to(np.asarray(correlation, dtype=np.float64), x.shape[1:])
    rho = each.astype(np.float32)
    gain = np.sqrt(1.0 - each * each).astype(np.float32)
    if compiled:
        _compiled(_autoregress_loops)(x, rho, gain, sequence_length)
        return
    for position in range(1, min(sequence_length, len(x))):
        now = x[position::sequence_length]
        now *= gain
        now += rho * x[position - 1 :: sequence_length][: len(now)]


def stretch(x: F32, coefficients: tuple[float, float, float, float], *, compiled: bool) -> None:
    """Apply the odd polynomial of `heavy_tail` to ``x`` [T, R], in place, by Horner's rule in float32."""
    c0, c1, c2, c3 = (np.float32(c) for c in coefficients)
    if compiled:
        _compiled(_stretch_loops)(x, c0, c1, c2, c3)
        return
    square = x * x
    factor = c3 * square
    for c in (c2, c1):
        factor += c
        factor *= square
    factor += c0
    x *= factor


def blend(x: F32, table: F32, index: I32, share: float) -> None:
    """Replace ``x`` [T, R] by sqrt(share) table[index] + sqrt(1 - share) x, in place; table [V, R], index [T].

    One form only: NumPy's float32 operations, one rank's tokens at a time.
    """
    x *= np.float32(math.sqrt(1.0 - share))
    x += np.float32(math.sqrt(share)) * table[index]


def combine(
    base: F32,
    topic: I32,
    noise: F32,
    offset: I64,
    noise_gain: float,
    latents: F32,
    gains: F32,
    basis: F32,
    *,
    compiled: bool,
) -> F32:
    """Return float32 logits [T, E]: base + noise + low-rank latents.

    logits[t, e] = base[topic[t], e] + noise_gain noise[offset[t] + e] + sum_r z[t, r] basis[r, e], added in that order,
    where z[t, r] = sum_p gains[p, r] latents[t, p, r]. Shapes: base [topics, E], noise [>= max(offset) + E],
    latents [T, P, R], gains [P, R], basis [R, E].
    """
    logits = np.empty((len(topic), base.shape[1]), dtype=np.float32)
    g = np.float32(noise_gain)
    if compiled:
        _compiled(_combine_loops)(logits, base, topic, noise, offset, g, latents, gains, basis)
    else:
        _combine_blocks(logits, base, topic, noise, offset, g, latents, gains, basis)
    return logits


def _combine_blocks(
    logits: F32,
    base: F32,
    topic: I32,
    noise: F32,
    offset: I64,
    noise_gain: np.float32,
    latents: F32,
    gains: F32,
    basis: F32,
) -> None:
    n_tokens, n_experts = logits.shape
    n_latent, rank = latents.shape[1:]
    windows = np.lib.stride_tricks.sliding_window_view(noise, n_experts)
    z = np.zeros((n_tokens, rank), dtype=np.float32)
    for p in range(n_latent):
        z += gains[p] * latents[:, p]
    for start in range(0, n_tokens, _BLOCK):
        block = slice(start, start + _BLOCK)
        out = logits[block]
        np.take(base, topic[block], axis=0, out=out)
        term = windows[offset[block]]
        term *= noise_gain
        out += term
        for r in range(rank):
            np.multiply(z[block, r, None], basis[r], out=term)
            out += term


def _autoregress_loops(x: F32, rho: F32, gain: F32, sequence_length: int) -> None:
    n_tokens, rank = x.shape
    for t in range(n_tokens):
        if t % sequence_length:
            for r in range(rank):
                x[t, r] = x[t, r] * gain[r] + rho[r] * x[t - 1, r]


def _stretch_loops(x: F32, c0: np.float32, c1: np.float32, c2: np.float32, c3: np.float32) -> None:
    n_tokens, rank = x.shape
    for t in range(n_tokens):
        for r in range(rank):
            square = x[t, r] * x[t, r]
            x[t, r] = x[t, r] * ((((c3 * square) + c2) * square + c1) * square + c0)


def _combine_loops(
    logits: F32,
    base: F32,
    topic: I32,
    noise: F32,
    offset: I64,
    noise_gain: np.float32,
    latents: F32,
    gains: F32,
    basis: F32,
) -> None:
    n_tokens, n_experts = logits.shape
    n_latent, rank = latents.shape[1:]
    z = np.zeros(rank, dtype=np.float32)
    for t in range(n_tokens):
        for r in range(rank):
            z[r] = 0.0
        for p in range(n_latent):
            for r in range(rank):
                z[r] += gains[p, r] * latents[t, p, r]
        out = logits[t]
        row = base[topic[t]]
        window = noise[offset[t] : offset[t] + n_experts]
        for e in range(n_experts):
            out[e] = row[e] + noise_gain * window[e]
        # Several factors per pass over the row save loads and stores; the order of additions stays r = 0, 1, 2...
        done = 0
        while done + 5 <= rank:
            z0, z1, z2, z3, z4 = z[done], z[done + 1], z[done + 2], z[done + 3], z[done + 4]
            w0, w1, w2, w3, w4 = basis[done], basis[done + 1], basis[done + 2], basis[done + 3], basis[done + 4]
            for e in range(n_experts):
                out[e] = ((((out[e] + z0 * w0[e]) + z1 * w1[e]) + z2 * w2[e]) + z3 * w3[e]) + z4 * w4[e]
            done += 5
        while done < rank:
            z0 = z[done]
            w0 = basis[done]
            for e in range(n_experts):
                out[e] = out[e] + z0 * w0[e]
            done += 1


@functools.cache
def _compiled(loops: Callable[..., None]) -> Callable[..., Any]:
    from numba import njit

    compiled: Callable[..., Any] = njit(cache=True, nogil=True)(loops)
    return compiled


def windows_of(keys: npt.NDArray[np.uint32], key: int, bits: int) -> I64:
    """Hash 32-bit ``keys`` [T] to offsets in [0, 2^bits): multiply by an odd number modulo 2^32, keep the top bits.

    ``key`` (32 bits) chooses the multiplier, so that keys which collide in one layer do not in another.
    """
    mixed = keys * np.uint32(key | 1)
    return (mixed >> np.uint32(32 - bits)).astype(np.int64)
