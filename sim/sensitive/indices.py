"""All constants at once: Sobol indices of an output, by Saltelli's scheme (SALib).

The design is a scrambled Sobol sequence, uniform between each constant's ends; ``first`` is the share of the output's variance
that a constant explains by itself, ``total`` that in which it has a part (Saltelli et al., Computer Physics Communications
181, 2010).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sim.rng import stream
from sim.tokens import F64

Bounds = Sequence[tuple[float, float]]
LIBRARY = "Sobol indices need a library that is not installed: pip install 'gatesim[sensitivity]' (or --samples 0)"


class Indices(NamedTuple):
    """Per input [d]: first-order and total index, each with the 95 % half-width of a bootstrap."""

    first: F64
    first_half_width: F64
    total: F64
    total_half_width: F64


def design(bounds: Bounds, samples: int, seed: int) -> F64:
    """Return the points [samples (d + 2), d], ``samples`` a power of two: blocks of d + 2, of which the first and the last
    are independent draws and the others mix these two. Raises ValueError if SALib is absent or ``samples`` is not so."""
    if samples < 2 or samples & (samples - 1):
        raise ValueError(f"--samples must be a power of two, at least 2, or 0 for none [got {samples}]")
    try:
        sample = importlib.import_module("SALib.sample.sobol").sample  # which has no types
    except ImportError:
        raise ValueError(LIBRARY) from None
    found: F64 = sample(_problem(bounds), samples, calc_second_order=False, scramble=True, seed=_seed(seed, "design"))
    return found


def independent(values: Any, inputs: int) -> Any:
    """Return those of ``values`` [samples (d + 2), ...] that belong to independent draws: two of every block."""
    rows = np.arange(len(values)) % (inputs + 2)
    return values[(rows == 0) | (rows == inputs + 1)]


def indices(bounds: Bounds, output: F64, seed: int) -> Indices:
    """Return the indices of ``output`` [samples (d + 2)] at the points of `design`; zeros where nothing varies."""
    analyze = importlib.import_module("SALib.analyze.sobol").analyze
    if np.ptp(output) <= 1e-12 * np.abs(output).max():
        return Indices(*(np.zeros(len(bounds)) for _ in range(4)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = analyze(_problem(bounds), output, calc_second_order=False, seed=_seed(seed, "bootstrap"))
    return Indices(*(np.asarray(found[name], dtype=np.float64) for name in ("S1", "S1_conf", "ST", "ST_conf")))


def _problem(bounds: Bounds) -> dict[str, Any]:
    return {
        "num_vars": len(bounds),
        "names": [f"x{i}" for i in range(len(bounds))],
        "bounds": [list(b) for b in bounds],
    }


def _seed(seed: int, what: str) -> int:
    return int(stream(seed, "sensitivity", what).integers(2**31))
