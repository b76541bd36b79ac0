"""The integrated autocorrelation time: how many samples of a series are worth one independent sample."""

from __future__ import annotations

import numpy as np

from sim.tokens import F64

_WINDOW = 5.0
"""Lags are summed up to this many times the autocorrelation time found so far (Sokal, Monte Carlo Methods in Statistical
Mechanics, 1996)."""


def autocorrelation_time(series: F64) -> float:
    """Return the integrated autocorrelation time of ``series`` [n], in samples, at least 1.

    tau = 1 + 2 sum of rho(t) up to the first window M >= 5 tau (Sokal's automatic windowing), times 1 + (2 M + 1) / n: the
    series' own mean makes every rho too small by about tau / n (Wolff, hep-lat/0306017, equation 49). That correction is of
    first order, so tau is still too small where n is below some 50 tau; see `sim.statistics.batch_means`.

    >>> autocorrelation_time(np.ones(9))
    1.0
    """
    n = len(series)
    if n < 2:
        return 1.0
    centred = series - series.mean()
    variance = float(centred @ centred)
    if variance <= 1e-24 * max(float(series @ series), 1e-300):
        return 1.0
    size = 1 << (2 * n - 1).bit_length()  # padded, so that the ends do not meet
    spectrum = np.fft.rfft(centred, size)
    rho = np.fft.irfft(spectrum.real**2 + spectrum.imag**2, size)[1:n] / variance
    tau = 1.0 + 2.0 * np.cumsum(rho)
    ends = np.flatnonzero(np.arange(1, n) >= _WINDOW * tau)
    window = int(ends[0]) if len(ends) else n - 2
    return max(1.0, float(tau[window]) * (1.0 + (2 * window + 3) / n))
