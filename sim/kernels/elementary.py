"""exp, log, sine and powers in float64 from IEEE additions, multiplications, divisions and square roots alone.

The C library's functions differ in the last bits between machines and between NumPy's own code paths; these do not, so
that what they compute may decide a token's experts. Relative error below 1e-12. Not for hot loops.
"""

from __future__ import annotations

import math

import numpy as np

from sim.tokens import F64

_LN2 = 0.6931471805599453
_LN2_HIGH = 0.693147180369123816490  # 32 bits: times a whole number of up to 20 bits it is exact
_LN2_LOW = 1.90821492927058770002e-10
_HALVINGS = 4


def exp(x: F64 | float) -> F64:
    """Return e^x for ``x`` of at most 700 in size (not checked; beyond it float64 overflows).

    >>> bool(abs(exp(1.0) - np.e) < 1e-12)
    True
    """
    value = np.asarray(x, dtype=np.float64)
    doublings = np.rint(value / _LN2)
    reduced = (value - doublings * _LN2_HIGH - doublings * _LN2_LOW) * 2.0**-_HALVINGS
    power = np.ones_like(reduced)
    for n in range(8, 0, -1):
        power = 1.0 + power * reduced / n
    for _ in range(_HALVINGS):
        power = power * power
    found: F64 = np.ldexp(power, doublings.astype(np.int32))
    return found


def log(x: F64 | float) -> F64:
    """Return ln x of positive finite ``x`` (not checked), by 2 atanh((m - 1) / (m + 1)) of the mantissa m.

    >>> bool(abs(log(10.0) - 2.302585092994046) < 1e-14)
    True
    """
    mantissa, exponent = np.frexp(np.asarray(x, dtype=np.float64))
    small = mantissa < 0.7071067811865476
    mantissa = np.where(small, mantissa * 2.0, mantissa)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = np.zeros_like(ratio)
    for n in range(23, 0, -2):
        series = series * square + 1.0 / n
    value: F64 = 2.0 * ratio * series + (exponent - small) * _LN2
    return value


def sine_of_turns(turns: float) -> float:
    """Return sin(2 pi ``turns``).

    >>> sine_of_turns(0.0), sine_of_turns(0.25), round(sine_of_turns(7 + 1 / 12), 12)
    (0.0, 1.0, 0.5)
    """
    position = turns - math.floor(turns)
    sign = 1.0
    if position >= 0.5:
        position, sign = position - 0.5, -1.0
    position = min(position, 0.5 - position)
    if position == 0.25:
        return sign
    angle = 2.0 * math.pi * position
    term = total = angle
    for n in range(3, 25, 2):
        term = -term * angle * angle / (n * (n - 1))
        total += term
    return sign * total


def power(base: F64, exponent: float) -> F64:
    """Return ``base`` ** ``exponent`` of positive bases, to 1e-12 while the result stays within e^+-100.

    >>> np.round(power(np.array([1.0, 2.0, 3.0]), -1.0), 12).tolist()
    [1.0, 0.5, 0.333333333333]
    """
    return exp(exponent * log(base))
